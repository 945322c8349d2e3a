"""The processes of a run (`accelerate launch`), and what they have to agree on."""

from __future__ import annotations

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, broadcast
from torch import Tensor

from modlab.errors import ModlabError

SHARDING = (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM)


class Processes:
    """This process among those that share each global batch.

    Raises:
        ModlabError: accelerate was told to shard the model.
    """

    def __init__(self) -> None:
        self.accelerator = Accelerator(mixed_precision="no")  # autocast is ours, see Step.autocast
        if self.accelerator.distributed_type in SHARDING:
            raise ModlabError(
                f"accelerate was launched with {self.accelerator.distributed_type.value}, but modlab.train "
                "gives every process the whole model: launch with --multi_gpu."
            )
        self.device: torch.device = self.accelerator.device
        self.world: int = self.accelerator.num_processes
        self.rank: int = self.accelerator.process_index
        self.is_main: bool = self.accelerator.is_main_process

    def sum(self, value: Tensor) -> Tensor:
        """The sum over processes, on each of them."""
        if self.world == 1:
            return value
        summed: Tensor = self.accelerator.reduce(value.clone(), "sum")
        return summed

    def any(self, flag: bool) -> bool:
        """Whether it is set in any process; waits for the others."""
        return self.world == 1 and flag or self.world > 1 and self._of_all(float(flag)) > 0

    def of_main(self, value: float) -> float:
        """The main process's number on every process; waits for it."""
        if self.world == 1:
            return value
        return float(broadcast(torch.tensor([value], dtype=torch.float32, device=self.device)).item())

    def wait(self) -> None:
        """Until all of them are here."""
        self.accelerator.wait_for_everyone()

    def _of_all(self, value: float) -> float:
        return float(self.sum(torch.tensor([value], device=self.device)).item())
