"""Where the time of a decoding step and of a short prompt goes, and which way to compute them is the fastest.

    python -m benchmarks.decode_speed --out build/decode_speed.json --seconds 140
    python -m benchmarks.decode_speed --out build/toy.json --toy attention linear step prefill

Parts: `attention` and `linear`, those kernels alone, in GB/s; `step`, whole decoding steps of a few layers of
the 8B shape, one way of computing after the other, with the time of each kernel; `prefill`, 4,096 tokens,
likewise; `early`, steps whose kernels are launched early. Each row is written when it is there; nothing
begins after the limit.

Shape letters: L layers, B rows, U rows of a layer's cache, G kv heads, H head dim, D features in, E out.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from modlab.bench import limits, speed_kv
from modlab.bench.fast import fast_twins
from modlab.bench.models import converted_twin, dense_model, random_routing, routed_layers
from modlab.bench.registry import Settings
from modlab.engine import attention, lending
from modlab.kernels import aside, decode_attention, decode_linear, device, router_logits
from modlab.kernels.decode_attention import Shares
from modlab.kernels.decode_linear import Tile
from modlab.measure import synchronize, time_generate
from modlab.routing.state import routing_override

SWITCHES: dict[str, tuple[Any, str]] = {
    "shares": (decode_attention, "SHARES"),
    "ahead": (decode_linear, "AHEAD"),
    "narrow": (decode_linear, "NARROW"),
    "wide": (decode_linear, "WIDE"),
    "early": (device, "EARLY"),
    "rows": (lending, "LENT_ROWS"),
    "aside": (aside, "ENABLED"),
    "unsettled": (attention, "UNSETTLED_TOKENS"),
    "router_block": (router_logits, "WIDE_BLOCK_S"),
}
CUTS = {
    "parts": None,
    "2x64": Shares(),
    "2x64 s4": Shares(stages=4),
    "3x64 s2": Shares(programs=3, stages=2),
    "1x128": Shares(programs=1, block=128),
    "2x128 s2": Shares(programs=2, block=128, stages=2),
    "4x32": Shares(programs=4, block=32),
    "2x64 w8": Shares(warps=8),
}
TILES = [
    Tile(16, 128, 4, 5),
    Tile(16, 256, 4, 4),
    Tile(16, 512, 4, 3),
    Tile(32, 128, 4, 5),
    Tile(32, 256, 4, 4),
    Tile(64, 64, 4, 6),
    Tile(64, 128, 4, 4),
    Tile(128, 64, 8, 5),
]
MATRICES = [(4096, 4096), (4096, 1024), (4096, 14336), (14336, 4096)]
AHEAD = [1024, 2048, 4096]
WARMERS = 20
PARTS = ["attention", "linear", "step", "prefill", "early"]


@contextlib.contextmanager
def chosen(**values: Any) -> Iterator[None]:
    """Inside this block things are computed this way."""
    before = {name: getattr(*SWITCHES[name]) for name in values}
    try:
        for name, value in values.items():
            setattr(*SWITCHES[name], value)
        yield
    finally:
        for name, value in before.items():
            setattr(*SWITCHES[name], value)


class Report:
    """Rows of a file that is written after each of them."""

    def __init__(self, path: Path, seconds: float) -> None:
        self.path, self.ends, self.begun = path, time.monotonic() + seconds, time.monotonic()
        self.rows: list[dict[str, Any]] = []
        path.parent.mkdir(parents=True, exist_ok=True)

    def add(self, part: str, **fields: Any) -> None:
        """One row more, printed and written."""
        self.rows.append({"part": part, "at_s": round(time.monotonic() - self.begun, 1)} | fields)
        short = {name: value for name, value in self.rows[-1].items() if name not in ("kernels", "settings")}
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
    """What attention is timed over: `gates` is "dense", "layer" or "kv_head"."""

    gates: str
    batch: int
    context: int
    ratio: float = 1.0


CACHES = [
    *(Cache(gates, 8, 32768, 0.25) for gates in ("kv_head", "layer")),
    *(Cache(gates, 1, 32768, 0.25) for gates in ("kv_head", "layer")),
    Cache("dense", 1, 32768),
    Cache("dense", 8, 32768),
    Cache("kv_head", 1, 131072, 0.25),
    Cache("kv_head", 1, 131072, 0.125),
]
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
            keys, values = (
                torch.randn(self.heads, starts[-1], H, dtype=dtype, device=target) for _ in range(2)
            )
            columns = torch.zeros(starts[-1], dtype=torch.int32, device=target)
            addresses = [keys.data_ptr(), values.data_ptr(), columns.data_ptr(), starts[-1], *starts[:-1]]
            self.layers.append(
                (keys, values, columns, torch.tensor(addresses, device=target),
                 torch.tensor(lengths, dtype=torch.int32, device=target))
            )  # fmt: skip
        sizes = (self.heads * M, self.heads, self.heads)
        self.new = [torch.randn(U, n, H, dtype=dtype, device=target) for n in sizes]
        self.keep = torch.full((U,), cache.gates == "dense", device=target)
        self.ring = torch.zeros(U, W, dtype=torch.bool, device=target)
        self.position = torch.full((cache.batch,), cache.context, device=target)
        self.column = torch.zeros(U, dtype=torch.int32, device=target)
        self.starts = starts[:-1]

    @property
    def bytes(self) -> int:
        """Read by a layer, on the mean."""
        return sum(map(sum, self.lengths)) * self.heads * H * 4 // len(self.lengths)

    def one(self, layer: tuple[Tensor, ...]) -> Tensor:
        *_, table, lengths = layer
        step: tuple[Any, ...] = (*self.new, table, lengths, self.keep)
        if self.cache.gates == "dense":
            return decode_attention.decode_attention(*step, self.column, H**-0.5)
        return decode_attention.decode_ring_attention(*step, self.ring, self.position, H**-0.5)

    def all(self) -> None:
        """What is timed."""
        for layer in self.layers:
            self.one(layer)

    def error(self) -> float:
        """Of the last layer against the reference: norm of the difference over its norm."""
        keys, values, columns, _, lengths = self.layers[-1]
        q, k, v = self.new
        stored, length = (keys.clone(), values.clone()), lengths.clone()
        if self.cache.gates == "dense":
            want = decode_attention.reference_decode_attention(
                q, k, v, (*stored, columns.clone()), self.starts, length, self.keep, self.column, H**-0.5
            )
        else:
            want = decode_attention.reference_decode_ring_attention(
                q, k, v, stored, self.starts, length, self.keep, self.ring.clone(), self.position, H**-0.5
            )
        got = self.one(self.layers[-1])
        return float((got.float() - want.float()).norm() / want.float().norm())


def attention_part(report: Report, target: torch.device, toy: bool) -> None:
    """Attention alone, each way of cutting keys."""
    for cache in CACHES:
        if report.is_over:
            return
        if toy:
            cache = Cache(cache.gates, cache.batch, 300, cache.ratio)
        case = Attention(cache, 1 if toy else 6, target)
        for name, shares in list(CUTS.items())[: 2 if toy else None]:
            with chosen(shares=shares):
                error = case.error()
                ms = milliseconds(case.all, 12, target) / len(case.layers)
            report.add(
                "attention", **vars(cache), cut=name, us=round(ms * 1e3, 2),
                gb_s=round(case.bytes / ms / 1e6), mb=round(case.bytes / 1e6, 1), error=float(f"{error:.1e}"),
            )  # fmt: skip
        del case


# Linear maps alone


def linear_part(report: Report, target: torch.device, toy: bool) -> None:
    """Matrix products of one and of eight tokens, each way."""
    dtype = torch.bfloat16 if target.type == "cuda" else torch.float16
    ways: dict[str, dict[str, Any]] = {"cublas": {}}
    ways |= {_tile_name(tile): {"narrow": tile, "wide": tile} for tile in TILES}
    ahead = {"cublas": {}, "one": {"ahead": None}} | {f"ahead {n}": {"ahead": n} for n in AHEAD}
    for D, E in [(256, 64)] if toy else MATRICES:
        count = 2 if toy else max(2, 400_000_000 // (D * E * 2))  # more than the L2 holds
        weights = [torch.randn(E, D, dtype=dtype, device=target) * D**-0.5 for _ in range(count)]
        for B, named in ((8, ways), (1, ahead)):
            x = torch.randn(B, 1, D, dtype=dtype, device=target)
            for name, way in list(named.items())[: 2 if toy else None]:
                if report.is_over:
                    return
                with chosen(**way):
                    found = _linear_row(x, weights, name, target)
                report.add("linear", D=D, E=E, batch=B, way=name, **found)


def _tile_name(tile: Tile) -> str:
    return f"{tile.outputs}x{tile.inputs} w{tile.warps} s{tile.stages}"


def _linear_row(x: Tensor, weights: list[Tensor], name: str, target: torch.device) -> dict[str, Any]:
    def run(weight: Tensor) -> Tensor:
        return F.linear(x, weight) if name == "cublas" else decode_linear.decode_linear(x, weight, None)

    got, want = run(weights[0]), F.linear(x.double(), weights[0].double())
    ms = milliseconds(lambda: [run(weight) for weight in weights], 6, target) / len(weights)
    error = float((got.double() - want).norm() / want.norm())
    gb_s = round(weights[0].nbytes / ms / 1e6)
    return {"us": round(ms * 1e3, 2), "gb_s": gb_s, "error": float(f"{error:.1e}")}


def with_best(values: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, Any]:
    """A way of computing, with the fastest of `CUTS`, `TILES` and blocks `AHEAD`, as far as measured."""

    def best(named: dict[str, Any], key: str, part: str, **wanted: Any) -> Any:
        us: dict[str, float] = defaultdict(float)
        for row in rows:
            if row["part"] == part and row[key] in named and all(row[k] in v for k, v in wanted.items()):
                us[row[key]] += row["us"]
        return {name: named[name] for name in sorted(us, key=lambda name: us[name])[:1]}

    found = dict(values)
    tiles = {_tile_name(tile): tile for tile in TILES}
    cuts = {name: cut for name, cut in CUTS.items() if cut is not None}
    if "rows" in values:
        narrow, wide = [4096, 1024], [14336]
        for switch, outputs in (("narrow", narrow), ("wide", wide)):
            for tile in best(tiles, "way", "linear", E=outputs, batch=[8]).values():
                found[switch] = tile
    if "shares" in values:
        for cut in best(cuts, "cut", "attention", gates=["kv_head"]).values():
            found["shares"] = cut
    if "ahead" in values:
        blocks = {f"ahead {n}": n for n in AHEAD}
        for block in best(blocks, "way", "linear", batch=[1]).values():
            found["ahead"] = block
    return found


# Whole steps and prompts

SHARED = {"shares": Shares()}
Ways = list[tuple[str, dict[str, Any]]]
ALL_8 = {"rows": 16, "aside": True, **SHARED}
ALL_1 = {"aside": True, "ahead": 2048, **SHARED}
STEPS: list[tuple[int, str, Ways]] = [
    (8, "", [("base", {}), ("rows", {"rows": 16})]),
    (8, "kv_head", [("base", {}), ("rows shares aside", ALL_8), ("rows shares", {"rows": 16, **SHARED})]),
    (1, "kv_head", [("base", {}), ("shares aside ahead", ALL_1), ("shares", SHARED)]),
    (1, "", [("base", {}), ("ahead", {"ahead": 2048})]),
    (1, "layer", [("base", {}), ("shares aside", {"aside": True, **SHARED})]),
    (8, "layer", [("rows shares aside", ALL_8)]),
]
EARLY: list[tuple[int, str, Ways]] = [
    (1, "", [("ahead early", {"ahead": 2048, "early": True})]),
    (1, "kv_head", [("shares aside ahead early", ALL_1 | {"early": True})]),
    (8, "kv_head", [("rows shares aside early", ALL_8 | {"early": True})]),
]
"""By rows of a batch and gates ("" for the dense model)."""


@contextlib.contextmanager
def models(target: torch.device, toy: bool, layers: int) -> Iterator[tuple[Settings, Any, dict[str, Any]]]:
    """The dense model, its twins by layer and by head, and one that skips every other layer."""
    settings = Settings(
        device=target, dtype=torch.float32 if target.type == "cpu" else torch.bfloat16,
        shape="tiny" if toy else "llama-3-8b", layers=layers, skip="kv",
    )  # fmt: skip
    dense = dense_model(settings, 200 if toy else 33_000)
    twins = speed_kv.twins_by_gates(settings, dense, "kv")
    twins[speed_kv.SKIP_LAYERS] = converted_twin(dense, routed_layers("alternate", layers), "layer")
    with fast_twins(settings, dense, twins):
        yield settings, dense, twins


def step_part(
    report: Report, settings: Settings, dense: Any, twins: dict[str, Any], toy: bool, cases: Any
) -> None:
    """A decoding step at 32k, a quarter kept, and its kernels."""
    context, steps = (150, 2) if toy else (32768, 24)
    heads, layers = dense.config.num_key_value_heads, dense.config.num_hidden_layers
    for batch, name, ways in cases:
        engine = (twins[name] if name else dense).__dict__["mod_engine"]
        lengths, table, ratio = [[context] * batch] * layers, None, 1.0
        if name:
            ratio = 0.25
            shares = torch.full((layers, 1), ratio)
            if name == "kv_head":
                shares = speed_kv.head_shares(layers, heads, ratio, 0)
            table = speed_kv.table_of(range(layers), shares, context + steps, settings)
            lengths = speed_kv.stored_lengths(shares, batch, context, engine.keep_recent)
        for way, values in ways:
            if report.is_over:
                return
            engine.steps.clear()
            torch._dynamo.reset()
            before = engine.branch, engine.branch_note, engine.compile
            values = with_best(values, report.rows)
            with chosen(**values):
                found = _step_row(engine, batch, context, lengths, table, ratio, steps)
            found["branch"] = engine.branch.name  # "host": the capture failed
            found["settings"] = str(values)
            report.add("step", batch=batch, gates=name or "dense", way=way, **found)
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


def prefill_part(report: Report, settings: Settings, dense: Any, twins: dict[str, Any], toy: bool) -> None:
    """4,096 tokens to the first token, and the kernels of it."""
    tokens, repeats = (40, 1) if toy else (4096, 9)
    ids = torch.randint(1, dense.config.vocab_size, (1, tokens), device=settings.device)
    layers = dense.config.num_hidden_layers
    quarter = torch.full((layers, 1), 0.25)
    late = {"aside": True, "unsettled": 16384}
    by_gates: Ways = [
        ("base", {}),
        ("aside", {"aside": True}),
        ("aside unsettled", late),
        ("aside unsettled, router 16", late | {"router_block": 16}),
    ]
    cases: dict[str, tuple[Tensor | None, Ways]] = {
        "": (None, [("base", {})]),
        "layer": (quarter, by_gates),
        "kv_head": (speed_kv.head_shares(layers, dense.config.num_key_value_heads, 0.25, 0), by_gates),
        speed_kv.SKIP_LAYERS: (None, [("base", {})]),
    }
    for name, (shares, ways) in cases.items():
        model = twins[name] if name else dense
        override: Any = contextlib.nullcontext()
        if shares is not None:
            override = routing_override(model, speed_kv.table_of(range(layers), shares, tokens + 8, settings))
        elif name:
            table = random_routing(model.mod.layers, 1, [tokens, 8], 0.10, 0, settings.device)
            override = routing_override(model, table)
        engine = model.__dict__["mod_engine"]
        compiled, engine.compile = engine.compile, False
        engine.step(1)  # not what is measured here
        engine.compile = compiled
        with override:
            for way, values in ways[: 4 if toy else None]:
                if report.is_over:
                    return
                with chosen(**values):
                    times = [time_generate(model, ids, 0)[0] for _ in range(repeats + 1)][1:]
                    found = kernels_of(lambda: time_generate(model, ids, 0), 1, settings.device)  # noqa: B023
                report.add(
                    "prefill", gates=name or "dense", way=way, ms=round(statistics.median(times), 3),
                    ms_min=round(min(times), 3), ms_max=round(max(times), 3), **found,
                )  # fmt: skip


# The kernels of the first two parts, compiled by several processes


def warm_up(index: int, target: torch.device) -> None:
    """Compiles every `WARMERS`th kernel into Triton's cache: at tiny sizes, which its code does not know."""
    jobs: list[Callable[[], Any]] = []
    for cache in CACHES:
        for shares in CUTS.values():
            jobs.append(lambda cache=cache, shares=shares: _warm_attention(cache, shares, target))  # type: ignore[misc]
    for tile in TILES:
        jobs.append(lambda tile=tile: _warm_linear({"narrow": tile, "wide": tile}, 8, target))  # type: ignore[misc]
    for n in AHEAD:
        jobs.append(lambda n=n: _warm_linear({"ahead": n}, 1, target))  # type: ignore[misc]
    for job in jobs[index::WARMERS]:
        job()


