"""Times of several calls, taken in turn so that whatever else the machine does hits all of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from modlab.measure import synchronize


@dataclass
class Times:
    """Rounds of one call.

    Attributes:
        wall: milliseconds by the clock: what a user waits.
        cpu: milliseconds that this process computed, over all its threads; hardly moved by what else runs on
            the machine, so a speed-up seen only in `wall` on a busy machine is chance.
    """

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)


def interleaved(
    calls: Mapping[str, Callable[[], Any]], repeats: int, device: torch.device, per: int = 1, warmup: int = 1
) -> dict[str, Times]:
    """Times of each call: `repeats` rounds after `warmup` untimed ones, in an order that rotates.

    Args:
        calls: what to time, by name.
        repeats: rounds that count.
        device: waited for before and after each call.
        per: the times are divided by this (tokens that one call decodes).
        warmup: rounds before those.
    """
    times = {name: Times() for name in calls}
    names = list(calls)
    for turn in range(warmup + repeats):
        shift = turn % len(names)
        for name in names[shift:] + names[:shift]:
            synchronize(device)
            start, cpu_start = time.perf_counter(), time.process_time()
            result = calls[name]()
            synchronize(device)
            elapsed, cpu = time.perf_counter() - start, time.process_time() - cpu_start
            del result  # a cache must not be alive while the next call allocates its own
            if turn >= warmup:
                times[name].wall.append(elapsed * 1e3 / per)
                if device.type == "cpu":
                    times[name].cpu.append(cpu * 1e3 / per)
    return times
