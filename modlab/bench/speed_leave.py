"""Case `speed_leave`: prompts that leave the model after two thirds of it, alone and with K/V routing.

Random weights and forced routing as in `speed_kv`; projections as conversion makes them, which take the time
of trained ones. Every model runs by the engine; rows `baseline` hold its dense prefill against transformers'
own, so that a speed-up can be held against the faster.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

from modlab.bench.fast import Variant, fast_twins
from modlab.bench.limits import need_gpu
from modlab.bench.models import converted_twin, dense_model
from modlab.bench.registry import Row, Settings, case
from modlab.bench.speed_kv import KeptWorkload, Sizes, both, twins_by_gates
from modlab.errors import ModlabError
from modlab.routing.table import RoutingTable

LEAVES = "prompt"
"""The twin whose prompt tokens leave and whose cache holds everything."""


class LeavingWorkload(KeptWorkload):
    """A workload whose twins are named by what decides about the cache: "layer", "kv_head", or `LEAVES`."""

    def routing(self, variant: Variant) -> RoutingTable | None:  # type: ignore[override]
        """Tokens kept at random; where the position decides there is nothing to force."""
        return None if variant.routed == LEAVES else super().routing(variant)

    def fields(self, variant: Variant, name: str, skip_name: str | None = None) -> dict[str, Any]:
        if variant.routed != LEAVES:
            return super().fields(variant, name, skip_name)
        return super().fields(variant, name, "prompt") | {"routed": "upper", "granularity": "none"}


@contextlib.contextmanager
def leaving_models(settings: Settings, context: int) -> Iterator[tuple[Any, dict[str, Any]]]:
    """The dense model; a twin that leaves for each granularity of K/V routing, and one without any."""
    dense = dense_model(settings, context)
    twins = twins_by_gates(settings, dense, "kv+prompt")
    twins[LEAVES] = converted_twin(dense, "inner", "prompt")
    with fast_twins(settings, dense, twins):
        yield dense, twins


def leaving_rows(settings: Settings, dense: Any, twins: dict[str, Any], sizes: Sizes) -> Iterator[Row]:
    """Prompts through `generate`: long, unequal, the longest; a quarter kept and an eighth. Where contexts
    other than the default are set, only the prompts as long as one of them."""
    chosen = {sizes.long, max(sizes.unequal), sizes.longest}
    if tuple(settings.contexts) != Settings.contexts:
        chosen &= set(settings.contexts)
    settings = dataclasses.replace(settings, skip="kv+prompt")
    alone = Variant(LEAVES, 1.0)
    long = LeavingWorkload(settings, dense, twins, [sizes.long], sizes.new)
    if sizes.long in chosen:
        yield from long.rows([alone, *both(0.25), *both(0.125)], settings.repeats)
    if max(sizes.unequal) in chosen:
        unequal = LeavingWorkload(settings, dense, twins, sizes.unequal, sizes.new)
        yield from unequal.rows([alone, *both(0.25)], settings.repeats)
    if sizes.long in chosen:
        yield from long.static_rows(Variant("layer", 0.25), 1)
    if sizes.longest in chosen:
        workload = LeavingWorkload(settings, dense, twins, [sizes.longest], 2)
        rows = workload.rows([alone, *both(0.25)], 1, whole_warm_up=False)
        yield from (row for row in rows if row["case"] == "prefill")


@case
def speed_leave(settings: Settings) -> Iterator[Row]:
    """Prompts that leave after two thirds of the model, K/V routed or not, on one GPU: 32k, 8 rows, 128k.

    `--context 131072` measures that one alone.
    """
    need_gpu(settings, "speed_leave")
    sizes = Sizes()
    known = (sizes.long, max(sizes.unequal), sizes.longest)
    if tuple(settings.contexts) != Settings.contexts and not set(settings.contexts) <= set(known):
        raise ModlabError(f"--context {list(settings.contexts)}: speed_leave has prompts of {known} tokens.")
    with leaving_models(settings, sizes.longest + 64) as (dense, twins):
        yield from leaving_rows(settings, dense, twins, sizes)
