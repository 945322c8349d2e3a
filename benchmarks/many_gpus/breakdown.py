"""Where the time of a few steps goes in each process: kernels, collectives, what the host waits for."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

COLLECTIVE = ("nccl", "gloo")
"""What kernels and host ranges of a collective begin with."""

RANGES = ("nccl:", "FSDP::", "Optimizer.", "DistributedDataParallel")
"""What the names of ranges on a GPU begin with, which hold kernels that are counted themselves."""


class Breakdown:
    """Watches a run from the end of one step to that of another.

    Where a step takes no longer than until it is launched, its host is what it waits for.

    Args:
        first: the step after which it begins to watch.
        steps: how many it watches; first without the profiler, whose own time is large, then with it.
    """

    def __init__(self, first: int, steps: int) -> None:
        self.steps = steps
        self.plain, self.profiled, self.last = first, first + steps, first + 2 * steps
        self.began = 0.0
        self.own: dict[str, float] = {}
        activities = [ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(ProfilerActivity.CUDA)
        self.profiler = profile(activities=activities)

    def step(self, step: int) -> None:
        """A step has been launched."""
        launched = time.perf_counter()
        if step in (self.plain, self.profiled, self.last):
            _wait()
        if step == self.plain:
            self.began = time.perf_counter()
        elif step == self.profiled:
            done = time.perf_counter()
            self.own = {
                "ms a step": 1000 * (done - self.began) / self.steps,
                "until launched, ms": 1000 * (launched - self.began) / self.steps,
            }
            print(self.own, flush=True)  # should the profiler fail
            self.profiler.start()
        elif step == self.last:
            self.profiler.stop()

    def of_all(self) -> dict[str, Any]:
        """Milliseconds and numbers a step, of every process."""
        own = self.own | summed(self.profiler.key_averages(), self.steps)
        if not torch.distributed.is_initialized():
            return {"processes": [own]}
        found: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(found, own)
        return {"processes": found}


def summed(events: Iterable[Any], steps: int) -> dict[str, float]:
    """What a profile says, by name, a step."""
    found = dict.fromkeys(
        ("kernels, ms", "kernels", "collectives, ms", "collectives", "launches", "waits", "waits, ms"), 0.0
    )
    for event in events:
        on_gpu = "CPU" not in str(event.device_type)
        if on_gpu:
            if event.is_user_annotation or event.key.startswith(RANGES):
                continue
            kind = "collectives" if event.key.lower().startswith(COLLECTIVE) else "kernels"
            found[kind] += event.count / steps
            found[f"{kind}, ms"] += event.self_device_time_total / 1000 / steps
        elif not on_gpu and "Launch" in event.key and event.key.startswith("cu"):
            found["launches"] += event.count / steps
        elif not on_gpu and "Synchronize" in event.key:
            found["waits"] += event.count / steps
            found["waits, ms"] += event.self_cpu_time_total / 1000 / steps
        elif not torch.cuda.is_available() and event.key.startswith(COLLECTIVE):  # a trial with gloo
            found["collectives"] += event.count / steps
    return found


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
