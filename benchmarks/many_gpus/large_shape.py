"""The 70B shape with random weights over all GPUs: prefill and decode, dense and routed.

Its layers are spread by `device_map`, or its heads by the tensor-parallel plan. Weights are
made where they lie: 141 GB in 16 bit pass neither a disk nor the CPU.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import modlab
from benchmarks.many_gpus import worker
from benchmarks.many_gpus.parts import LARGE_BY_HEADS
from modlab.bench.models import SHAPES, Shape
from modlab.cache.bytes import snapshot
from modlab.errors import ModlabError

LENGTHS = (4096, 32768)
TOY = Shape(hidden=128, intermediate=128, layers=4, heads=16, kv_heads=8, vocab=256)
DECODED = 8


@dataclass(frozen=True)
class Kind:
    """How the model is converted (None: it stays dense), and what share is kept."""

    settings: dict[str, Any] | None = None
    share: float = 1.0


FIRST = {
    "dense": Kind(),
    "K/V, a quarter by layer": Kind({"skip": "kv"}, 0.25),
    "K/V, a quarter by KV head": Kind({"skip": "kv", "gates": "kv_head"}, 0.25),
}
THEN = {
    "the same by layer, leaving after two thirds": Kind({"skip": "kv+prompt", "leave_rank": 16}, 0.25),
    "alternate layers at 0.10": Kind({"skip": "layer", "layers": "alternate"}, 0.1),
}


@torch.no_grad()
def measured(options: argparse.Namespace) -> dict[str, Any]:
    """Seconds and bytes by length and kind, written after each; what tensor parallelism refuses says why."""
    began = time.perf_counter()
    shape, lengths = shape_of(options), (64, 300) if options.toy else LENGTHS
    make = by_heads if options.part == LARGE_BY_HEADS else spread
    model = make(shape, max(LENGTHS) + 64, _places(options), worker.dtype(options))
    found: dict[str, Any] = {"seconds until there": time.perf_counter() - began, "by length": {}}
    found["weight_bytes"] = worker.weight_bytes(model)
    for kinds, length in itertools.product((FIRST, THEN), lengths):
        ids = torch.randint(3, 250, (1, length), generator=torch.Generator().manual_seed(0)).to(model.device)
        rows = found["by length"].setdefault(str(length), {})
        for name, kind in kinds.items():
            worker.forget_peaks()
            rows[name] = _row(model, ids, kind)
            rows[name]["allocated"] = worker.allocated()
            worker.write(options, found)
            worker.tidy()  # this kind's cache
    planned = {
        str(length): worker.planned(options, shape.config(length), "inference", length) for length in lengths
    }
    return found | {"planned": planned}


def shape_of(options: argparse.Namespace) -> Shape:
    """The shape that a part is of."""
    return TOY if options.toy else SHAPES[options.model[0]]


def _places(options: argparse.Namespace) -> list[torch.device]:
    if not torch.cuda.is_available():
        return [torch.device("cpu")]
    return [torch.device("cuda", number) for number in range(min(options.gpus, torch.cuda.device_count()))]


def without_weights(shape: Shape, context: int, dtype: torch.dtype) -> Any:
    """A Llama on the meta device, in eval mode, whose weights get no gradient."""
    from transformers import LlamaForCausalLM

    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            model: Any = LlamaForCausalLM(shape.config(context)).eval()
    finally:
        torch.set_default_dtype(before)
    return model.requires_grad_(False)


def spread(shape: Shape, context: int, places: list[torch.device], dtype: torch.dtype) -> Any:
    """A Llama of random weights, its layers shared out among the places in their order, as accelerate spreads
    a model (`dispatch_model`)."""
    from accelerate import dispatch_model

    model = without_weights(shape, context, dtype)
    layers, first, last = model.model.layers, places[0], places[-1]
    of_layers = {f"model.layers.{i}": places[i * len(places) // len(layers)] for i in range(len(layers))}
    ends = {"model.embed_tokens": first, "model.rotary_emb": first, "model.norm": last, "lm_head": last}
    with first:
        model.model.rotary_emb = type(model.model.rotary_emb)(model.config)
    for name, place in (of_layers | ends).items():
        if name != "model.rotary_emb":
            filled(model.get_submodule(name), place, shape.layers)
    if len(places) > 1:
        numbers = {name: place.index for name, place in (of_layers | ends).items()}
        keys = model._skip_keys_device_placement  # a cache stays where its layers are
        model = dispatch_model(model, numbers, main_device=first.index, skip_keys=keys)
    return model


def by_heads(shape: Shape, context: int, places: list[torch.device], dtype: torch.dtype) -> Any:
    """A Llama of random weights, of whose heads each process has some, by transformers' plan. To it all
    weights are missing in a checkpoint, so that each process makes its parts, on its device.

    Args:
        places: of no account: a process has one device.
    """
    from transformers import LlamaForCausalLM

    config = shape.config(context)
    config.initializer_range = 0.02 / shape.layers**0.5  # in all maps alike: states stay small
    model: Any = LlamaForCausalLM.from_pretrained(
        None, config=config, state_dict={}, tp_plan="auto", dtype=dtype
    )
    return model.eval().requires_grad_(False)


@torch.no_grad()
def filled(module: nn.Module, place: torch.device, layers: int) -> None:
    """Gives a module of the device "meta" weights, small enough for as many layers."""
    module.to_empty(device=place)
    for name, weight in module.named_parameters():
        if weight.dim() == 1:
            weight.fill_(1.0)
        else:
            weight.normal_(0.0, 0.02 / (layers**0.5 if "o_proj" in name or "down_proj" in name else 1.0))


def _row(model: Any, ids: Tensor, kind: Kind) -> dict[str, Any]:
    """One kind with one prompt; a shorter one before it warms up."""
    routed = kind.settings is not None
    if kind.settings is not None:
        try:
            modlab.convert(model, modlab.MoDConfig(**{"layers": "all", "init_gate": 0.9, **kind.settings}))
        except ModlabError as refusal:
            return {"refused": str(refusal)}
    keep = functools.partial(by_chance, kind.share)
    try:
        with modlab.routing_override(model, keep) if routed else contextlib.nullcontext():
            _prompt(model, ids[:, : min(ids.shape[1], 2048)])
            seconds, output = _timed(functools.partial(_prompt, model, ids))
            finite = bool(output.logits.isfinite().all())
            steps = []
            for _ in range(DECODED):
                token = output.logits[:, -1:].argmax(-1).to(ids.device)
                more = {"past_key_values": output.past_key_values, "use_cache": True}
                second, output = _timed(functools.partial(model, token, **more))
                steps.append(second)
        row = {"prefill, s": seconds, "decode, ms": 1000 * statistics.median(steps[2:])}
        return row | {"finite": finite, "kv_bytes": _kv_bytes(output.past_key_values)}
    finally:
        if routed:
            modlab.revert(model)


def by_chance(share: float, layer: int, gate: Tensor, positions: Tensor) -> Tensor:
    """Keeps a share, each layer and head another: what it costs in time does not ask which."""
    position = positions if gate.dim() == 2 else positions[..., None]
    head = torch.arange(gate.shape[-1], device=gate.device) if gate.dim() == 3 else 0
    drawn = (position * 2654435761 + layer * 40503 + head * 69069) % 65536
    return drawn < share * 65536


def _prompt(model: Any, ids: Tensor) -> Any:
    return model(ids, use_cache=True, logits_to_keep=1)


def _timed(call: Callable[[], Any]) -> tuple[float, Any]:
    worker.wait()
    began = time.perf_counter()
    result = call()
    worker.wait()
    return time.perf_counter() - began, result


def _kv_bytes(cache: Any) -> dict[str, int]:
    """Of keys and values on each device, of all processes."""
    found: dict[str, int] = {}
    for row in snapshot(cache):
        name = worker.place_of(torch.device(row["device"]))
        found[name] = found.get(name, 0) + row["kv_bytes"]
    return worker.of_all(found)
