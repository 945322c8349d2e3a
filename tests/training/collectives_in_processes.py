"""Run by `accelerate launch` in test_step.py: how often processes wait for each other in one distilled step.

collectives_in_processes.py OUT

In a folder named "sharded" FSDP2 shards the model.
"""

from __future__ import annotations

import collections
import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

import modlab
from modlab.training.run import Run
from tests.helpers.fsdp_on_cpu import launched_with_fsdp
from tests.helpers.steps import CASES, model_of

STEPS = 4


def main(out: Path) -> None:
    if out.name == "sharded":
        launched_with_fsdp()
    conversion, settings = CASES["distil"]
    config = modlab.TrainConfig(
        steps=STEPS, batch_size=2, log_every=STEPS, calibrate=False, mixed_precision="no", **settings
    )
    rows = torch.randint(2, 97, (4 * STEPS, 24), generator=torch.Generator().manual_seed(0))
    with Run(model_of(conversion), rows, config) as run:
        batches = run.batches()
        for _ in range(2):  # the first one sets up, after it DDP orders its buckets again
            run.train_step(next(batches))
        found = counted(run, next(batches))
    if torch.distributed.get_rank() == 0:
        (out / "collectives.json").write_text(json.dumps(found))


def counted(run: Run, parts: list[Any]) -> dict[str, int]:
    """Collectives of a step, by name."""
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        run.train_step(parts)
    return collections.Counter(event.name for event in seen.events() if event.name.startswith("c10d::"))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
