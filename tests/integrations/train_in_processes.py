"""Run by `accelerate launch` in test_trainer_processes.py: the first step of a Trainer, in several processes.

train_in_processes.py OUT ROWS_A_FORWARD ACCUMULATED
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from tests.helpers.trainers import first_gradient


def main(out: str, rows: int, accumulated: int) -> None:
    found = first_gradient(out, rows, accumulated)
    rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
    torch.save(found, Path(out) / f"rank_{rank}.pt")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
