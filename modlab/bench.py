"""Benchmarks: dense and Mixture-of-Depths side by side in one run, as flat JSON rows that say what they are.

    modlab bench                                            lists the cases
    modlab bench prefill decode                             runs them on this machine
    modlab bench prefill --device cuda --shape llama-3-8b --context 4096 32768
    modlab bench --plot RESULT.json                         speed-up against keep ratio, as a page

Every case measures the dense model and all Mixture-of-Depths variants in turn, round after round in rotating
order, so that whatever else the machine does hits all of them, and reports medians with the fastest and the
slowest round. The two models share their weights. Which tokens are kept is forced by `routing_override` with
seeded random masks of an exact ratio, except in `demo`, which routes by its trained gates.

`ideal` is what the skipped work alone would give: for prefill the share of floating-point operations (linear
layers and causal attention), for decode the share of bytes read (weights of the layers that run, and their
cached keys and values), because one token at a time waits for memory.

Shape letters: B rows, T tokens in, L layers.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import dataclasses
import datetime
import json
import operator
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers

from modlab import __version__
from modlab.cache_argument import cache_argument, given_cache
from modlab.errors import ModlabError
from modlab.kv_bytes import snapshot
from modlab.measure import as_batches, context_length, evaluate, synchronize, time_generate

Row = dict[str, Any]
SCHEMA_VERSION = 1
DEMO_WINDOWS = 16  # of one context each, over which the demo case takes the loss
ROW_KEYS = (
    "case",
    "what",
    "shape",
    "context",
    "batch",
    "routed",
    "keep_ratio",
    "dense_ms",
    "mod_ms",
    "speedup",
    "ideal",
    "kv_bytes",
    "dense_kv_bytes",
    "kv_saving",
)
"""Keys that every row has; `what` is "prefill" (ms a call) or "decode" (ms a token). More may follow."""


@dataclass(frozen=True)
class Shape:
    """Size of a Llama-architecture model with random weights."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocab: int

    def config(self, context: int) -> transformers.LlamaConfig:
        """Its transformers config, for `context` tokens."""
        return transformers.LlamaConfig(
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            vocab_size=self.vocab,
            max_position_embeddings=context,
        )


SHAPES = {
    "tiny": Shape(hidden=64, intermediate=128, layers=4, heads=4, kv_heads=2, vocab=256),
    "wide": Shape(hidden=1024, intermediate=2816, layers=8, heads=16, kv_heads=8, vocab=4096),
    "llama-3-8b": Shape(hidden=4096, intermediate=14336, layers=32, heads=32, kv_heads=8, vocab=128256),
}


@dataclass
class Settings:
    """What the command line chose."""

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    dtype: torch.dtype = torch.float32
    shape: str = "wide"
    contexts: Sequence[int] = (2048,)
    batch: int = 1
    routed: str = "alternate"
    ratios: Sequence[float] = (0.10, 0.25, 0.50, 1.00)
    repeats: int = 7
    decode_tokens: int = 40
    seed: int = 0


Case = Callable[[Settings], list[Row]]
CASES: dict[str, Case] = {}


def case(run: Case) -> Case:
    """Registers a benchmark under its function's name; its docstring's first line is what the list shows."""
    CASES[run.__name__] = run
    return run


class Skipped(ModlabError):
    """This case cannot run here; the message says what it lacks."""


# ---------------------------------------------------------------------------- models, masks, clocks


def routed_layers(which: str, num_layers: int) -> list[int]:
    """Indices of routed layers: "alternate" (1, 3, 5, ...), "most" (all but two at each end) or "all"."""
    choices = {
        "alternate": list(range(1, num_layers, 2)),
        "most": list(range(2, num_layers - 2)),
        "all": list(range(num_layers)),
    }
    if not choices.get(which):
        raise ModlabError(
            f"routed={which!r} names no layer of {num_layers}; choose one of {', '.join(choices)}."
        )
    return choices[which]


