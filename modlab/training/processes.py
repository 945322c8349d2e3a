"""The processes of a run (`accelerate launch`), and what they have to agree on."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, DistributedType, broadcast, gather_object
from torch import Tensor, nn

from modlab.errors import ModlabError
from modlab.training.zero import check_settings

FOREIGN = {
    DistributedType.MEGATRON_LM: "it needs models of its own",
}
"""Ways to shard that are refused, and why."""


class Processes:
    """This process among those that share each global batch.

    Attributes:
        accelerator: accelerate's.
        device: of this process.
        world, rank: number of processes, and which one this is.
        is_main: whether it is the one that writes and prints.
        shards: whether accelerate was launched with FSDP2: weights, gradients and optimiser are sharded.
        zero: whether it was with DeepSpeed's first stage: the optimiser's state is (`zero.py`).

    Raises:
        ModlabError: accelerate was told to shard the model in a way that a run cannot follow.
    """

    def __init__(self) -> None:
        self.accelerator = Accelerator(mixed_precision="no")  # autocast is ours, see Step.autocast
        kind = self.accelerator.distributed_type
        self.shards = kind == DistributedType.FSDP
        self.zero = kind == DistributedType.DEEPSPEED
        self._refuse(kind)
        self.device: torch.device = self.accelerator.device
        self.world: int = self.accelerator.num_processes
        self.rank: int = self.accelerator.process_index
        self.is_main: bool = self.accelerator.is_main_process

    @property
    def plugin(self) -> Any:
        """accelerate's settings of FSDP."""
        return self.accelerator.state.fsdp_plugin

    def copied(self, model: Any) -> Any:
        """The model as DDP's wrapper trains it, whose gradients are averaged; itself in a single process.

        Buffers that a checkpoint holds are the first process's in every forward. Those that it does not hold
        (rotary tables) are the same in all of them, and no forward waits for them.
        """
        self.accelerator.ddp_handler = DistributedDataParallelKwargs(broadcast_buffers=_has_state(model))
        return self.accelerator.prepare_model(model)

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

    def agree(self, value: Any) -> bool:
        """Whether every process has the same value (as `repr` writes it); waits for the others."""
        if self.world == 1:
            return True
        digest = hashlib.sha256(repr(value).encode()).digest()
        own = torch.tensor(list(digest), dtype=torch.int64, device=self.device)
        return not self.any(not torch.equal(broadcast(own.clone()), own))

    def gather(self, parts: list[Any]) -> list[Any]:
        """All processes' parts of a global batch in its order: each process's first, then the second ones."""
        if self.world == 1:
            return parts
        own = [{name: value.cpu() for name, value in part.items()} for part in parts]
        found: list[list[Any]] = gather_object([own])
        return [process[number] for number in range(len(parts)) for process in found]

    def wait(self) -> None:
        """Until all of them are here."""
        self.accelerator.wait_for_everyone()

    def _refuse(self, kind: DistributedType) -> None:
        advice = (
            "Launch with --multi_gpu, or shard with --use_fsdp --fsdp_version 2, which shards weights, "
            "gradients and optimiser as ZeRO's third stage does."
        )
        if kind in FOREIGN:
            raise ModlabError(
                f"accelerate was launched with {kind.value}, which modlab.train refuses: {FOREIGN[kind]}. "
                + advice
            )
        if self.zero:
            check_settings(self.accelerator.deepspeed_plugin.deepspeed_config)
        if self.shards and not self.accelerator.is_fsdp2:
            raise ModlabError(
                "accelerate was launched with the first version of FSDP, which flattens the fp32 weights of "
                "routers together with others: say --fsdp_version 2."
            )
        if getattr(self.accelerator, "parallelism_config", None) is not None:
            raise ModlabError(
                "accelerate was launched with a parallelism config, but modlab.train gives every process its "
                "own rows, over one mesh of all processes: leave the parallelism config out."
            )

    def _of_all(self, value: float) -> float:
        return float(self.sum(torch.tensor([value], device=self.device)).item())


def _has_state(model: nn.Module) -> bool:
    """Whether a buffer of the model is saved with it."""
    return any(
        value is not None and name not in module._non_persistent_buffers_set
        for module in model.modules()
        for name, value in module._buffers.items()
    )
