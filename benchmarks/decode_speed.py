"""Where the time of a decoding step and of a short prompt goes.

    python -m benchmarks.decode_speed --out build/decode_speed.json --seconds 60
    python -m benchmarks.decode_speed --out build/toy.json --toy attention linear router step prefill

Parts: `attention`, `tiles` (of attention in eight bits), `linear` and `router` (of prompts), those kernels
alone, in GB/s; `step`, whole decoding steps of a few layers of the 8B shape, with the time of each kernel;
`prefill`, 4,096 tokens, likewise, dense and in several ways of routing, in turn. Each row is written when it
is there; nothing begins after the limit.

Shape letters: L layers, B rows, U rows of a layer's cache, G kv heads, H head dim, D features in, E out.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from modlab.bench import limits, speed_kv
from modlab.bench.fast import fast_twins
from modlab.bench.models import converted_twin, dense_model, random_routing, routed_layers
from modlab.bench.registry import Settings
from modlab.cache.int8 import Int8Range
from modlab.config import KVCacheDtype, MoDConfig
from modlab.engine.deferred import MOST_TOKENS
from modlab.engine.guesses import Guesses
from modlab.kernels import decode_attention, decode_linear, router_logits
from modlab.kernels.launch import Sizes
from modlab.kernels.router_logits import Tile
from modlab.measure import synchronize, time_generate
from modlab.routing.router import make_router
from modlab.routing.state import routing_override

MATRICES = [(4096, 4096), (4096, 1024), (4096, 14336), (14336, 4096)]
PARTS = ["attention", "tiles", "linear", "router", "step", "prefill"]


class Report:
    """Rows of a file that is written after each of them."""

    def __init__(self, path: Path, seconds: float) -> None:
        self.path, self.ends, self.begun = path, time.monotonic() + seconds, time.monotonic()
        self.rows: list[dict[str, Any]] = []
        path.parent.mkdir(parents=True, exist_ok=True)

    def add(self, part: str, **fields: Any) -> None:
        """One row more, printed and written."""
        self.rows.append({"part": part, "at_s": round(time.monotonic() - self.begun, 1)} | fields)
        short = {name: value for name, value in self.rows[-1].items() if name != "kernels"}
        print(" ".join(f"{name}={value}" for name, value in short.items()), flush=True)
        self.path.write_text(json.dumps(self.rows, indent=1) + "\n")

    @property
    def is_over(self) -> bool:
        """Whether nothing may begin any more."""
        return time.monotonic() > self.ends


def milliseconds(call: Callable[[], Any], repeats: int, target: torch.device) -> float:
    """Median of `call`, which is captured as a CUDA graph where there is a GPU."""
    if target.type != "cuda":
        start = time.perf_counter()
        call()
        return (time.perf_counter() - start) * 1e3
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    times = []
    for _ in range(repeats + 2):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times[2:])


def kernels_of(call: Callable[[], Any], times: int, target: torch.device) -> dict[str, Any]:
    """What each kernel takes in one of so many calls: [launches, us], the largest first; and in all: us from
    the first kernel to the end of the last one, us of all kernels, launches."""
    if target.type != "cuda":
        call()
        return {}
    call()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(times):
            call()
        torch.cuda.synchronize()
    found: dict[str, list[float]] = defaultdict(lambda: [0, 0.0])
    spans = []
    for event in profile.events():
        if "CUDA" not in str(event.device_type):
            continue
        spans.append((event.time_range.start, event.time_range.end))
        found[event.name[:70]][0] += 1 / times
        found[event.name[:70]][1] += (event.time_range.end - event.time_range.start) / times
    first, last = min(s for s, _ in spans), max(e for _, e in spans)
    largest = sorted(found.items(), key=lambda item: -item[1][1])[:24]
    return {
        "span_us": round((last - first) / times, 1),
        "busy_us": round(sum(e - s for s, e in spans) / times, 1),
        "launches": round(len(spans) / times, 1),
        "kernels": {name: [round(n, 1), round(us, 1)] for name, (n, us) in largest},
    }


# Attention alone


@dataclass(frozen=True)
class Cache:
    """What attention is timed over: `gates` is "dense", "layer" or "kv_head"; keys and values in eight bits
    or not."""

    gates: str
    batch: int
    context: int
    ratio: float = 1.0
    int8: bool = False


CACHES = [
    *(Cache(gates, 8, 32768, 0.25) for gates in ("kv_head", "layer")),
    *(Cache(gates, 1, 32768, 0.25) for gates in ("kv_head", "layer")),
    Cache("dense", 1, 32768),
    Cache("dense", 8, 32768),
    Cache("kv_head", 1, 131072, 0.25),
    Cache("kv_head", 1, 131072, 0.125),
]
CACHES += [replace(cache, int8=True) for cache in CACHES if cache.gates != "dense"]
G, M, H, W = 8, 4, 128, 128


class Attention:
    """A step's attention in several layers, each with keys of its own."""

    def __init__(self, cache: Cache, layers: int, target: torch.device) -> None:
        self.cache, dtype = cache, torch.bfloat16 if target.type == "cuda" else torch.float16
        shares = torch.full((32, 1), cache.ratio)
        if cache.gates == "kv_head":
            shares = speed_kv.head_shares(32, G, cache.ratio, 0)
        self.lengths = speed_kv.stored_lengths(shares, cache.batch, cache.context, W)[:layers]
        if cache.gates == "dense":
            self.lengths = [[cache.context] * cache.batch] * layers
        self.heads = 1 if cache.gates == "kv_head" else G
        self.layers = []
        U = len(self.lengths[0])
        for lengths in self.lengths:
            starts = [0]
            for n in lengths:
                starts.append(starts[-1] + n + 512)  # dense rows grow by one a call
            keys, values = (self._numbers(starts[-1], dtype, target) for _ in range(2))
            steps = [
                (torch.rand(self.heads, starts[-1], 1, device=target) * 0.03).half()
                for _ in range(2 * cache.int8)
            ]
            columns = torch.zeros(starts[-1], dtype=torch.int32, device=target)
            at = [t.data_ptr() for t in (keys, values, columns)]
            addresses = [*at, starts[-1], *([t.data_ptr() for t in steps] or (0, 0)), *starts[:-1]]
            self.layers.append(
                (keys, values, *steps, columns, torch.tensor(addresses, device=target),
                 torch.tensor(lengths, dtype=torch.int32, device=target))
            )  # fmt: skip
        sizes = (self.heads * M, self.heads, self.heads)
        self.new = [torch.randn(U, n, H, dtype=dtype, device=target) for n in sizes]
        self.keep = torch.full((U,), cache.gates == "dense", device=target)
        self.ring = torch.zeros(U, W, dtype=torch.bool, device=target)
        self.position = torch.full((cache.batch,), cache.context, device=target)
        self.column = torch.zeros(U, dtype=torch.int32, device=target)
        self.starts = starts[:-1]
        self.range = Int8Range(G, H, H, target) if cache.int8 else None

    def _numbers(self, tokens: int, dtype: torch.dtype, target: torch.device) -> Tensor:
        shape = (self.heads, tokens, H)
        if self.cache.int8:
            return torch.randint(-127, 128, shape, dtype=torch.int8, device=target)
        return torch.randn(shape, dtype=dtype, device=target)

    @property
    def bytes(self) -> int:
        """Read by a layer, on the mean."""
        token = Int8Range.token_bytes(self.heads, H, H) if self.cache.int8 else self.heads * H * 4
        return sum(map(sum, self.lengths)) * token // len(self.lengths)

    def one(self, layer: tuple[Tensor, ...]) -> Tensor:
        *_, table, lengths = layer
        step: tuple[Any, ...] = (*self.new, table, lengths, self.keep)
        if self.cache.gates == "dense":
            return decode_attention.decode_attention(*step, self.column, H**-0.5)
        channels = () if self.range is None else tuple(self.range.buffers())
        return decode_attention.decode_ring_attention(
            *step, self.ring, self.position, H**-0.5, None, *channels
        )

    def all(self) -> None:
        """What is timed."""
        for layer in self.layers:
            self.one(layer)

    def error(self) -> float:
        """Of the last layer against the reference: norm of the difference over its norm."""
        *contents, columns, _, lengths = self.layers[-1]
        q, k, v = self.new
        stored, length = tuple(t.clone() for t in contents), lengths.clone()
        if self.cache.gates == "dense":
            want = decode_attention.reference_decode_attention(
                q,
                k,
                v,
                (stored[0], stored[1], columns.clone()),
                self.starts,
                length,
                self.keep,
                self.column,
                H**-0.5,
            )
        else:
            want = decode_attention.reference_decode_ring_attention(
                q,
                k,
                v,
                stored,
                self.starts,
                length,
                self.keep,
                self.ring.clone(),
                self.position,
                H**-0.5,
                int8=self.range,
            )
        got = self.one(self.layers[-1])
        return float((got.float() - want.float()).norm() / want.float().norm())


