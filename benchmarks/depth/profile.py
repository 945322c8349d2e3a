"""Where the time of one prompt goes: kernels by their total time, and how long the GPU had nothing to do."""

from __future__ import annotations

from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.depth.prefill import prompt_calls
from modlab.measure import synchronize

SHOWN = 25


def profile_prompts(model: Any, length: int, leave_after: float = 2 / 3) -> list[dict[str, Any]]:
    """A row for the dense model and for each twin of `time_prompts`: milliseconds of one prompt with the
    profiler on (which slows the host down), those in which a kernel ran, and the kernels with most of them.

    Args:
        model: dense; it is left as it was.
        length: tokens of the prompt.
    """
    found = []
    device = next(model.parameters()).device
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
    with prompt_calls(model, leave_after) as calls_of:
        for name, call in calls_of(length).items():
            call()
            synchronize(device)
            with profile(activities=activities, acc_events=True) as profiled:
                took, _ = call()
                synchronize(device)
            found.append({"call": name, "context": length, "ms": took, **_read(profiled, device.type)})
    return found


def _read(profiled: Any, kind: str) -> dict[str, Any]:
    name = "self_device_time_total" if kind == "cuda" else "self_cpu_time_total"
    averages = sorted(profiled.key_averages(), key=lambda one: -getattr(one, name))
    kernels = [
        {"name": one.key[:90], "ms": round(getattr(one, name) / 1e3, 3), "count": one.count}
        for one in averages[:SHOWN]
    ]
    if kind != "cuda":
        return {"busy_ms": None, "kernels": kernels}
    spans = sorted(
        (event.time_range.start, event.time_range.end)
        for event in profiled.events()
        if event.device_type == torch.autograd.DeviceType.CUDA
    )
    return {"busy_ms": _covered(spans) / 1e3, "launches": len(spans), "kernels": kernels}


def _covered(spans: list[tuple[float, float]]) -> float:
    """Length of the union of intervals in ascending order."""
    total, end = 0.0, float("-inf")
    for a, z in spans:
        total += max(0.0, z - max(a, end))
        end = max(end, z)
    return total