def _warm_attention(cache: Cache, shares: Shares | None, target: torch.device) -> None:
    with chosen(shares=shares):
        Attention(Cache(cache.gates, cache.batch, 640, cache.ratio), 1, target).all()


def _warm_linear(way: dict[str, Any], B: int, target: torch.device) -> None:
    with chosen(**way):
        x = torch.zeros(B, 1, 4096, dtype=torch.bfloat16, device=target)
        decode_linear.decode_linear(x, x.new_zeros(1024, 4096), None)


def main(argv: list[str] | None = None) -> None:
    """Runs the parts that are named, or all."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("parts", nargs="*", default=[], help=f"{', '.join(PARTS)} (all)")
    parser.add_argument("--out", type=Path, default=Path("build/decode_speed.json"))
    parser.add_argument("--seconds", type=float, default=140.0, help="nothing begins after them")
    parser.add_argument("--layers", type=int, default=8, help="of the model of whole steps")
    parser.add_argument("--toy", action="store_true", help="tiny sizes: does the code run, never how fast")
    parser.add_argument("--warm", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    target = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if options.warm is not None:
        warm_up(options.warm, target)
        return
    parts = options.parts or PARTS
    report = Report(options.out, options.seconds)
    warmers = []
    if target.type == "cuda" and {"attention", "linear"} & set(parts):
        command = [sys.executable, "-m", "benchmarks.decode_speed", "--warm"]
        warmers = [subprocess.Popen([*command, str(i)]) for i in range(WARMERS)]
    with torch.no_grad(), models(target, options.toy, 2 if options.toy else options.layers) as of_a_model:
        report.add("models", layers=options.layers)
        for warmer in warmers:
            warmer.wait()  # times are of a card that does nothing else
        report.add("kernels", processes=len(warmers))
        run: dict[str, Callable[[], None]] = {
            "attention": lambda: attention_part(report, target, options.toy),
            "linear": lambda: linear_part(report, target, options.toy),
            "step": lambda: step_part(report, *of_a_model, options.toy, STEPS),
            "prefill": lambda: prefill_part(report, *of_a_model, options.toy),
            "early": lambda: step_part(report, *of_a_model, options.toy, EARLY),
        }
        for part in parts:
            run[part]()
            if target.type == "cuda":
                torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