def attention_part(report: Report, target: torch.device, toy: bool) -> None:
    """Attention alone."""
    for cache in CACHES:
        if report.is_over:
            return
        if toy:
            cache = replace(cache, context=300)
        report.add("attention", **_attention_row(cache, target, toy))


def _attention_row(cache: Cache, target: torch.device, toy: bool) -> dict[str, Any]:
    case = Attention(cache, 1 if toy else 6, target)
    error = case.error()
    ms = milliseconds(case.all, 12, target) / len(case.layers)
    return vars(cache) | {
        "us": round(ms * 1e3, 2),
        "gb_s": round(case.bytes / ms / 1e6),
        "mb": round(case.bytes / 1e6, 1),
        "error": float(f"{error:.1e}"),
    }


CODES = [Cache("kv_head", batch, 32768, 0.25, int8=True) for batch in (8, 1)]
CODE_TILES: list[tuple[Sizes, int]] = [
    ({"BLOCK_K": keys, "num_warps": warps, "num_stages": stages}, programs)
    for keys, warps, stages, programs in (
        (128, 4, 3, 2), (128, 4, 2, 2), (64, 4, 4, 2), (64, 4, 3, 3), (128, 8, 3, 2), (256, 8, 2, 1),
    )
]  # fmt: skip
"""What may be the fastest of `decode_attention.INT8_TILES`, and of its programs a multiprocessor."""