def model_pair(settings: Settings, context: int, routed: list[int]) -> tuple[Any, Any]:
    """A dense model with random weights and its converted twin on the same weight tensors."""
    from modlab.config import MoDConfig
    from modlab.convert import convert

    torch.manual_seed(settings.seed)
    before = torch.get_default_dtype()
    torch.set_default_dtype(settings.dtype)
    try:
        with settings.device:
            dense: Any = transformers.LlamaForCausalLM(SHAPES[settings.shape].config(context)).eval()
    finally:
        torch.set_default_dtype(before)
    dense.requires_grad_(False)
    twin = copy.deepcopy(dense, {id(p): p for p in dense.parameters()})
    return dense, convert(twin, MoDConfig(layers=routed)).eval()


def random_routing(
    layers: list[int], batch: int, spans: Sequence[int], ratio: float, seed: int, device: torch.device
) -> Callable[[int, torch.Tensor, torch.Tensor], torch.Tensor]:
    """A `routing_override` function: random tokens, in each row and layer exactly round(ratio x span) of each
    span.

    Args:
        layers: routed layers.
        batch: rows B.
        spans: lengths of consecutive stretches of positions (the prompt, then each stretch of decoding).
        ratio: share of tokens kept.
        seed: of the masks.
        device: where the masks live.
    """
    generator = torch.Generator().manual_seed(seed)
    masks: dict[int, torch.Tensor] = {}
    for layer in layers:
        pieces = [
            torch.rand(batch, span, generator=generator).argsort(1) < round(ratio * span) for span in spans
        ]
        masks[layer] = torch.cat(pieces, 1).to(device)

    def keep(layer_idx: int, gate: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        return masks[layer_idx].gather(1, position_ids.clamp_min(0))

    return keep


@dataclass
class Times:
    """Rounds of one call.

    Attributes:
        wall: milliseconds by the clock: what a user waits.
        cpu: milliseconds that this process computed, over all its threads; hardly moved by what else runs on
            the machine, so a speed-up seen only in `wall` on a busy machine is chance.
    """

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)


def interleaved(
    calls: Mapping[str, Callable[[], Any]], repeats: int, device: torch.device, per: int = 1, warmup: int = 1
) -> dict[str, Times]:
    """Times of each call, `repeats` rounds after `warmup` untimed ones, the order rotating from round to
    round.

    Args:
        calls: what to time, by name.
        repeats: rounds that count.
        device: waited for before and after each call.
        per: the times are divided by this (tokens that one call decodes).
        warmup: rounds before those.
    """
    times = {name: Times() for name in calls}
    names = list(calls)
    for turn in range(warmup + repeats):
        shift = turn % len(names)
        for name in names[shift:] + names[:shift]:
            synchronize(device)
            start, cpu_start = time.perf_counter(), time.process_time()
            result = calls[name]()
            synchronize(device)
            elapsed, cpu = time.perf_counter() - start, time.process_time() - cpu_start
            del result  # a cache must not be alive while the next call allocates its own
            if turn >= warmup:
                times[name].wall.append(elapsed * 1e3 / per)
                if device.type == "cpu":
                    times[name].cpu.append(cpu * 1e3 / per)
    return times


