"""Cases of the ordinary path: forwards of the model itself, and the demo pair through generate."""

from __future__ import annotations

import argparse
import contextlib
import platform
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from modlab.bench.clock import Times, interleaved
from modlab.bench.ideal import ideal_decode, ideal_prefill
from modlab.bench.models import converted_twin, dense_model, depth, random_routing, routed_layers
from modlab.bench.registry import Row, Settings, Skipped, case
from modlab.bench.rows import cache_facts, make_row
from modlab.errors import ModlabError
from modlab.hf.names import cache_argument, given_cache
from modlab.measure import as_batches, context_length, evaluate, time_generate
from modlab.skips import named

DEMO_WINDOWS = 16  # of one context each, over which the demo case takes the loss


@contextlib.contextmanager
def _no_grad_override(model: Any, fn: Any | None) -> Iterator[None]:
    from modlab.routing.state import routing_override

    with torch.no_grad(), contextlib.nullcontext() if fn is None else routing_override(model, fn):
        yield


def _row(
    settings: Settings,
    name: str,
    context: int,
    dense: Any,
    routed: list[int],
    times: dict[str, Times],
    ratio: float,
    ideal: float,
    facts: dict[float, tuple[int, float]],
    dense_bytes: int,
) -> Row:
    """The row of one keep ratio; `facts` holds allocated bytes and measured keep ratio by ratio."""
    kv_bytes, kept = facts[ratio]
    if named(settings.skip).runs_all or named(settings.skip).stores_all:  # the cache does not tell
        kept = ratio
    return make_row(
        times["dense"],
        times[f"mod {ratio}"],
        case=name,
        shape=settings.shape,
        context=context,
        batch=settings.batch,
        routed=settings.routed,
        routed_layers=len(routed),
        num_layers=dense.config.num_hidden_layers,
        keep_ratio=kept,
        ideal=ideal,
        kv_bytes=kv_bytes,
        dense_kv_bytes=dense_bytes,
        skip=settings.skip,
    )


@case
def prefill(settings: Settings) -> Iterator[Row]:
    """Prompt of each context through a Llama-shaped model, forced random routing."""
    for context in settings.contexts:
        routed = routed_layers(settings.routed, depth(settings))
        dense = dense_model(settings, context)
        mod = converted_twin(dense, routed, settings.skip)
        ids = torch.randint(0, dense.config.vocab_size, (settings.batch, context), device=settings.device)

        def call(model: Any, fn: Any | None, ids: torch.Tensor = ids) -> Any:
            with _no_grad_override(model, fn):
                return given_cache(model(ids, use_cache=True, logits_to_keep=1))

        routing = {
            r: random_routing(routed, settings.batch, [context], r, settings.seed, settings.device)
            for r in settings.ratios
        }
        facts = {ratio: cache_facts(call(mod, fn), routed, settings.batch) for ratio, fn in routing.items()}
        dense_bytes, _ = cache_facts(call(dense, None), routed, settings.batch)
        calls = {"dense": partial(call, dense, None)}
        calls |= {f"mod {r}": partial(call, mod, fn) for r, fn in routing.items()}
        times = interleaved(calls, settings.repeats, settings.device)
        lengths = [context] * settings.batch
        for ratio in settings.ratios:
            ideal = ideal_prefill(dense.config, lengths, dict.fromkeys(routed, ratio), settings.mod)
            yield _row(settings, "prefill", context, dense, routed, times, ratio, ideal, facts, dense_bytes)
        del dense, mod


@case
def decode(settings: Settings) -> Iterator[Row]:
    """Greedy decoding, one token a row and forward, after a prompt of each context; forced random routing."""
    n = settings.decode_tokens
    rounds = settings.repeats + 1  # one warms up; each continues where the one before stopped
    for context in settings.contexts:
        routed = routed_layers(settings.routed, depth(settings))
        dense = dense_model(settings, context + n * rounds)
        mod = converted_twin(dense, routed, settings.skip)
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
        dense_bytes, _ = cache_facts(state["dense"][0], routed, settings.batch)
        facts = {r: cache_facts(state[f"mod {r}"][0], routed, settings.batch) for r in settings.ratios}
        lengths = [context] * settings.batch
        for ratio in settings.ratios:
            shares = dict.fromkeys(routed, ratio)
            ideal = ideal_decode(dense.config, lengths, shares, settings.dtype.itemsize, settings.mod)
            row = _row(settings, "decode", context, dense, routed, times, ratio, ideal, facts, dense_bytes)
            yield row | {"decode_tokens": n}
        del dense, mod, variants, state


@case
def demo(settings: Settings) -> Iterator[Row]:
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
    reach = min(context_length(dense) or max(settings.contexts), max(settings.contexts))
    limit = reach - settings.decode_tokens - 1
    batches = as_batches(source, tokenizer, limit)[:DEMO_WINDOWS]
    ids = batches[0]["input_ids"]
    routed = list(mod.mod.layers)
    quality = {"dense": evaluate(dense, batches), "mod": evaluate(mod, batches)}
    facts = {}
    for name, model in (("dense", dense), ("mod", mod)):
        with torch.no_grad():
            cache = given_cache(model(ids.to(settings.device), use_cache=True))
        facts[name] = cache_facts(cache, routed, 1)
    timed: dict[str, list[tuple[float, float]]] = {"dense": [], "mod": []}
    for turn in range(settings.repeats + 1):
        for name, model in (("dense", dense), ("mod", mod))[:: 1 if turn % 2 else -1]:
            result = time_generate(model, ids, settings.decode_tokens)
            if turn:
                timed[name].append(result)
    kept = quality["mod"].keep_ratio_by_layer
    for index, what in enumerate(("prefill", "decode")):
        ideal = (
            ideal_prefill(dense.config, [ids.shape[1]], kept)
            if what == "prefill"
            else ideal_decode(dense.config, [ids.shape[1]], kept, settings.dtype.itemsize)
        )
        yield (
            make_row(
                Times([t[index] for t in timed["dense"]]),
                Times([t[index] for t in timed["mod"]]),
                case=what,
                shape="demo",
                context=ids.shape[1],
                batch=1,
                routed="demo",
                routed_layers=len(routed),
                num_layers=dense.config.num_hidden_layers,
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
