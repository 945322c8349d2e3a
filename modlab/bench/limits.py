"""Cases `peak` and `throughput`: what the saved memory is good for.

Shape letters: L layers, B rows, G kv heads, H head dim.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import torch

from modlab.bench.clock import Times
from modlab.bench.fast import WARM_UP_TOKENS, Variant, Workload, fast_models
from modlab.bench.ideal import kv_token_bytes, step_bytes, stored_tokens
from modlab.bench.models import random_routing
from modlab.bench.registry import Row, Settings, Skipped, case
from modlab.bench.rows import make_row
from modlab.cache.buffer import SegmentedBuffer
from modlab.cache.bytes import allocated_bytes
from modlab.engine import disable_fast_generation, enable_fast_generation, fast_generation_report
from modlab.engine.engine import Engine
from modlab.engine.prefill import scratch_buffers
from modlab.engine.ring import RingBuffer
from modlab.engine.step import Step
from modlab.measure import time_generate
from modlab.routing.state import routing_override
from modlab.routing.table import RoutingTable

SPARE = 4 * 2**30
"""Bytes left free when the largest batch is worked out: activations, logits, the graph's own memory."""


def need_gpu(settings: Settings, name: str) -> None:
    """These cases read the GPU allocator's figures."""
    if settings.device.type != "cuda":
        raise Skipped(f"{name}: needs a GPU")


def peak_rows(
    settings: Settings, dense: Any, twins: dict[str, Any], context: int, variant: Variant
) -> Iterator[Row]:
    """Peak memory above the weights of a prefill: stock transformers against fast generation."""
    workload = Workload(settings, dense, twins, [context], 2)
    disable_fast_generation(dense)
    try:
        stock_peak, stock_ms = _peak(workload, None)
    finally:
        enable_fast_generation(dense, check=False)
    engine_peak, _ = _peak(workload, None)
    mod_peak, mod_ms = _peak(workload, variant)
    fields = workload.fields(variant, "prefill") | {"case": "peak"}
    yield make_row(
        Times([stock_ms]), Times([mod_ms]), **fields, dense_peak_bytes=stock_peak, mod_peak_bytes=mod_peak,
        dense_engine_peak_bytes=engine_peak, peak_saving=round(stock_peak / mod_peak, 3),
    )  # fmt: skip


def _peak(workload: Workload, variant: Variant | None) -> tuple[int, float]:
    """Peak bytes above what was allocated before, and ms to the first token."""
    model = workload.dense if variant is None else workload.twins[variant.routed]
    override = nullcontext() if variant is None else routing_override(model, workload.routing(variant))
    with override:
        time_generate(model, workload.ids_BT[:, -WARM_UP_TOKENS:], 1, workload.mask_BT[:, -WARM_UP_TOKENS:])
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        first, _ = workload.timed(model, workload.ids_BT, workload.mask_BT)
    if variant is not None:
        workload.last = {variant: fast_generation_report(model)["last"]}
    return torch.cuda.max_memory_allocated() - before, first


def synthetic_caches(engine: Engine, lengths_LB: list[list[int]], ratio: float) -> list[SegmentedBuffer]:
    """Buffers of random keys and values, as long as a prefill leaves them: decoding reads the same bytes. Of
    the tokens in a ring the share `ratio` is kept.
    """
    known = scratch_buffers(engine, 1)
    caches = []
    for like, lengths in zip(known, lengths_LB, strict=True):
        assert like.keys is not None and like.values is not None
        cache = type(like)()
        if isinstance(like, RingBuffer) and isinstance(cache, RingBuffer):
            cache.heads = like.heads
        cache.reserve([n + cache.slack(n) for n in lengths], like.keys, like.values)
        for name in cache.contents:
            numbers = getattr(cache, name)
            numbers.random_(-127, 128) if numbers.dtype == torch.int8 else numbers.normal_()
        cache.lengths = list(lengths)
        if isinstance(like, RingBuffer):
            assert isinstance(cache, RingBuffer)
            shape = (len(lengths), like.ring_kept.shape[1])
            cache.ring_kept = torch.rand(shape, device=like.ring_kept.device) < ratio
        caches.append(cache)
    return caches


def step_times(
    engine: Engine, batch: int, context: int, routed: list[int], ratio: float, seed: int, tokens: int
) -> tuple[Times, int]:
    """ms of a decoding step on the GPU at a context, and the bytes that the caches take."""
    routing = engine.routing
    stored = context if routing is None else round(stored_tokens(context, ratio, routing.config))
    lengths = [[stored if i in routed else context] * batch for i in range(len(engine.layers))]
    table = random_routing(routed, batch, [context, tokens], ratio, seed, engine.device) if routed else None
    return step_times_of(engine, batch, context, lengths, table, ratio, tokens)