def make_row(dense: Times, mod: Times, **fields: Any) -> Row:
    """One flat row from the rounds' times, `fields` holding the rest of `ROW_KEYS`.

    `speedup` is the ratio of the medians, `speedup_paired` the median of the rounds' own ratios,
    `speedup_cpu_time` (cases on the CPU) that of the medians of computing time.
    """
    dense_ms, mod_ms = statistics.median(dense.wall), statistics.median(mod.wall)
    row = fields | {
        "dense_ms": round(dense_ms, 4),
        "mod_ms": round(mod_ms, 4),
        "speedup": round(dense_ms / mod_ms, 3),
        "ideal": round(fields["ideal"], 3),
        "keep_ratio": round(fields["keep_ratio"], 4),
        "kv_saving": round(fields["dense_kv_bytes"] / fields["kv_bytes"], 3),
        "speedup_paired": round(statistics.median(map(operator.truediv, dense.wall, mod.wall)), 3),
        "rounds": len(dense.wall),
        "dense_ms_min": round(min(dense.wall), 4),
        "dense_ms_max": round(max(dense.wall), 4),
        "mod_ms_min": round(min(mod.wall), 4),
        "mod_ms_max": round(max(mod.wall), 4),
    }
    if dense.cpu and mod.cpu:
        dense_cpu, mod_cpu = statistics.median(dense.cpu), statistics.median(mod.cpu)
        row |= {
            "dense_cpu_ms": round(dense_cpu, 4),
            "mod_cpu_ms": round(mod_cpu, 4),
            "speedup_cpu_time": round(dense_cpu / mod_cpu, 3),
        }
    return {key: row[key] for key in ROW_KEYS} | {k: v for k, v in row.items() if k not in ROW_KEYS}


def _cache_facts(cache: Any, routed: list[int], batch: int) -> tuple[int, float]:
    """Allocated bytes of a cache, and the measured keep ratio: tokens stored in routed layers / tokens seen
    there."""
    layers = snapshot(cache)
    kept = statistics.fmean(layers[i]["kept_tokens"] / (layers[i]["seen_tokens"] * batch) for i in routed)
    return sum(row["kv_bytes"] for row in layers), kept


def _layer_weights(config: Any) -> int:
    """Weights of one decoder layer's linear maps (attention and gated MLP)."""
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    attention = 2 * config.hidden_size * head_dim * (config.num_attention_heads + config.num_key_value_heads)
    return attention + 3 * config.hidden_size * config.intermediate_size


def ideal_prefill(config: Any, tokens: int, kept: dict[int, float]) -> float:
    """Dense FLOPs / remaining FLOPs of a prefill of `tokens` when layer i runs on the share `kept[i]` of
    them."""

    def flops(share: float) -> float:
        attention = 2 * (share * tokens) ** 2 * config.hidden_size  # causal: half of QK^T and half of AV
        return 2 * share * tokens * _layer_weights(config) + attention

    total = config.num_hidden_layers
    return total * flops(1.0) / sum(flops(kept.get(i, 1.0)) for i in range(total))


def ideal_decode(config: Any, tokens: int, batch: int, kept: dict[int, float], bytes_each: int) -> float:
    """Dense bytes / bytes still read for one token of each of `batch` rows at a context of `tokens`.

    A layer's weights are read when any row keeps its token (rows taken as independent).
    """
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    kv_token = 2 * config.num_key_value_heads * head_dim

    def read(share: float) -> float:
        weights = _layer_weights(config) * (1 - (1 - share) ** batch)
        return weights + batch * share * share * tokens * kv_token  # kept rows read the kept tokens' K/V

    head = config.vocab_size * config.hidden_size
    total = config.num_hidden_layers
    dense, mod = (head + sum(read(k.get(i, 1.0)) for i in range(total)) for k in ({}, kept))
    return dense * bytes_each / (mod * bytes_each)


@contextlib.contextmanager
def _no_grad_override(model: Any, fn: Any | None) -> Iterator[None]:
    from modlab.routing import routing_override

    with torch.no_grad(), contextlib.nullcontext() if fn is None else routing_override(model, fn):
        yield


# ---------------------------------------------------------------------------- cases


