"""Time of a prompt through the user's own `generate`, dense and leaving, in turns on the same weights."""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch

import modlab


def time_prompts(
    model: Any, lengths: list[int], repeats: int, leave_after: float = 2 / 3, rows: int = 1
) -> list[dict[str, Any]]:
    """One row a length: milliseconds from call to first token, the median and the fastest of `repeats`.

    Args:
        model: dense; it is converted and left so. Untrained projections take the time of trained ones.
    """
    device = next(model.parameters()).device
    modlab.convert(model, modlab.MoDConfig(skip="prompt", leave_after=leave_after))
    found = []
    for length in lengths:
        generator = torch.Generator().manual_seed(length)
        ids = torch.randint(3, model.config.vocab_size, (rows, length), generator=generator).to(device)
        times: dict[str, list[float]] = {"dense": [], "mod": []}
        for turn in range(repeats + 1):  # the first one warms up
            for name in times:
                took = _first_token(model, ids, off=name == "dense")
                if turn:
                    times[name].append(took)
        row: dict[str, Any] = {"case": "prompt", "context": length, "batch": rows}
        row |= {"leave_after": leave_after, "rounds": repeats}
        for name, values in times.items():
            row |= {f"{name}_ms": statistics.median(values), f"{name}_fastest_ms": min(values)}
        row["speedup"] = row["dense_ms"] / row["mod_ms"]
        found.append(row)
    return found


def _first_token(model: Any, ids: torch.Tensor, off: bool) -> float:
    """Milliseconds of `generate` with one new token."""
    import contextlib

    block = modlab.routing_off(model) if off else contextlib.nullcontext()
    _wait(ids)
    began = time.perf_counter()
    with block:
        model.generate(ids, max_new_tokens=1, do_sample=False, pad_token_id=0)
    _wait(ids)
    return (time.perf_counter() - began) * 1e3


def _wait(ids: torch.Tensor) -> None:
    if ids.is_cuda:
        torch.cuda.synchronize()
