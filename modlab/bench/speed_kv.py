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
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from modlab.bench.clock import Times
from modlab.bench.fast import Variant, Workload, fast_twins
from modlab.bench.ideal import ideal_decode, kv_token_bytes, step_bytes
from modlab.bench.limits import milliseconds, need_gpu, step_times_of, synthetic_caches, timed_steps
from modlab.bench.models import converted_twin, dense_model, depth, routed_layers
from modlab.bench.registry import Row, Settings, case
from modlab.bench.rows import make_row
from modlab.cache.buffer import SegmentedBuffer
from modlab.cache.bytes import allocated_bytes
from modlab.engine.engine import Engine
from modlab.engine.guesses import Guesses
from modlab.engine.prefill import prefill
from modlab.routing.state import routing_override
from modlab.routing.table import RoutingTable

HIDDEN = 16
"""Hidden units of the routers."""

LEAST_SHARE = 0.4
"""What a head that does not keep everything keeps on the mean, over what all keep on the mean: of 0.25 it is
0.10, from 0.05 to 0.15 by head, and a sixth of the heads keep everything."""

SKIP_LAYERS = "skipped layers"
GUESSED = "skipped layers, on guesses"
"""The same where a layer does not ask how many tokens it keeps (`enable_fast_generation(guess=True)`)."""

WHOLE_LAYERS = (SKIP_LAYERS, GUESSED)
FEWER = 0.94
"""Share of a batch that did not fit that is tried next."""

LINE_ROWS = 2
"""Long prompts of which a line of a prefill consists (`LINE_TOKENS`)."""

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
    """A workload whose twins are named by granularity: "layer", "kv_head" (or `SKIP_LAYERS`, `GUESSED`)."""

    def routing(self, variant: Variant) -> RoutingTable:
        """Tokens kept at random: the variant's share in each layer, or `head_shares`."""
        if variant.routed in WHOLE_LAYERS:
            return super().routing(variant)
        config, settings = self.dense.config, self.settings
        layers = self.twins[variant.routed].mod.layers
        shares = torch.full((len(layers), 1), variant.ratio)
        if variant.routed == "kv_head":
            shares = head_shares(len(layers), config.num_key_value_heads, variant.ratio, settings.seed)
        return table_of(layers, shares, max(self.lengths) + self.tokens, settings)

    def fields(self, variant: Variant, name: str, skip_name: str | None = None) -> dict[str, Any]:
        if variant.routed in WHOLE_LAYERS:
            skip_name = "layer"
        fields = super().fields(variant, name, skip_name)
        if variant.routed == GUESSED:
            fields["guessed"] = True
        return fields | granularity_of(variant.routed, fields["num_layers"], fields["routed_layers"])

    def learn(self, variant: Variant) -> None:
        """Runs as many prompts as it takes until one would run on guesses."""
        model = self.twins[variant.routed]
        guesses = model.__dict__["mod_engine"].guesses
        with routing_override(model, self.routing(variant)):
            for _ in range(guesses.steady + 1):
                self.timed(model, self.ids_BT, self.mask_BT)