def step_times_of(
    engine: Engine,
    batch: int,
    context: int,
    lengths: list[list[int]],
    table: RoutingTable | None,
    ratio: float,
    tokens: int,
) -> tuple[Times, int]:
    """The same for caches of any lengths. The prompt is left out: `synthetic_caches` stands in for it.

    Args:
        lengths: tokens of each segment of each layer's cache.
        table: decides in routed layers.
        ratio: share of the tokens in a ring that are kept.
    """
    step = engine.step(batch)
    caches = synthetic_caches(engine, lengths, ratio)
    times = timed_steps(step, caches, context, batch, table, tokens)
    return times, allocated_bytes([vars(cache) for cache in caches])


def milliseconds(call: Callable[[], Any], device: torch.device) -> float:
    """ms of a call: of what it does on a GPU, or of the clock elsewhere."""
    if device.type != "cuda":
        start = time.perf_counter()
        call()
        return (time.perf_counter() - start) * 1e3
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


def timed_steps(
    step: Step,
    caches: list[SegmentedBuffer],
    context: int,
    batch: int,
    table: RoutingTable | None,
    tokens: int,
) -> Times:
    """ms of each of so many steps that go on from these buffers, one a layer."""
    tables, engine = step.tables, step.engine
    tables.attach(caches, context, [context] * batch)
    if table is not None:
        tables.force({i: table.for_rows(i, batch, engine.device) for i in engine.routed})
    tables.choice.token.fill_(1)
    times = Times()
    times.wall = [milliseconds(step.run, engine.device) for _ in range(tokens)]
    tables.release()
    tables.force({})
    return times


def throughput_rows(
    settings: Settings, dense: Any, twins: dict[str, Any], context: int, variant: Variant, tokens: int = 32
) -> Iterator[Row]:
    """ms a generated token at the largest batch that fits: dense against Mixture-of-Depths."""
    config, size = dense.config, settings.dtype.itemsize
    twin = twins[variant.routed]
    results: dict[str, tuple[float, int, int]] = {}
    for name, model, routed, ratio in (
        ("dense", dense, [], 1.0),
        ("mod", twin, twin.mod.layers, variant.ratio),
    ):
        engine: Engine = model.__dict__["mod_engine"]
        engine.steps.clear()
        torch.cuda.empty_cache()
        kept = config.num_hidden_layers - len(routed) * (
            1 - stored_tokens(context, ratio, settings.mod) / context
        )
        layer_bytes = (context + max(16, context // 32)) * kv_token_bytes(config, size)
        # one layer more: a prefill in several lines holds one layer twice while it joins them
        batch = int((torch.cuda.mem_get_info()[0] - SPARE) // ((kept + 1) * layer_bytes))
        times, allocated = step_times(engine, batch, context, list(routed), ratio, settings.seed, tokens)
        results[name] = (statistics.median(times.wall[1:]) / batch, batch, allocated)
    kept_by_layer = dict.fromkeys(twin.mod.layers, variant.ratio)
    bytes_each = {
        name: step_bytes(config, [context] * results[name][1], kept, size, settings.mod) / results[name][1]
        for name, kept in (("dense", {}), ("mod", kept_by_layer))
    }
    token = kv_token_bytes(config, size)
    yield make_row(
        Times([results["dense"][0]]), Times([results["mod"][0]]),
        case="throughput", shape=settings.shape, context=context, batch=results["mod"][1],
        routed=variant.routed, routed_layers=len(kept_by_layer), num_layers=config.num_hidden_layers,
        skip=settings.skip, keep_ratio=variant.ratio, ideal=bytes_each["dense"] / bytes_each["mod"],
        kv_bytes=results["mod"][2],
        dense_kv_bytes=config.num_hidden_layers * context * results["mod"][1] * token,
        dense_batch=results["dense"][1], dense_tokens_per_s=round(1e3 / results["dense"][0], 1),
        mod_tokens_per_s=round(1e3 / results["mod"][0], 1), prompt="synthetic keys and values",
    )  # fmt: skip


@case
def peak(settings: Settings) -> Iterator[Row]:
    """Peak memory of a prefill above the weights, against stock transformers."""
    need_gpu(settings, "peak")
    with fast_models(settings, max(settings.contexts) + 2, [settings.routed]) as (dense, twins):
        for context in settings.contexts:
            for ratio in settings.ratios:
                yield from peak_rows(settings, dense, twins, context, Variant(settings.routed, ratio))


@case
def throughput(settings: Settings) -> Iterator[Row]:
    """Tokens a second at the largest batch that fits in the GPU's memory."""
    need_gpu(settings, "throughput")
    with fast_models(settings, max(settings.contexts) + 64, [settings.routed]) as (dense, twins):
        for context in settings.contexts:
            for ratio in settings.ratios:
                yield from throughput_rows(settings, dense, twins, context, Variant(settings.routed, ratio))
