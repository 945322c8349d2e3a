"""Run by `accelerate launch` in test_step.py: the gradient of one step, in as many processes as there are.

steps_in_processes.py OUT BATCH_SIZE GRAD_ACCUM CASE...

In a folder named "sharded" FSDP2 shards the model, with activation checkpointing; in one named "gathered" it
does so without, and weights stay whole from a forward to its backward pass.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from tests.helpers.fsdp_on_cpu import launched_with_fsdp
from tests.helpers.sharding import whole
from tests.helpers.steps import gradient


def main(out: Path, batch_size: int, grad_accum: int, cases: list[str]) -> None:
    if out.name == "sharded":
        launched_with_fsdp(activation_checkpointing=True)
    elif out.name == "gathered":
        launched_with_fsdp(reshard_after_forward=False)
    found = {case: gradient(case, batch_size, grad_accum) for case in cases}
    found = {case: {name: whole(value) for name, value in of.items()} for case, of in found.items()}
    torch.save(found, out / f"rank_{torch.distributed.get_rank()}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4:])