def granularity_of(name: str, num_layers: int, routed: int) -> dict[str, Any]:
    """What a row says of who decides."""
    return {
        "routed": "all" if routed == num_layers else "alternate",
        "granularity": "layer" if name in WHOLE_LAYERS else name,
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
    shared: dict[str, Any] = {"router_hidden": HIDDEN, "kv_cache_dtype": settings.kv_cache_dtype}
    kinds = ("layer", "kv_head")
    return {gates: converted_twin(dense, every, skip, gates=gates, **shared) for gates in kinds}


@contextlib.contextmanager
def kept_models(settings: Settings, context: int) -> Iterator[tuple[Any, dict[str, Any]]]:
    """The dense model; a twin for each granularity, all layers routed; two that skip every other layer."""
    dense = dense_model(settings, context)
    twins = twins_by_gates(settings, dense, "kv")
    for name in WHOLE_LAYERS:
        twins[name] = converted_twin(dense, routed_layers("alternate", depth(settings)), "layer")
    with fast_twins(settings, dense, twins):
        twins[GUESSED].__dict__["mod_engine"].guesses = Guesses()
        yield dense, twins


def both(ratio: float) -> list[Variant]:
    """A variant for each granularity."""
    return [Variant("layer", ratio), Variant("kv_head", ratio)]


def generate_rows(
    settings: Settings,
    dense: Any,
    twins: dict[str, Any],
    sizes: Sizes,
    which: Sequence[str] = ("long", "short", "unequal"),
) -> Iterator[Row]:
    """Prompts through `generate`: long, short, unequal; a quarter kept, an eighth, all gates open."""

    def rows(lengths: Sequence[int], variants: Sequence[Variant]) -> Iterator[Row]:
        workload = KeptWorkload(settings, dense, twins, lengths, sizes.new)
        for variant in variants:
            if variant.routed == GUESSED:
                workload.learn(variant)
        return workload.rows(variants, settings.repeats)

    if "long" in which:
        yield from rows([sizes.long], [*both(0.25), *both(0.125), *both(1.0)])
    if "short" in which:
        whole = [Variant(name, 0.10) for name in WHOLE_LAYERS]
        yield from rows([sizes.short], [*both(0.25), *both(1.0), *whole])
    if "unequal" in which:
        yield from rows(sizes.unequal, both(0.25))


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
        stored = kv_token_bytes(config, settings.dtype.itemsize, mod.config)
        kept = sum(map(sum, lengths)) * stored / (1 if name == "layer" else G)
        ideal = ideal_decode(
            config, [context] * batch, dict.fromkeys(mod.layers, ratio), settings.dtype.itemsize, mod.config
        )
        yield make_row(
            dense_times, times, case="decode", shape=settings.shape, context=context, batch=batch,
            routed_layers=len(mod.layers), num_layers=L, skip="kv", keep_ratio=ratio, ideal=ideal,
            kv_bytes=allocated, kept_kv_bytes=round(kept), dense_kv_bytes=L * batch * context * token,
            prompt="synthetic keys and values", kv_cache_dtype=settings.kv_cache_dtype,
            **granularity_of(name, L, len(mod.layers)),
        )  # fmt: skip


def throughput_rows(settings: Settings, dense: Any, twins: dict[str, Any], sizes: Sizes) -> Iterator[Row]:
    """ms a further token at the largest batch of long prompts whose prefill and decoding fit."""
    config, twin = dense.config, twins["kv_head"]
    shares = head_shares(depth(settings), config.num_key_value_heads, 0.25, settings.seed)
    table = table_of(twin.mod.layers, shares, sizes.long + sizes.steps, settings)
    lengths = stored_lengths(shares, 1, sizes.long, twin.mod.config.keep_recent)
    dense_found = largest_batch(LastLine(dense, [[sizes.long]] * len(shares), None, settings, sizes))
    found = largest_batch(LastLine(twin, lengths, table, settings, sizes))

    def bytes_a_row(rows: int, kept: dict[int, float]) -> float:
        stored = [sizes.long] * rows
        return step_bytes(config, stored, kept, settings.dtype.itemsize, settings.mod) / rows

    kept = dict.fromkeys(twin.mod.layers, 0.25)
    yield make_row(
        Times([dense_found.step_ms / dense_found.rows]), Times([found.step_ms / found.rows]),
        case="throughput", shape=settings.shape, context=sizes.long, batch=found.rows,
        routed_layers=len(kept), num_layers=len(shares), skip="kv", keep_ratio=0.25,
        ideal=bytes_a_row(dense_found.rows, {}) / bytes_a_row(found.rows, kept), kv_bytes=found.bytes,
        dense_kv_bytes=dense_found.bytes // dense_found.rows * found.rows, dense_batch=dense_found.rows,
        dense_tokens_per_s=round(1e3 * dense_found.rows / dense_found.step_ms, 1),
        mod_tokens_per_s=round(1e3 * found.rows / found.step_ms, 1),
        dense_prefill_ms_a_row=round(dense_found.line_ms / LINE_ROWS, 1),
        mod_prefill_ms_a_row=round(found.line_ms / LINE_ROWS, 1),
        prompt="the last line of a prefill; keys and values of the others are random",
        kv_cache_dtype=settings.kv_cache_dtype,
        **granularity_of("kv_head", len(shares), len(kept)),
    )  # fmt: skip


@dataclass(frozen=True)
class Found:
    """A batch that fits: its rows, ms of its last line's prefill and of a step, bytes that it stores."""

    rows: int
    line_ms: float
    step_ms: float
    bytes: int


class LastLine:
    """The prefill of a large batch from its last line on: the lines before it have left their keys and
    values, which are random here. What has to fit is what has to fit in a prefill of all, and takes a tenth
    of its time.

    Args:
        lengths: tokens of each segment of one row in each layer.
        table: decides in routed layers.
    """

    def __init__(
        self,
        model: Any,
        lengths: list[list[int]],
        table: RoutingTable | None,
        settings: Settings,
        sizes: Sizes,
    ) -> None:
        self.engine: Engine = model.__dict__["mod_engine"]
        self.lengths, self.table, self.sizes = lengths, table, sizes
        generator = torch.Generator().manual_seed(settings.seed)
        ids = torch.randint(1, model.config.vocab_size, (LINE_ROWS, sizes.long), generator=generator)
        self.ids_BT = ids.to(settings.device)

    def prefilled(self) -> tuple[float, list[SegmentedBuffer]]:
        """ms, and what it leaves, a buffer a layer."""
        engine, keep = self.engine, {}
        if self.table is not None:
            keep = {i: self.table.for_rows(i, 1, engine.device) for i in engine.routed}
        buffers: list[SegmentedBuffer] = []

        def run() -> None:
            buffers.extend(prefill(engine, self.ids_BT, None)[1])

        with torch.no_grad(), engine.deciding(keep):
            return milliseconds(run, engine.device), buffers

    def tried(self, rows: int) -> Found:
        """The whole of it, with so many rows.

        Raises:
            torch.OutOfMemoryError: they do not fit.
        """
        engine, context, steps = self.engine, self.sizes.long, self.sizes.steps
        step = engine.step(rows)
        left = [min(LINE_ROWS, rows - at) for at in range(0, rows - LINE_ROWS, LINE_ROWS)]
        parts = [synthetic_caches(engine, [n * row for n in self.lengths], 0.25) for row in left]
        line_ms, last = self.prefilled()
        parts.append(last)
        del last
        buffers = [type(parts[0][0]).joined([part.pop(0) for part in parts]) for _ in engine.layers]
        rows = sum(left) + LINE_ROWS
        times = timed_steps(step, buffers, context, rows, self.table, steps)
        return Found(
            rows, line_ms, statistics.median(times.wall), allocated_bytes([vars(b) for b in buffers])
        )


def largest_batch(line: LastLine) -> Found:
    """The largest batch that fits: tried from what one line takes and leaves, downwards. What is lost between
    the allocator's blocks is not known before. Says what it found at once: its row comes much later."""
    torch.cuda.empty_cache()
    line.prefilled()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    stored = allocated_bytes([vars(buffer) for buffer in line.prefilled()[1]])
    peak = torch.cuda.max_memory_allocated() - before
    torch.cuda.empty_cache()
    a_row = stored / LINE_ROWS * (1 + 1 / len(line.lengths))  # one layer is held twice while lines are joined
    rows = math.floor((torch.cuda.mem_get_info()[0] - max(peak - stored, 0) - SPARE) / a_row)
    while True:
        rows = max(LINE_ROWS, rows - rows % LINE_ROWS)
        try:
            found = line.tried(rows)
            print(
                f"{'dense' if line.table is None else 'routed'}, {line.sizes.long} tokens: {found}",
                flush=True,
            )
            return found
        except torch.OutOfMemoryError:
            if rows == LINE_ROWS:
                raise
        finally:
            line.engine.release()
            line.engine.steps.clear()
            gc.collect()  # frames of the error hold tensors
            torch.cuda.empty_cache()
        rows = math.floor(FEWER * rows)


PARTS = ("long", "short", "unequal", "decode", "longest", "throughput", "static")


@case
def speed_kv(settings: Settings) -> Iterator[Row]:
    """K/V routing on one GPU, by layer and by head: prompts to 128k, decoding, memory, largest batch."""
    need_gpu(settings, "speed_kv")
    settings, sizes = dataclasses.replace(settings, skip="kv"), Sizes()
    parts = settings.only or PARTS
    with kept_models(settings, sizes.longest + 64) as (dense, twins):
        yield from generate_rows(settings, dense, twins, sizes, parts)
        if "decode" in parts:
            for context, batch in ((sizes.long, 1), (sizes.long, sizes.rows), (sizes.longest, 1)):
                for ratio in (0.25, 0.125):
                    yield from decode_rows(settings, dense, twins, context, batch, ratio, sizes.steps)
        if "longest" in parts:
            yield from longest_rows(settings, dense, twins, sizes)
        if "throughput" in parts:
            yield from throughput_rows(settings, dense, twins, sizes)
        if "static" in parts:
            static = KeptWorkload(settings, dense, twins, [sizes.long], sizes.new)
            yield from static.static_rows(Variant("layer", 0.25), 1)


speed_kv.parts = PARTS  # type: ignore[attr-defined]
speed_kv.kv_cache_dtypes = ("auto", "int8")  # type: ignore[attr-defined]
