"""Time of a prompt through the user's own `generate`, dense and leaving, in turns on the same weights."""

from __future__ import annotations

import contextlib
import copy
import statistics
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

import modlab
from modlab.bench.ideal import ideal_prefill
from modlab.bench.speed_kv import HIDDEN, head_shares, table_of
from modlab.measure import time_generate
from modlab.routing.state import routing_override
from modlab.routing.table import RoutingTable


def time_prompts(
    model: Any,
    lengths: list[int],
    repeats: int,
    leave_after: float = 2 / 3,
    rows: int = 1,
    keep_ratio: float = 0.25,
) -> list[dict[str, Any]]:
    """A row for each length and skip ("prompt", "kv+prompt"): milliseconds from call to first token, all
    models in fast generation, and the dense one without it too; the faster of those two counts.

    Projections are those of conversion, which take the time of trained ones; which keys stay is drawn by KV
    head, `keep_ratio` on the mean.

    Args:
        model: dense; its twins share its weights, and it is left as it was.
        repeats: of which medians are taken, after one that warms up.
    """
    found = []
    with prompt_calls(model, leave_after, rows, keep_ratio) as calls_of:
        for length in lengths:
            calls = calls_of(length)
            times: dict[str, list[float]] = {name: [] for name in calls}
            for turn in range(repeats + 1):
                for name, call in calls.items():
                    took = call()
                    if turn:
                        times[name].append(took)
            for name in ("prompt", "kv+prompt"):
                twin = calls[name].args[0]
                found.append(_row(twin, name, times, length, rows, leave_after, keep_ratio))
    return found


@contextlib.contextmanager
def prompt_calls(
    model: Any, leave_after: float, rows: int = 1, keep_ratio: float = 0.25
) -> Iterator[Callable[[int], dict[str, partial[float]]]]:
    """Inside this block: for prompts of a length, calls of the dense model in fast generation ("dense") and
    not ("without"), and of its twins; each takes a prompt to its first token and says the milliseconds."""
    fields: dict[str, Any] = {"skip": "prompt", "leave_after": leave_after}
    routed = {**fields, "skip": "kv+prompt", "gates": "kv_head", "layers": "all", "router_hidden": HIDDEN}
    twins = {
        name: _twin(model, modlab.MoDConfig(**one))
        for name, one in (("prompt", fields), ("kv+prompt", routed))
    }
    plain = copy.deepcopy(model, {id(p): p for p in model.parameters()})

    def calls_of(length: int) -> dict[str, partial[float]]:
        ids = _prompt(model, rows, length)
        table = _table(twins["kv+prompt"], keep_ratio, length)
        return {
            "dense": partial(_first_token, model, ids),
            "without": partial(_first_token, plain, ids),
            "prompt": partial(_first_token, twins["prompt"], ids),
            "kv+prompt": partial(_first_token, twins["kv+prompt"], ids, table),
        }

    try:
        for fast in (model, *twins.values()):
            modlab.enable_fast_generation(fast, check=False)
        yield calls_of
    finally:
        modlab.disable_fast_generation(model)


def _row(
    twin: Any,
    skip: str,
    times: dict[str, list[float]],
    length: int,
    rows: int,
    leave_after: float,
    keep_ratio: float,
) -> dict[str, Any]:
    medians = {name: statistics.median(values) for name, values in times.items()}
    dense = min(("dense", "without"), key=medians.__getitem__)
    kept = dict.fromkeys(twin.mod.layers, keep_ratio if skip == "kv+prompt" else 1.0)
    last = modlab.fast_generation_report(twin)["last"]
    return {
        "case": "prompt",
        "skip": skip,
        "context": length,
        "batch": rows,
        "leave_after": leave_after,
        "keep_ratio": keep_ratio if skip == "kv+prompt" else 1.0,
        "rounds": len(times["dense"]),
        "dense_by": "the engine" if dense == "dense" else "transformers",
        "dense_ms": medians[dense],
        "dense_fastest_ms": min(times[dense]),
        "mod_ms": medians[skip],
        "mod_fastest_ms": min(times[skip]),
        "speedup": medians[dense] / medians[skip],
        "ideal": ideal_prefill(twin.config, [length] * rows, kept, twin.mod.config),
        "fast": last["fast"],
        "kv_bytes": last.get("kv_bytes"),
    }


def _twin(model: Any, config: modlab.MoDConfig) -> Any:
    return modlab.convert(copy.deepcopy(model, {id(p): p for p in model.parameters()}), config).eval()


def _prompt(model: Any, rows: int, length: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(length)
    ids = torch.randint(3, model.config.vocab_size, (rows, length), generator=generator)
    return ids.to(next(model.parameters()).device)


def _table(twin: Any, keep_ratio: float, length: int) -> RoutingTable:
    from modlab.bench.registry import Settings

    layers, heads = twin.mod.layers, max(twin.mod.gates.values())
    shares = head_shares(len(layers), heads, keep_ratio, seed=0)
    return table_of(layers, shares, length + 1, Settings(device=next(twin.parameters()).device))


def _first_token(model: Any, ids: torch.Tensor, table: RoutingTable | None = None) -> float:
    """Milliseconds of `generate` to its first token."""
    with contextlib.nullcontext() if table is None else routing_override(model, table):
        return time_generate(model, ids, 0)[0]