def tiles_part(report: Report, target: torch.device, toy: bool) -> None:
    """Attention alone to keys and values in eight bits, in several tiles."""
    before = decode_attention.INT8_TILES, decode_attention.PROGRAMS
    try:
        for cache, (tile, programs) in itertools.product(CODES, CODE_TILES):
            if report.is_over:
                return
            decode_attention.INT8_TILES, decode_attention.PROGRAMS = (tile,), programs
            row = _attention_row(replace(cache, context=300) if toy else cache, target, toy)
            report.add("tiles", **row, **tile, programs=programs)
    finally:
        decode_attention.INT8_TILES, decode_attention.PROGRAMS = before


# Linear maps alone


def linear_part(report: Report, target: torch.device, toy: bool) -> None:
    """Matrix products of eight tokens and of one, by cuBLAS and by the kernels."""
    dtype = torch.bfloat16 if target.type == "cuda" else torch.float16
    for D, E in [(256, 64)] if toy else MATRICES:
        count = 2 if toy else max(2, 400_000_000 // (D * E * 2))  # more than the L2 holds
        weights = [torch.randn(E, D, dtype=dtype, device=target) * D**-0.5 for _ in range(count)]
        for B, way in itertools.product((8, 1), ("cublas", "kernel")):
            if report.is_over:
                return
            x = torch.randn(B, 1, D, dtype=dtype, device=target)
            report.add("linear", D=D, E=E, batch=B, way=way, **_linear_row(x, weights, way, target))


def _linear_row(x: Tensor, weights: list[Tensor], name: str, target: torch.device) -> dict[str, Any]:
    def run(weight: Tensor) -> Tensor:
        return F.linear(x, weight) if name == "cublas" else decode_linear.decode_linear(x, weight, None)

    got, want = run(weights[0]), F.linear(x.double(), weights[0].double())
    ms = milliseconds(lambda: [run(weight) for weight in weights], 6, target) / len(weights)
    error = float((got.double() - want).norm() / want.norm())
    gb_s = round(weights[0].nbytes / ms / 1e6)
    return {"us": round(ms * 1e3, 2), "gb_s": gb_s, "error": float(f"{error:.1e}")}


# Routers of a prompt alone

TILES = [
    router_logits.SHORT, router_logits.LONG, Tile(32, 128, shares=2), Tile(32, 128, shares=4),
    Tile(32, 64, shares=4), Tile(64, 64, shares=4), Tile(64, 128, shares=4), Tile(64, 64, shares=8),
]  # fmt: skip


def router_part(report: Report, target: torch.device, toy: bool) -> None:
    """Gates a KV head with a hidden layer, of prompts of 4,096 and 32,768 tokens, in several tiles."""
    D, config = 256 if toy else 4096, MoDConfig(router_hidden=speed_kv.HIDDEN)
    own = make_router(config, D, G, target)
    for parameter in own.parameters():
        torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    dtype = torch.bfloat16 if target.type == "cuda" else torch.float16
    for tokens, tile in itertools.product((40,) if toy else (4096, 32768), TILES):
        if report.is_over:
            return
        x = torch.randn(1, tokens, D, dtype=dtype, device=target)
        got, want = router_logits.kernel_router_logits(own, x, tile), own(x)

        def run(x: Tensor = x, tile: Tile = tile) -> None:
            router_logits.kernel_router_logits(own, x, tile)

        us = milliseconds(run, 12, target) * 1e3
        error = float((got - want).norm() / want.norm())
        report.add(
            "router", line=tokens, **vars(tile), us=round(us, 1), gb_s=round(x.nbytes / us / 1e3),
            error=float(f"{error:.1e}"),
        )  # fmt: skip


# Whole steps and prompts

STEPS = [(8, ""), (8, "kv_head"), (8, "layer"), (1, ""), (1, "kv_head"), (1, "layer")]
"""By rows of a batch and gates ("" for the dense model)."""


@contextlib.contextmanager
def models(
    target: torch.device, toy: bool, layers: int, kv_cache_dtype: KVCacheDtype
) -> Iterator[tuple[Settings, Any, dict[str, Any]]]:
    """The dense model, its twins by layer and by head, and one that skips every other layer."""
    settings = Settings(
        device=target, dtype=torch.float32 if target.type == "cpu" else torch.bfloat16,
        shape="tiny" if toy else "llama-3-8b", layers=layers, skip="kv", kv_cache_dtype=kv_cache_dtype,
    )  # fmt: skip
    dense = dense_model(settings, 200 if toy else 33_000)
    twins = speed_kv.twins_by_gates(settings, dense, "kv")
    twins[speed_kv.SKIP_LAYERS] = converted_twin(dense, routed_layers("alternate", layers), "layer")
    with fast_twins(settings, dense, twins):
        yield settings, dense, twins


def step_part(report: Report, settings: Settings, dense: Any, twins: dict[str, Any], toy: bool) -> None:
    """A decoding step at 32k, a quarter kept, and its kernels."""
    context, steps = (150, 2) if toy else (32768, 24)
    heads, layers = dense.config.num_key_value_heads, dense.config.num_hidden_layers
    for batch, name in STEPS:
        if report.is_over:
            return
        engine = (twins[name] if name else dense).__dict__["mod_engine"]
        lengths, table, ratio = [[context] * batch] * layers, None, 1.0
        if name:
            ratio = 0.25
            shares = torch.full((layers, 1), ratio)
            if name == "kv_head":
                shares = speed_kv.head_shares(layers, heads, ratio, 0)
            table = speed_kv.table_of(range(layers), shares, context + steps, settings)
            lengths = speed_kv.stored_lengths(shares, batch, context, engine.keep_recent)
        engine.steps.clear()
        torch._dynamo.reset()
        before = engine.branch, engine.branch_note, engine.compile
        found = _step_row(engine, batch, context, lengths, table, ratio, steps)
        found["branch"] = engine.branch.name  # "host": the capture failed
        report.add("step", batch=batch, gates=name or "dense", **found)
        engine.branch, engine.branch_note, engine.compile = before
        engine.steps.clear()


def _step_row(
    engine: Any, batch: int, context: int, lengths: Any, table: Any, ratio: float, steps: int
) -> dict[str, Any]:
    begun = time.monotonic()
    step, target = engine.step(batch), engine.device
    prepared = time.monotonic() - begun
    step.tables.attach(limits.synthetic_caches(engine, lengths, ratio), context, [context] * batch)
    if table is not None:
        step.tables.force({i: table.for_rows(i, batch, target) for i in engine.routed})
    step.tables.choice.token.fill_(1)
    times = []
    for _ in range(steps):
        synchronize(target)
        start = time.perf_counter()
        step.run()
        synchronize(target)
        times.append((time.perf_counter() - start) * 1e3)
    found = kernels_of(step.run, 5, target)
    step.tables.release()
    step.tables.force({})
    ms = statistics.median(times[1:])
    return {"ms": round(ms, 4), "prepared_s": round(prepared, 1)} | found


@dataclass
class Way:
    """How a prompt runs, and what that took.

    Attributes:
        gates: "" for the dense model.
        kept: share of the tokens that are kept; 1 where all gates are open.
        defer_tokens: see `Engine`; None as it is.
        guesses: numbers of kept tokens are guessed from the prompts before.
        tile: of routers; None for the usual one.
        times: ms.
    """

    gates: str = ""
    kept: float = 1.0
    defer_tokens: int | None = None
    guesses: Guesses | None = None
    tile: Tile | None = None
    times: list[float] = field(default_factory=list)


def fastest_tile(report: Report) -> Tile | None:
    """Of the shortest prompts for which routers alone have been timed; None if they have not been."""
    rows = [row for row in report.rows if row["part"] == "router"]
    if not rows:
        return None
    best = min(rows, key=lambda row: (row["line"], row["us"]))
    return Tile(**{name: best[name] for name in vars(router_logits.SHORT)})


def prompt_ways(toy: bool, tile: Tile | None) -> list[Way]:
    """Dense; the cache routed, layers given their room at once and one layer later, and that with routers in
    this tile; whole layers."""
    guesses = Guesses(least=8, multiple=4, steady=0) if toy else Guesses(steady=0)
    by_kept = [
        Way(gates, kept, defer_tokens)
        for gates in ("layer", "kv_head")
        for kept in (0.25, 1.0)
        for defer_tokens in (0, MOST_TOKENS)
    ]
    skipping = [Way(speed_kv.SKIP_LAYERS, 0.10), Way(speed_kv.SKIP_LAYERS, 0.10, guesses=guesses)]
    tiled = [Way(gates, 0.25, MOST_TOKENS, tile=tile) for gates in ("layer", "kv_head") if tile is not None]
    return [Way(), *by_kept, *tiled, *skipping]


def prefill_part(report: Report, settings: Settings, dense: Any, twins: dict[str, Any], toy: bool) -> None:
    """4,096 tokens to the first token, all ways in turn in each round; then the kernels of each."""
    tokens, rounds = (150, 1) if toy else (4096, 15)
    ids = torch.randint(1, dense.config.vocab_size, (1, tokens), device=settings.device)
    ways = prompt_ways(toy, fastest_tile(report))
    for model in (dense, *twins.values()):
        engine = model.__dict__["mod_engine"]
        compiled, engine.compile = engine.compile, False
        engine.step(1)  # not what is measured here
        engine.compile = compiled
    for number in range(rounds + 2):  # the first two warm up and learn
        for way in ways:
            if report.is_over:
                return
            model = twins[way.gates] if way.gates else dense
            with _on_its_way(way, model, tokens, settings):
                ms = time_generate(model, ids, 0)[0]
            way.times += [ms] * (number > 1 or toy)
    fastest = statistics.median(ways[0].times)
    for way in ways:
        model = twins[way.gates] if way.gates else dense
        found: dict[str, Any] = {}
        if not report.is_over:
            with _on_its_way(way, model, tokens, settings):
                found = kernels_of(lambda: time_generate(model, ids, 0), 1, settings.device)  # noqa: B023
        median = statistics.median(way.times)
        report.add(
            "prefill", gates=way.gates or "dense", kept=way.kept, defer_tokens=way.defer_tokens,
            guessed=way.guesses and way.guesses.right, tile=way.tile and vars(way.tile), ms=round(median, 3),
            ms_min=round(min(way.times), 3),
            ms_max=round(max(way.times), 3), speedup=round(fastest / median, 3), **found,
        )  # fmt: skip


@contextlib.contextmanager
def _on_its_way(way: Way, model: Any, tokens: int, settings: Settings) -> Iterator[None]:
    """Inside this block the model's prompts run in this way, random tokens kept."""
    engine, layers = model.__dict__["mod_engine"], model.config.num_hidden_layers
    override: Any = contextlib.nullcontext()
    if way.gates == speed_kv.SKIP_LAYERS:
        table = random_routing(model.mod.layers, 1, [tokens, 8], way.kept, 0, settings.device)
        override = routing_override(model, table)
    elif way.gates:
        shares = torch.full((layers, 1), way.kept)
        if way.gates == "kv_head":
            shares = speed_kv.head_shares(layers, model.config.num_key_value_heads, way.kept, 0)
        override = routing_override(model, speed_kv.table_of(range(layers), shares, tokens + 8, settings))
    before = engine.defer_tokens, engine.guesses, router_logits.SHORT, router_logits.LONG
    engine.guesses = way.guesses
    if way.tile is not None:
        router_logits.SHORT = router_logits.LONG = way.tile
    if way.defer_tokens is not None:
        engine.defer_tokens = way.defer_tokens
    try:
        with override:
            yield
    finally:
        engine.defer_tokens, engine.guesses, router_logits.SHORT, router_logits.LONG = before


def main(argv: list[str] | None = None) -> None:
    """Runs the parts that are named, or all."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("parts", nargs="*", default=[], help=f"{', '.join(PARTS)} (all)")
    parser.add_argument("--out", type=Path, default=Path("build/decode_speed.json"))
    parser.add_argument("--seconds", type=float, default=60.0, help="nothing begins after them")
    parser.add_argument("--layers", type=int, default=8, help="of the model of whole steps")
    parser.add_argument("--toy", action="store_true", help="tiny sizes: does the code run, never how fast")
    parser.add_argument("--kv-cache-dtype", default="auto", choices=("auto", "int8"), help="of whole steps")
    options = parser.parse_args(argv)
    target = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    parts = options.parts or PARTS
    report = Report(options.out, options.seconds)
    of_models = (target, options.toy, 2 if options.toy else options.layers, options.kv_cache_dtype)
    with torch.no_grad(), models(*of_models) as of_a_model:
        report.add("models", layers=options.layers, kv_cache_dtype=options.kv_cache_dtype)
        run: dict[str, Callable[[], None]] = {
            "attention": lambda: attention_part(report, target, options.toy),
            "tiles": lambda: tiles_part(report, target, options.toy),
            "linear": lambda: linear_part(report, target, options.toy),
            "router": lambda: router_part(report, target, options.toy),
            "step": lambda: step_part(report, *of_a_model, options.toy),
            "prefill": lambda: prefill_part(report, *of_a_model, options.toy),
        }
        for part in parts:
            run[part]()
            if target.type == "cuda":
                torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
