"""Time of a prompt and of tokens after it, dense, with a routed cache, leaving, and both.

Through the user's own `generate`, in turns on the same weights.
"""

from __future__ import annotations

import contextlib
import copy
import statistics
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

import modlab
from benchmarks.depth.start import start
from benchmarks.real_models.texts import Data
from modlab.bench.ideal import ideal_prefill
from modlab.bench.speed_kv import HIDDEN, head_shares, table_of
from modlab.measure import time_generate
from modlab.routing.state import routing_override
from modlab.routing.table import RoutingTable

FITTED, FITTED_LENGTH = 16, 1024
"""Rows of the stream, evenly spread, that projections are fitted to, and their tokens."""


@dataclass(frozen=True)
class Real:
    """Trained routers, and the text that they decide about.

    Attributes:
        routers: of K/V, a folder or the name of some that ship.
        saving: aimed at.
        data: whose texts prompts are taken from, and whose stream projections are fitted to.
        text: which of them.
    """

    routers: str
    saving: float
    data: Data
    text: str = "wikitext"


def time_prompts(
    model: Any,
    lengths: list[int],
    repeats: int,
    leave_after: float = 2 / 3,
    rows: int = 1,
    keep_ratio: float = 0.25,
    decode: int = 0,
    real: Real | None = None,
) -> list[dict[str, Any]]:
    """A row for each length and skip ("kv", "prompt", "kv+prompt"): milliseconds from call to first token and
    of each later token, all models in fast generation, and the dense one without it too; the faster of those
    two counts, each time by itself.

    Without `real`, prompts are random tokens, projections those of conversion, which take the time of
    trained ones, and which keys stay is drawn by KV head, `keep_ratio` on the mean. With it the routers
    decide, and projections are fitted in closed form.

    Args:
        model: dense; its twins share its weights, and it is left as it was.
        repeats: of which medians are taken, after one that warms up.
        decode: tokens after the first.
    """
    found = []
    with prompt_calls(model, leave_after, rows, keep_ratio, decode, real) as calls_of:
        for length in lengths:
            calls = calls_of(length)
            times = _in_turns(calls, repeats)
            asked = {
                "context": length, "batch": rows, "leave_after": leave_after, "new_tokens": decode + 1,
                **_decided_by(keep_ratio, real),
            }  # fmt: skip
            found += [asked | _row(model, calls[name].args[0], name, times, asked) for name in SKIPS]
    return found


def time_pair(dense: Any, model: Any, rows: np.ndarray, decode: int, repeats: int = 3) -> dict[str, Any]:
    """Milliseconds to the first token, and of each later one, of the dense model and of another, both in fast
    generation where that takes them, in turns; medians, after a turn that warms up.

    Args:
        rows: ids [B, T], of which the first is the prompt.
        decode: tokens after the first.
    """
    ids = torch.from_numpy(rows[:1].astype(np.int64)).to(next(model.parameters()).device)
    for one in (dense, model):
        modlab.enable_fast_generation(one, check=False)
    try:
        calls = {name: partial(_times, one, ids, decode) for name, one in (("dense", dense), ("mod", model))}
        first, later = _medians(_in_turns(calls, repeats))
        fast = [modlab.fast_generation_report(one)["last"]["fast"] for one in (dense, model)]
    finally:
        for one in (dense, model):
            modlab.disable_fast_generation(one)
    return {
        "context": ids.shape[1], "batch": 1, "new_tokens": decode + 1, "rounds": repeats,
        "dense_fast": fast[0], "fast": fast[1],
        "dense_ms": first["dense"], "mod_ms": first["mod"],
        "dense_token_ms": later["dense"], "mod_token_ms": later["mod"],
        "speedup": first["dense"] / first["mod"], "token_speedup": later["dense"] / later["mod"],
    }  # fmt: skip


SKIPS = ("kv", "prompt", "kv+prompt")
"""Of the twins that are timed."""

Times = tuple[float, float]
"""Milliseconds to the first token, and of each later one; nan without these."""


def _in_turns(calls: Mapping[str, Callable[[], Times]], repeats: int) -> dict[str, list[Times]]:
    """What each call took, all of them in each turn, after a turn that warms up."""
    turns = [{name: call() for name, call in calls.items()} for _ in range(repeats + 1)]
    return {name: [turn[name] for turn in turns[1:]] for name in calls}


def _medians(times: dict[str, list[Times]]) -> tuple[dict[str, float], dict[str, float]]:
    """Of each call, to the first token and of each later one."""
    first, later = (
        {name: statistics.median(took[which] for took in values) for name, values in times.items()}
        for which in (0, 1)
    )
    return first, later