@case
def prefill(settings: Settings) -> list[Row]:
    """Prompt of each context through a Llama-shaped model, forced random routing."""
    rows: list[Row] = []
    for context in settings.contexts:
        routed = routed_layers(settings.routed, SHAPES[settings.shape].layers)
        dense, mod = model_pair(settings, context, routed)
        ids = torch.randint(0, dense.config.vocab_size, (settings.batch, context), device=settings.device)

        def call(model: Any, fn: Any | None, ids: torch.Tensor = ids) -> Any:
            with _no_grad_override(model, fn):
                return given_cache(model(ids, use_cache=True, logits_to_keep=1))

        routing = {
            r: random_routing(routed, settings.batch, [context], r, settings.seed, settings.device)
            for r in settings.ratios
        }
        facts = {ratio: _cache_facts(call(mod, fn), routed, settings.batch) for ratio, fn in routing.items()}
        dense_bytes, _ = _cache_facts(call(dense, None), routed, settings.batch)
        calls = {"dense": partial(call, dense, None)}
        calls |= {f"mod {r}": partial(call, mod, fn) for r, fn in routing.items()}
        times = interleaved(calls, settings.repeats, settings.device)
        for ratio in settings.ratios:
            kv_bytes, kept = facts[ratio]
            rows.append(
                make_row(
                    times["dense"],
                    times[f"mod {ratio}"],
                    case=_case_name("prefill", settings.device),
                    what="prefill",
                    shape=settings.shape,
                    context=context,
                    batch=settings.batch,
                    routed=f"{len(routed)} of {dense.config.num_hidden_layers}",
                    keep_ratio=kept,
                    ideal=ideal_prefill(dense.config, context, dict.fromkeys(routed, ratio)),
                    kv_bytes=kv_bytes,
                    dense_kv_bytes=dense_bytes,
                )
            )
        del dense, mod
    return rows


@case
def decode(settings: Settings) -> list[Row]:
    """Greedy decoding, one token a row and forward, after a prompt of each context; forced random routing."""
    rows: list[Row] = []
    n = settings.decode_tokens
    rounds = settings.repeats + 1  # one warms up; each continues where the one before stopped
    for context in settings.contexts:
        routed = routed_layers(settings.routed, SHAPES[settings.shape].layers)
        dense, mod = model_pair(settings, context + n * rounds, routed)
        ids = torch.randint(0, dense.config.vocab_size, (settings.batch, context), device=settings.device)
        spans = [context] + [n] * rounds
        variants: dict[str, tuple[Any, Any]] = {"dense": (dense, None)}
        for r in settings.ratios:
            routing = random_routing(routed, settings.batch, spans, r, settings.seed, settings.device)
            variants[f"mod {r}"] = (mod, routing)
        state: dict[str, Any] = {}
        for name, (model, fn) in variants.items():
            with _no_grad_override(model, fn):
                out: Any = model(ids, use_cache=True, logits_to_keep=1)
            state[name] = (given_cache(out), out.logits[:, -1:].argmax(-1))

        def stretch(name: str, state: Any = state, variants: Any = variants) -> None:
            model, fn = variants[name]
            cache, token = state[name]
            with _no_grad_override(model, fn):
                for _ in range(n):
                    out = model(token, use_cache=True, **{cache_argument(model): cache})
                    token = out.logits[:, -1:].argmax(-1)
            state[name] = (cache, token)

        calls = {name: partial(stretch, name) for name in variants}
        times = interleaved(calls, settings.repeats, settings.device, per=n)
        facts = {name: _cache_facts(cache, routed, settings.batch) for name, (cache, _) in state.items()}
        for ratio in settings.ratios:
            kv_bytes, kept = facts[f"mod {ratio}"]
            rows.append(
                make_row(
                    times["dense"],
                    times[f"mod {ratio}"],
                    case=_case_name("decode", settings.device),
                    what="decode",
                    shape=settings.shape,
                    context=context,
                    batch=settings.batch,
                    routed=f"{len(routed)} of {dense.config.num_hidden_layers}",
                    keep_ratio=kept,
                    ideal=ideal_decode(
                        dense.config,
                        context,
                        settings.batch,
                        dict.fromkeys(routed, ratio),
                        settings.dtype.itemsize,
                    ),
                    kv_bytes=kv_bytes,
                    dense_kv_bytes=facts["dense"][0],
                    decode_tokens=n,
                )
            )
        del dense, mod, variants, state
    return rows


