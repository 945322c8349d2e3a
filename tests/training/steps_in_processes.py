"""Run by `accelerate launch` in test_step.py: the gradient of one step, in as many processes as there are.

steps_in_processes.py OUT BATCH_SIZE GRAD_ACCUM CASE...
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from tests.helpers.steps import gradient


def main(out: str, batch_size: int, grad_accum: int, cases: list[str]) -> None:
    found = {case: gradient(case, batch_size, grad_accum) for case in cases}
    rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
    torch.save(found, Path(out) / f"rank_{rank}.pt")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4:])