@contextlib.contextmanager
def prompt_calls(
    model: Any,
    leave_after: float,
    rows: int = 1,
    keep_ratio: float = 0.25,
    decode: int = 0,
    real: Real | None = None,
) -> Iterator[Callable[[int], dict[str, partial[Times]]]]:
    """Inside this block: for prompts of a length, calls of the dense model in fast generation ("dense") and
    not ("without"), and of its twins; each says its times. Arguments as of `time_prompts`."""
    routed: dict[str, Any] = {"gates": "kv_head", "layers": "all", "router_hidden": HIDDEN}
    leaves = {"leave_after": leave_after}
    fields = {"kv": routed, "prompt": leaves, "kv+prompt": routed | leaves}
    twins = {name: _twin(model, modlab.MoDConfig(skip=name, **fields[name])) for name in SKIPS}
    if real is not None:
        for name, twin in twins.items():
            _train(twin, name, real)
    plain = copy.deepcopy(model, {id(p): p for p in model.parameters()})

    def calls_of(length: int) -> dict[str, partial[Times]]:
        ids = _prompt(model, rows, length, real)
        calls = {"dense": partial(_times, model, ids, decode), "without": partial(_times, plain, ids, decode)}
        for name, twin in twins.items():
            drawn = real is None and name != "prompt"
            table = _table(twin, keep_ratio, length + decode) if drawn else None
            calls[name] = partial(_times, twin, ids, decode, table)
        return calls

    try:
        for fast in (model, *twins.values()):
            modlab.enable_fast_generation(fast, check=False)
        yield calls_of
    finally:
        modlab.disable_fast_generation(model)


def _decided_by(keep_ratio: float, real: Real | None) -> dict[str, Any]:
    """What decided which keys stay."""
    if real is None:
        return {"routing": "drawn", "keep_ratio": keep_ratio}
    name = Path(real.routers).name
    return {"routing": "trained", "routers": name, "saving_asked": real.saving, "text": real.text}


def _row(
    dense: Any, twin: Any, skip: str, times: dict[str, list[Times]], asked: dict[str, Any]
) -> dict[str, Any]:
    first, later = _medians(times)
    by = min(("dense", "without"), key=first.__getitem__)
    last, whole = (modlab.fast_generation_report(one)["last"] for one in (twin, dense))
    row: dict[str, Any] = {
        "case": "prompt", "skip": skip, "rounds": len(times["dense"]), "fast": last["fast"],
        "kv_bytes": last.get("kv_bytes"), "dense_kv_bytes": whole.get("kv_bytes"),
    }  # fmt: skip
    stored = 1.0
    if row["kv_bytes"] and row["dense_kv_bytes"]:
        stored = row["kv_bytes"] / row["dense_kv_bytes"]
        row["ratio"] = 1 / stored
    keep = 1.0 if skip == "prompt" else asked.get("keep_ratio", _kept(twin, stored, asked["context"]))
    row |= {
        "keep_ratio": keep,
        "dense_by": "the engine" if by == "dense" else "transformers",
        "dense_ms": first[by], "dense_fastest_ms": min(took[0] for took in times[by]),
        "mod_ms": first[skip], "mod_fastest_ms": min(took[0] for took in times[skip]),
        "speedup": first[by] / first[skip],
        "ideal": ideal_prefill(
            twin.config, [asked["context"]] * asked["batch"], dict.fromkeys(twin.mod.layers, keep),
            twin.mod.config,
        ),
    }  # fmt: skip
    if asked["new_tokens"] > 1:
        token = min(later["dense"], later["without"])
        row |= {
            "dense_token_ms": token, "mod_token_ms": later[skip], "token_speedup": token / later[skip],
        }  # fmt: skip
    return row


def _kept(twin: Any, stored: float, length: int) -> float:
    """Share of the tokens that gates keep on the mean, of the share of a cache that is stored."""
    recent = min(1.0, twin.mod.config.recent_stored / length)
    return min(1.0, max(0.0, (stored - recent) / (1 - recent))) if recent < 1 else 1.0


def _train(twin: Any, skip: str, real: Real) -> None:
    """The routers, and the projections in closed form."""
    if skip != "prompt":
        start(twin, real.routers, real.saving)
    if skip != "kv":
        apart = len(real.data.stream) // FITTED
        rows = np.stack([real.data.stream[i * apart :][: min(FITTED_LENGTH, apart)] for i in range(FITTED)])
        modlab.fit_projections(twin, torch.from_numpy(rows.astype(np.int64)))


def _twin(model: Any, config: modlab.MoDConfig) -> Any:
    return modlab.convert(copy.deepcopy(model, {id(p): p for p in model.parameters()}), config).eval()


def _prompt(model: Any, rows: int, length: int, real: Real | None) -> torch.Tensor:
    device = next(model.parameters()).device
    if real is None:
        generator = torch.Generator().manual_seed(length)
        return torch.randint(3, model.config.vocab_size, (rows, length), generator=generator).to(device)
    ids = np.resize(real.data.texts[real.text].astype(np.int64), (rows, length))
    return torch.from_numpy(ids).to(device)


def _table(twin: Any, keep_ratio: float, length: int) -> RoutingTable:
    from modlab.bench.registry import Settings

    layers, heads = twin.mod.layers, max(twin.mod.gates.values())
    shares = head_shares(len(layers), heads, keep_ratio, seed=0)
    return table_of(layers, shares, length + 1, Settings(device=next(twin.parameters()).device))


def _times(model: Any, ids: torch.Tensor, decode: int, table: RoutingTable | None = None) -> Times:
    with contextlib.nullcontext() if table is None else routing_override(model, table):
        return time_generate(model, ids, decode)