@case
def demo(settings: Settings) -> list[Row]:
    """The demo twin against demo-dense on real Python source, through generate; trained gates route."""
    import modlab

    try:
        models: list[Any] = []
        for name in ("demo-dense", "demo"):
            model, tokenizer = modlab.load(name, dtype=settings.dtype)
            models.append(model)
    except (ModlabError, OSError, ImportError) as error:
        raise Skipped(f"demo: the demo models are not here ({error})") from error
    dense, mod = (model.to(settings.device).eval() for model in models)
    source = Path(argparse.__file__).read_text(encoding="utf-8")
    limit = min(context_length(dense), max(settings.contexts)) - settings.decode_tokens - 1
    batches = as_batches(source, tokenizer, limit)[:DEMO_WINDOWS]
    ids = batches[0]["input_ids"]
    routed = list(mod.mod.layers)
    quality = {"dense": evaluate(dense, batches), "mod": evaluate(mod, batches)}
    facts = {}
    for name, model in (("dense", dense), ("mod", mod)):
        with torch.no_grad():
            cache = given_cache(model(ids.to(settings.device), use_cache=True))
        facts[name] = _cache_facts(cache, routed, 1)
    timed: dict[str, list[tuple[float, float]]] = {"dense": [], "mod": []}
    for turn in range(settings.repeats + 1):
        for name, model in (("dense", dense), ("mod", mod))[:: 1 if turn % 2 else -1]:
            result = time_generate(model, ids, settings.decode_tokens)
            if turn:
                timed[name].append(result)
    kept = quality["mod"].keep_ratio_by_layer
    rows = []
    for index, what in enumerate(("prefill", "decode")):
        ideal = (
            ideal_prefill(dense.config, ids.shape[1], kept)
            if what == "prefill"
            else ideal_decode(dense.config, ids.shape[1], 1, kept, settings.dtype.itemsize)
        )
        rows.append(
            make_row(
                Times([t[index] for t in timed["dense"]]),
                Times([t[index] for t in timed["mod"]]),
                case=_case_name("demo", settings.device),
                what=what,
                shape="demo",
                context=ids.shape[1],
                batch=1,
                routed=f"{len(routed)} of {dense.config.num_hidden_layers}",
                keep_ratio=facts["mod"][1],
                ideal=ideal,
                kv_bytes=facts["mod"][0],
                dense_kv_bytes=facts["dense"][0],
                decode_tokens=settings.decode_tokens,
                text=f"argparse.py of Python {platform.python_version()}",
                text_keep_ratio=round(quality["mod"].keep_ratio, 4),
                dense_loss=round(quality["dense"].loss, 4),
                mod_loss=round(quality["mod"].loss, 4),
            )
        )
    return rows


# ---------------------------------------------------------------------------- results


def _case_name(name: str, device: torch.device) -> str:
    return f"{name}_{'cpu' if device.type == 'cpu' else 'gpu'}"


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return device.type
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _commit() -> str | None:
    """The commit of the source tree this runs from, "-dirty" added if files differ; None if it is not one."""
    root = Path(__file__).resolve().parent.parent
    try:
        head, status = (
            subprocess.run(
                ["git", "-C", str(root), *words], capture_output=True, text=True, check=True
            ).stdout.strip()
            for words in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return head + ("-dirty" if status else "")


def _without(flags: Sequence[str], argv: Sequence[str]) -> list[str]:
    """The arguments less these flags and their values: where a file went is not needed to repeat the run."""
    return [
        word
        for before, word in zip(["", *argv], argv, strict=False)
        if before not in flags and word.split("=", 1)[0] not in flags
    ]


def circumstances(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """What every published figure carries: date, device, dtype and versions."""
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": device.type,
        "device_name": _device_name(device),
        "dtype": str(dtype).removeprefix("torch."),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "modlab": __version__,
        },
    }


