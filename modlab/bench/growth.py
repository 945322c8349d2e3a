"""Case `growth`: how the times grow with context, batch and keep ratio, and what a token costs a layer.

Decoding steps are timed on the GPU with caches of random keys (`limits.step_times`), so that a context of
131,072 tokens need not be prefilled for each point.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from modlab.bench.fast import Variant, Workload, fast_models
from modlab.bench.ideal import ideal_decode, kv_token_bytes, step_bytes
from modlab.bench.limits import need_gpu, step_times
from modlab.bench.registry import Row, Settings, case
from modlab.bench.rows import make_row

RATIOS = (0.05, 0.10, 0.25, 0.50, 1.00)
STEPS = 20


@dataclass(frozen=True)
class Sizes:
    """Of the case. `fit` is the context whose rows tell what a token costs, and the last one whose prompts
    are run at all keep ratios."""

    contexts: tuple[int, ...] = (4096, 8192, 16384, 32768, 65536, 131072)
    batches: tuple[int, ...] = (4, 16, 32)
    batch_context: int = 8192
    fit: int = 32768


def decode_rows(
    settings: Settings, dense: Any, twin: Any, routed: str, context: int, batch: int, ratios: Sequence[float]
) -> Iterator[Row]:
    """One row a ratio: ms of a decoding step at one context and batch."""
    config, size = dense.config, settings.dtype.itemsize
    layers = list(twin.mod.layers)
    engines = [model.__dict__["mod_engine"] for model in (dense, twin)]
    dense_times, _ = step_times(engines[0], batch, context, [], 1.0, settings.seed, STEPS)
    for ratio in ratios:
        times, allocated = step_times(engines[1], batch, context, layers, ratio, settings.seed, STEPS)
        lengths = [context] * batch
        ideal = ideal_decode(config, lengths, dict.fromkeys(layers, ratio), size, settings.mod)
        yield make_row(
            dense_times, times, case="decode", shape=settings.shape, context=context, batch=batch,
            routed=routed, routed_layers=len(layers), num_layers=config.num_hidden_layers, keep_ratio=ratio,
            skip=settings.skip, ideal=ideal, kv_bytes=allocated, prompt="synthetic keys and values",
            dense_kv_bytes=config.num_hidden_layers * batch * context * kv_token_bytes(config, size),
        )  # fmt: skip


def token_costs(rows: Sequence[Row], tokens: int, head: float = 0.0) -> dict[str, float]:
    """Least squares over rows that differ in keep ratio only: microseconds that one routed layer spends on a
    kept and on a skipped token.

    Args:
        rows: of one case, context and batch.
        tokens: tokens that each layer is offered: those of the prompt, or of one step.
        head: share of the dense time that belongs to no layer (the output head's share of the bytes).
    """
    layers, depth = rows[0]["routed_layers"], rows[0]["num_layers"]
    # what the unrouted layers and the head take: the dense time less the routed layers' part of it
    fixed = rows[0]["dense_ms"] * (1 - (1 - head) * layers / depth)
    matrix = np.array([[layers * r["keep_ratio"], layers * (1 - r["keep_ratio"])] for r in rows]) * tokens
    target = np.array([r["mod_ms"] - fixed for r in rows]) * 1e3
    (kept, skipped), *_ = np.linalg.lstsq(matrix, target, rcond=None)
    return {"kept_us": round(float(kept), 4), "skipped_us": round(float(skipped), 4)}


def head_share(config: Any, context: int) -> float:
    """Share of a decoding step's bytes that the output head reads."""
    head = config.vocab_size * config.hidden_size
    return head / step_bytes(config, [context], {}, 1)


def by_context(settings: Settings, dense: Any, twins: dict[str, Any], sizes: Sizes) -> Iterator[Row]:
    """A decoding step of one row."""
    routed = settings.routed
    for context in sizes.contexts:
        rows = list(decode_rows(settings, dense, twins[routed], routed, context, 1, RATIOS))
        costs = token_costs(rows, 1, head_share(dense.config, context)) if context == sizes.fit else {}
        yield from (row | costs for row in rows)


def by_prompt(settings: Settings, dense: Any, twins: dict[str, Any], sizes: Sizes) -> Iterator[Row]:
    """Prompts of one row; of the longest ones two keep ratios, once."""
    for context in sizes.contexts:
        few = context > sizes.fit
        variants = [Variant(settings.routed, r) for r in ((0.10, 0.50) if few else RATIOS)]
        workload = Workload(settings, dense, twins, [context], 2)
        found = workload.rows(variants, 1 if few else settings.repeats, whole_warm_up=not few)
        rows = [row for row in found if row["case"] == "prefill"]
        costs = token_costs(rows, context) if context == sizes.fit else {}
        yield from (row | costs for row in rows)


def by_batch(settings: Settings, dense: Any, twins: dict[str, Any], sizes: Sizes) -> Iterator[Row]:
    """A decoding step of several rows."""
    twin = twins[settings.routed]
    for batch in sizes.batches:
        yield from decode_rows(
            settings, dense, twin, settings.routed, sizes.batch_context, batch, (0.10, 0.50)
        )
        for model in (dense, twin):
            model.__dict__["mod_engine"].steps.pop(batch)


PARTS: dict[str, Callable[[Settings, Any, dict[str, Any], Sizes], Iterator[Row]]] = {
    "decode": by_context,
    "prefill": by_prompt,
    "batch": by_batch,
}


@case
def growth(settings: Settings) -> Iterator[Row]:
    """How times grow with context, batch and keep ratio; the cost of a kept and of a skipped token."""
    need_gpu(settings, "growth")
    sizes = Sizes()
    with fast_models(settings, max(sizes.contexts) + 64, [settings.routed]) as (dense, twins):
        for name in settings.only or PARTS:
            yield from PARTS[name](settings, dense, twins, sizes)


growth.parts = tuple(PARTS)  # type: ignore[attr-defined]
