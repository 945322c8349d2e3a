"""Case `speed_kv`: K/V routing at the speed that its bytes allow, a gate a layer and one a KV head.

Random weights, random keys: in each layer every head keeps the same share, or heads keep what trained gates
keep, about a seventh of them everything and the others a few of a hundred tokens. What this measures is the
engine; what routing costs in quality is measured elsewhere (docs/results.md).

Shape letters: B rows, P positions of a routing table, L layers, G kv heads.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from modlab.bench.clock import Times
from modlab.bench.fast import Variant, Workload, fast_twins
from modlab.bench.ideal import ideal_decode, kv_token_bytes, step_bytes
from modlab.bench.limits import need_gpu, step_times_of
from modlab.bench.models import converted_twin, dense_model, depth, routed_layers
from modlab.bench.registry import Row, Settings, case
from modlab.bench.rows import make_row
from modlab.engine import fast_generation_report
from modlab.routing.state import routing_override
from modlab.routing.table import RoutingTable

HIDDEN = 16
"""Hidden units of the routers."""

LEAST_SHARE = 0.4
"""What a head that does not keep everything keeps on the mean, over what all keep on the mean: of 0.25 it is
0.10, from 0.05 to 0.15 by head, and a sixth of the heads keep everything."""

SKIP_LAYERS = "skipped layers"
FEWER = 0.94
"""Share of a batch that did not fit that is tried next."""

SPARE = 3 * 2**30
"""Bytes left free at the largest batch: what a step and the choice of tokens compute."""


@dataclass(frozen=True)
class Sizes:
    """Prompts of the case, in tokens; `new` is what each `generate` adds."""

    short: int = 4096
    long: int = 32768
    longest: int = 131072
    unequal: tuple[int, ...] = (1024, 2048, 3072, 4096, 5120, 6144, 7168, 8192)
    new: int = 65
    rows: int = 8
    steps: int = 40


def head_shares(layers: int, kv_heads: int, ratio: float, seed: int) -> Tensor:
    """What each head keeps, fp64 [L, G]: about a sixth of them everything, the others from 0.2 to 0.6 times
    `ratio`; the mean is `ratio`."""
    generator = torch.Generator().manual_seed(seed)
    heads = layers * kv_heads
    whole = round((ratio - LEAST_SHARE * ratio) / (1 - LEAST_SHARE * ratio) * heads)
    shares = (torch.rand(heads, generator=generator, dtype=torch.float64) + 0.5) * LEAST_SHARE * ratio
    if whole < heads:
        shares *= (ratio * heads - whole) / shares[whole:].sum()
    shares[:whole] = 1.0
    return shares[torch.randperm(heads, generator=generator)].view(layers, kv_heads).clamp_max(1.0)


class KeptWorkload(Workload):
    """A workload whose twins are named by granularity: "layer", "kv_head" (or `SKIP_LAYERS`)."""

    def routing(self, variant: Variant) -> RoutingTable:
        """Tokens kept at random: the variant's share in each layer, or `head_shares`."""
        if variant.routed == SKIP_LAYERS:
            return super().routing(variant)
        config, settings = self.dense.config, self.settings
        layers = self.twins[variant.routed].mod.layers
        shares = torch.full((len(layers), 1), variant.ratio)
        if variant.routed == "kv_head":
            shares = head_shares(len(layers), config.num_key_value_heads, variant.ratio, settings.seed)
        return table_of(layers, shares, max(self.lengths) + self.tokens, settings)

    def fields(self, variant: Variant, name: str, skip_name: str | None = None) -> dict[str, Any]:
        if variant.routed == SKIP_LAYERS:
            skip_name = "layer"
        fields = super().fields(variant, name, skip_name)
        return fields | granularity_of(variant.routed, fields["num_layers"], fields["routed_layers"])


def granularity_of(name: str, num_layers: int, routed: int) -> dict[str, Any]:
    """What a row says of who decides."""
    return {
        "routed": "all" if routed == num_layers else "alternate",
        "granularity": "layer" if name == SKIP_LAYERS else name,
    }


def table_of(layers: Sequence[int], shares_LA: Tensor, positions: int, settings: Settings) -> RoutingTable:
    """Each position kept with its gate's chance, the same in all rows: [1, P], or [1, P, A] of A gates."""
    generator = torch.Generator(settings.device).manual_seed(settings.seed)
    masks = {}
    for layer, shares_A in zip(layers, shares_LA.to(settings.device), strict=True):
        drawn_PA = torch.rand(positions, len(shares_A), generator=generator, device=settings.device)
        mask = (drawn_PA < shares_A)[None]
        masks[layer] = mask[..., 0] if len(shares_A) == 1 else mask
    return RoutingTable(masks)