def report(
    name: str, rows: list[Row], settings: Settings, argv: Sequence[str], load_before: Any
) -> dict[str, Any]:
    """A result file's content: the rows and everything needed to judge and to repeat them."""
    cpu = settings.device.type == "cpu"
    return {
        "schema": SCHEMA_VERSION,
        "what": name,
        "command": shlex.join(["modlab", "bench", *_without(("--out", "--commit"), argv)]),
        "commit": _commit(),
        **circumstances(settings.device, settings.dtype),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        # 1-minute load averages before and after: above the threads used here, something else was running
        "load": {"before": load_before, "after": _load()} if cpu else None,
        "settings": {
            field.name: str(value) if isinstance(value, (torch.device, torch.dtype)) else value
            for field in dataclasses.fields(settings)
            for value in [getattr(settings, field.name)]
        },
        "rows": rows,
    }


def _load() -> float | None:
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def save(result: dict[str, Any], folder: Path) -> Path:
    """Writes `<what>_<device>_<date>.json` whole or not at all; a second run of a day gets a number."""
    folder.mkdir(parents=True, exist_ok=True)
    device = "cpu" if result["device"] == "cpu" else "-".join(result["device_name"].lower().split())
    stem = f"{result['what']}_{device}_{result['date'][:10]}"
    path = folder / f"{stem}.json"
    number = 2
    while path.exists():
        path = folder / f"{stem}-{number}.json"
        number += 1
    temporary = path.with_suffix(".tmp")
    try:
        temporary.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def table(rows: Sequence[Row]) -> str:
    """The rows as aligned text."""
    columns = {
        "case": "case",
        "what": "what",
        "context": "context",
        "batch": "batch",
        "routed": "routed",
        "keep_ratio": "keep",
        "dense_ms": "dense ms",
        "mod_ms": "MoD ms",
        "speedup": "speed-up",
        "ideal": "ideal",
        "kv_saving": "KV saving",
    }
    cells = [list(columns.values())]
    for row in rows:
        cells.append([f"{row[c]:.2f}" if isinstance(row[c], float) else str(row[c]) for c in columns])
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    return "\n".join("  ".join(cell.rjust(w) for cell, w in zip(line, widths, strict=True)) for line in cells)


def plot(result: dict[str, Any]) -> Any:
    """Speed-up against keep ratio with the ideal, one colour a measured case, as a plotly figure."""
    try:
        import plotly.graph_objects as go
    except ImportError as error:
        raise ModlabError("bench --plot needs plotly: pip install plotly") from error
    groups: dict[str, list[Row]] = {}
    for row in result["rows"]:
        label = "{what}, {shape}, {context} tokens, batch {batch}, {routed} routed".format_map(row)
        groups.setdefault(label, []).append(row)
    colours = ("#3366cc", "#dc3912", "#109618", "#990099", "#0099c6", "#dd4477", "#66aa00", "#b82e2e")
    figure = go.Figure()
    for number, (label, rows) in enumerate(groups.items()):
        rows = sorted(rows, key=lambda row: row["keep_ratio"])
        line = {"color": colours[number % len(colours)]}
        for name, key, dash in ((label, "speedup", "solid"), (f"{label}: ideal", "ideal", "dot")):
            figure.add_scatter(
                x=[row["keep_ratio"] for row in rows],
                y=[row[key] for row in rows],
                name=name,
                mode="lines+markers" if key == "speedup" else "lines",
                line=line | {"dash": dash},
            )
    figure.add_hline(y=1.0, line_width=1, line_color="grey")
    figure.update_layout(
        title=f"{result['what']} on {result['device_name']}, {result['dtype']}, {result['date'][:10]}",
        xaxis_title="keep ratio of routed layers",
        yaxis_title="speed-up over dense",
        legend={"orientation": "h", "y": -0.2},
    )
    return figure