def twins_by_gates(settings: Settings, dense: Any, skip: str) -> dict[str, Any]:
    """Of a skip that routes the cache: a twin for each granularity, all layers routed."""
    every = routed_layers("all", depth(settings))
    return {
        gates: converted_twin(dense, every, skip, gates=gates, router_hidden=HIDDEN)
        for gates in ("layer", "kv_head")
    }


@contextlib.contextmanager
def kept_models(settings: Settings, context: int) -> Iterator[tuple[Any, dict[str, Any]]]:
    """The dense model; a twin for each granularity, all layers routed; one that skips every other layer."""
    dense = dense_model(settings, context)
    twins = twins_by_gates(settings, dense, "kv")
    twins[SKIP_LAYERS] = converted_twin(dense, routed_layers("alternate", depth(settings)), "layer")
    with fast_twins(settings, dense, twins):
        yield dense, twins


def both(ratio: float) -> list[Variant]:
    """A variant for each granularity."""
    return [Variant("layer", ratio), Variant("kv_head", ratio)]


def generate_rows(settings: Settings, dense: Any, twins: dict[str, Any], sizes: Sizes) -> Iterator[Row]:
    """Prompts through `generate`: short, long, unequal; a quarter kept, an eighth, all gates open."""

    def work(lengths: Sequence[int]) -> KeptWorkload:
        return KeptWorkload(settings, dense, twins, lengths, sizes.new)

    yield from work([sizes.long]).rows([*both(0.25), *both(0.125), *both(1.0)], settings.repeats)
    yield from work([sizes.short]).rows(
        [*both(0.25), *both(1.0), Variant(SKIP_LAYERS, 0.10)], settings.repeats
    )
    yield from work(sizes.unequal).rows(both(0.25), settings.repeats)


def longest_rows(settings: Settings, dense: Any, twins: dict[str, Any], sizes: Sizes) -> Iterator[Row]:
    """The longest prompt, once each, with the peak of memory above the weights."""
    workload = KeptWorkload(settings, dense, twins, [sizes.longest], 2)
    variants = [*both(0.25), *both(0.125)]
    for row in workload.rows(variants, 1, whole_warm_up=False):
        if row["case"] == "prefill":
            yield row
    for model, variant in ((dense, None), *((twins[v.routed], v) for v in both(0.25))):
        peak, ms = _peak(workload, model, variant)
        if variant is None:
            dense_peak, dense_ms = peak, ms
            continue
        fields = workload.fields(variant, "prefill") | {"case": "peak"}
        yield make_row(
            Times([dense_ms]), Times([ms]), **fields, dense_peak_bytes=dense_peak, mod_peak_bytes=peak,
            peak_saving=round(dense_peak / peak, 3),
        )  # fmt: skip


def _peak(workload: KeptWorkload, model: Any, variant: Variant | None) -> tuple[int, float]:
    """Peak bytes of a prefill above what was allocated before, and its ms; both by the engine."""
    override = (
        contextlib.nullcontext() if variant is None else routing_override(model, workload.routing(variant))
    )
    with override:
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        first, _ = workload.timed(model, workload.ids_BT, workload.mask_BT)
        return torch.cuda.max_memory_allocated() - before, first


def stored_lengths(shares_LA: Tensor, batch: int, context: int, recent: int) -> list[list[int]]:
    """Tokens of each unit of each layer after `context` tokens."""
    older = (shares_LA * max(context - recent, 0)).round().long() + min(context, recent)
    return older.repeat(1, batch).tolist()


def decode_rows(
    settings: Settings, dense: Any, twins: dict[str, Any], context: int, batch: int, ratio: float, steps: int
) -> Iterator[Row]:
    """A decoding step at a context whose prompt is left out: caches of random keys, as long as it leaves."""
    config, token = dense.config, kv_token_bytes(dense.config, settings.dtype.itemsize)
    L, G = config.num_hidden_layers, config.num_key_value_heads
    engines = {name: model.__dict__["mod_engine"] for name, model in (("", dense), *twins.items())}
    dense_times, _ = step_times_of(engines[""], batch, context, [[context] * batch] * L, None, 1.0, steps)
    for name in ("layer", "kv_head"):
        mod = twins[name].mod
        shares = torch.full((L, 1), ratio) if name == "layer" else head_shares(L, G, ratio, settings.seed)
        table = table_of(mod.layers, shares, context + steps, settings)
        lengths = stored_lengths(shares, batch, context, mod.config.keep_recent)
        times, allocated = step_times_of(engines[name], batch, context, lengths, table, ratio, steps)
        kept = sum(map(sum, lengths)) * token / (1 if name == "layer" else G)
        ideal = ideal_decode(
            config, [context] * batch, dict.fromkeys(mod.layers, ratio), settings.dtype.itemsize, mod.config
        )
        yield make_row(
            dense_times, times, case="decode", shape=settings.shape, context=context, batch=batch,
            routed_layers=len(mod.layers), num_layers=L, skip="kv", keep_ratio=ratio, ideal=ideal,
            kv_bytes=allocated, kept_kv_bytes=round(kept), dense_kv_bytes=L * batch * context * token,
            prompt="synthetic keys and values", **granularity_of(name, L, len(mod.layers)),
        )  # fmt: skip


def throughput_rows(settings: Settings, dense: Any, twins: dict[str, Any], sizes: Sizes) -> Iterator[Row]:
    """ms a further token at the largest batch of long prompts that `generate` can prefill and decode."""
    variant, twin = Variant("kv_head", 0.25), twins["kv_head"]
    dense_batch, dense_first, dense_each, _ = _at_largest_batch(settings, dense, twins, sizes, None)
    batch, first, each, workload = _at_largest_batch(settings, dense, twins, sizes, variant)

    def bytes_a_row(rows: int, kept: dict[int, float]) -> float:
        lengths = [sizes.long] * rows
        return step_bytes(dense.config, lengths, kept, settings.dtype.itemsize, settings.mod) / rows

    kept = dict.fromkeys(twin.mod.layers, variant.ratio)
    fields = workload.fields(variant, "decode") | {"case": "throughput"}
    fields["ideal"] = bytes_a_row(dense_batch, {}) / bytes_a_row(batch, kept)
    yield make_row(
        Times([dense_each]), Times([each]), **fields, dense_batch=dense_batch,
        dense_tokens_per_s=round(1e3 / dense_each, 1), mod_tokens_per_s=round(1e3 / each, 1),
        dense_prefill_ms_a_row=round(dense_first, 1), mod_prefill_ms_a_row=round(first, 1),
    )  # fmt: skip


def _at_largest_batch(
    settings: Settings, dense: Any, twins: dict[str, Any], sizes: Sizes, variant: Variant | None
) -> tuple[int, float, float, KeptWorkload]:
    """Rows, and of each the ms of its prefill and of a further token."""
    model = dense if variant is None else twins[variant.routed]
    few = KeptWorkload(settings, dense, twins, [sizes.long] * 2, 2)
    override = contextlib.nullcontext() if variant is None else routing_override(model, few.routing(variant))
    with override:
        batch = largest_batch(few, model)
        timed = None
        while timed is None:
            workload = KeptWorkload(settings, dense, twins, [sizes.long] * batch, sizes.new)
            timed = _timed_if_it_fits(workload, model)
            if timed is None:
                batch = math.floor(FEWER * batch)
        first, each = timed
    workload.last = {variant: fast_generation_report(model)["last"]}
    model.__dict__["mod_engine"].steps.clear()
    torch.cuda.empty_cache()
    return batch, first / batch, each / batch, workload


def _timed_if_it_fits(workload: KeptWorkload, model: Any) -> tuple[float, float] | None:
    """ms of the prefill and of a further token; None where memory did not do for it."""
    try:
        return workload.timed(model, workload.ids_BT, workload.mask_BT)
    except torch.OutOfMemoryError:
        if len(workload.lengths) == 1:
            raise
    model.__dict__["mod_engine"].steps.clear()
    gc.collect()  # frames of the error hold tensors
    torch.cuda.empty_cache()
    return None


def largest_batch(few: KeptWorkload, model: Any) -> int:
    """Rows of which prefill and decoding fit: what one line of them takes, and what each leaves in the cache.

    Lines run one after another, and one layer of all rows is held twice while they are joined. What is lost
    between the allocator's blocks is not counted: the batch may turn out too large.
    """
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    few.timed(model, few.ids_BT, few.mask_BT)
    peak = torch.cuda.max_memory_allocated() - before
    model.__dict__["mod_engine"].steps.clear()
    torch.cuda.empty_cache()
    a_row = model.__dict__["mod_engine"].last["kv_bytes"] / len(few.lengths)
    line = max(peak - a_row * len(few.lengths), 0)
    layers = few.dense.config.num_hidden_layers
    return max(1, math.floor((torch.cuda.mem_get_info()[0] - line - SPARE) / (a_row * (1 + 1 / layers))))


@case
def speed_kv(settings: Settings) -> Iterator[Row]:
    """K/V routing on one GPU, by layer and by head: prompts to 128k, decoding, memory, largest batch."""
    need_gpu(settings, "speed_kv")
    settings, sizes = dataclasses.replace(settings, skip="kv"), Sizes()
    with kept_models(settings, sizes.longest + 64) as (dense, twins):
        yield from generate_rows(settings, dense, twins, sizes)
        for context, batch in ((sizes.long, 1), (sizes.long, sizes.rows), (sizes.longest, 1)):
            for ratio in (0.25, 0.125):
                yield from decode_rows(settings, dense, twins, context, batch, ratio, sizes.steps)
        yield from longest_rows(settings, dense, twins, sizes)
        yield from throughput_rows(settings, dense, twins, sizes)
        static = KeptWorkload(settings, dense, twins, [sizes.long], sizes.new)
        yield from static.static_rows(Variant("layer", 0.25), 1)