# ---------------------------------------------------------------------------- command line


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="modlab bench",
        description="Dense beside Mixture-of-Depths, measured on this machine. Without a case: the list.",
    )
    parser.add_argument("cases", nargs="*", metavar="CASE", help="cases to run, or 'all'")
    parser.add_argument("--device", default="cpu", help="cpu (default), cuda, cuda:1, ...")
    parser.add_argument("--dtype", help="float32 (default on cpu), bfloat16 (default elsewhere) or float16")
    parser.add_argument("--shape", default="wide", choices=sorted(SHAPES), help="model size (default: wide)")
    parser.add_argument(
        "--context", type=int, nargs="+", default=[2048], metavar="T", help="prompt tokens (2048)"
    )
    parser.add_argument("--batch", type=int, default=1, metavar="B", help="rows (1)")
    parser.add_argument(
        "--routed", default="alternate", choices=("alternate", "most", "all"), help="routed layers"
    )
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.10, 0.25, 0.50, 1.00], metavar="R")
    parser.add_argument("--repeats", type=int, default=7, metavar="N", help="timed rounds (7)")
    parser.add_argument(
        "--decode-tokens", type=int, default=40, metavar="N", help="tokens decoded a round (40)"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--out", type=Path, default=Path("benchmarks/results"), help="folder for the result files"
    )
    parser.add_argument(
        "--commit", metavar="HASH", help="commit of this source tree, where git is not there to ask"
    )
    parser.add_argument("--no-save", action="store_true", help="print only")
    parser.add_argument(
        "--plot", type=Path, metavar="RESULT", help="draw a result file as an HTML page beside it"
    )
    return parser


def _settings(options: argparse.Namespace) -> Settings:
    try:
        device = torch.device(options.device)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ModlabError(f"--device {options.device}: {reason}") from error
    name = options.dtype or ("float32" if device.type == "cpu" else "bfloat16")
    dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}.get(name)
    if dtype is None:
        raise ModlabError(f"--dtype {name}: choose float32, bfloat16 or float16.")
    for flag, value in (
        ("--batch", options.batch),
        ("--repeats", options.repeats),
        ("--context", min(options.context)),
    ):
        if value < 1:
            raise ModlabError(f"{flag} {value}: must be at least 1.")
    for ratio in options.ratios:
        if not 0.0 < ratio <= 1.0:
            raise ModlabError(f"--ratios {ratio}: a keep ratio lies in (0, 1].")
    return Settings(
        device=device,
        dtype=dtype,
        shape=options.shape,
        contexts=tuple(options.context),
        batch=options.batch,
        routed=options.routed,
        ratios=tuple(options.ratios),
        repeats=options.repeats,
        decode_tokens=options.decode_tokens,
        seed=options.seed,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Runs cases, prints their tables and writes their result files.

    Args:
        argv: arguments after `modlab bench`; those of the process by default.

    Returns:
        exit status: 0, or 1 if every case asked for was skipped.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    options = _parser().parse_args(argv)
    if options.plot:
        try:
            result = json.loads(options.plot.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ModlabError(f"--plot {options.plot}: not a readable result file ({error}).") from error
        page = options.plot.with_suffix(".html")
        plot(result).write_html(page, include_plotlyjs=True)
        print(f"wrote {page}")
        return 0
    if not options.cases:
        for name, run in CASES.items():
            print(f"{name:10} {(run.__doc__ or '').splitlines()[0]}")
        print("\nrun them with: modlab bench CASE ... (modlab bench --help lists sizes and devices)")
        return 0
    names = list(CASES) if options.cases == ["all"] else options.cases
    for name in names:
        if name not in CASES:
            raise ModlabError(f"there is no benchmark {name!r}; there are {', '.join(CASES)}.")
    settings = _settings(options)
    ran = 0
    for name in names:
        load_before = _load()
        try:
            rows = CASES[name](settings)
        except Skipped as reason:
            print(f"skipped {reason}")
            continue
        ran += 1
        result = report(name, rows, settings, argv, load_before)
        result["commit"] = result["commit"] or options.commit
        print(table(rows))
        if not options.no_save:
            print(f"wrote {save(result, options.out)}")
    return 0 if ran else 1


if __name__ == "__main__":
    raise SystemExit(main())
