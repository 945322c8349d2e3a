"""Case `generate`: what a user of `model.generate` waits for, with fast generation on.

Shape letters: B rows, T tokens in, L layers.
"""

from __future__ import annotations

import contextlib
import dataclasses
import random
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from modlab.bench.clock import Times
from modlab.bench.ideal import DENSE, ideal_decode, ideal_prefill, kv_token_bytes
from modlab.bench.models import converted_twin, dense_model, depth, random_routing, routed_layers
from modlab.bench.registry import Row, Settings, case
from modlab.bench.rows import make_row
from modlab.engine import disable_fast_generation, enable_fast_generation, fast_generation_report
from modlab.engine.compiled import LONG_LINE
from modlab.engine.prefill_layers import MLP_CHUNK
from modlab.errors import ModlabError
from modlab.measure import time_generate
from modlab.routing.state import routing_override
from modlab.routing.table import RoutingTable
from modlab.skips import named

WARM_UP_TOKENS = MLP_CHUNK + LONG_LINE
"""Enough to compile what a long prompt compiles: shorter ones have MLPs in one piece, and still shorter ones
run the other way of `engine/deferred.py`."""


@dataclass(frozen=True)
class Variant:
    """One Mixture-of-Depths model to measure: which layers are routed, and the share they keep."""

    routed: str
    ratio: float


class Workload:
    """A batch of random prompts, and the dense model with its converted twins on the same weights.

    Args:
        settings: device, dtype, seed.
        dense: the dense model.
        twins: converted models by the name of their routed layers.
        lengths: tokens of each row's prompt; shorter rows are padded on the left.
        tokens: new tokens of each row.
    """

    def __init__(
        self, settings: Settings, dense: Any, twins: dict[str, Any], lengths: Sequence[int], tokens: int
    ) -> None:
        self.settings, self.dense, self.twins = settings, dense, twins
        self.lengths, self.tokens = list(lengths), tokens
        self.generate_settings: dict[str, Any] = {}  # passed on to every `generate`
        B, T = len(lengths), max(lengths)
        generator = torch.Generator().manual_seed(settings.seed)
        ids_BT = torch.randint(1, dense.config.vocab_size, (B, T), generator=generator)
        mask_BT = torch.ones(B, T, dtype=torch.long)
        for row, n in enumerate(lengths):
            mask_BT[row, : T - n] = 0
        self.ids_BT, self.mask_BT = ids_BT.to(settings.device), mask_BT.to(settings.device)

    def routing(self, variant: Variant) -> RoutingTable:
        """Which tokens the variant keeps: exactly its share of the prompt, and of what is generated."""
        spans = [max(self.lengths), self.tokens]
        layers = self.twins[variant.routed].mod.layers
        seed, device = self.settings.seed, self.settings.device
        return random_routing(layers, len(self.lengths), spans, variant.ratio, seed, device)

    def times(
        self, variants: Sequence[Variant], repeats: int, whole_warm_up: bool = True
    ) -> dict[Variant | None, tuple[Times, Times]]:
        """Times to the first and to each further token, the dense model's under None.

        Each turn has an order of its own: what comes after a call that left the GPU cool has a higher clock.

        Args:
            whole_warm_up: False where a whole prompt is too long to throw away: only its last tokens warm up.
        """
        calls: dict[Variant | None, Any] = {None: (self.dense, None)}
        calls |= {v: (self.twins[v.routed], self.routing(v)) for v in variants}
        times: dict[Variant | None, tuple[Times, Times]] = {name: (Times(), Times()) for name in calls}
        self.last: dict[Variant | None, dict[str, Any]] = {}
        names = list(calls)
        for turn in range(repeats + 1):
            for name in random.Random(turn).sample(names, len(names)):
                model, table = calls[name]
                ids, mask = self.ids_BT, self.mask_BT
                if turn == 0 and not whole_warm_up:
                    ids, mask = ids[:, -WARM_UP_TOKENS:], mask[:, -WARM_UP_TOKENS:]
                override = contextlib.nullcontext() if table is None else routing_override(model, table)
                with override:
                    first, each = self.timed(model, ids, mask, **self.generate_settings)
                self.last[name] = fast_generation_report(model)["last"]
                if not self.last[name]["fast"]:
                    raise ModlabError(f"generate ran without the engine: {self.last[name]['why']}")
                if turn:
                    times[name][0].wall.append(first)
                    times[name][1].wall.append(each)
        return times

    def timed(self, model: Any, ids_BT: Tensor, mask_BT: Tensor, **settings: Any) -> tuple[float, float]:
        """ms to the first token of each row, and to each further one."""
        return time_generate(model, ids_BT, self.tokens - 1, mask_BT, **settings)

    def static_times(self, repeats: int) -> tuple[Times, Times]:
        """The dense model by transformers' own static cache, whose decoding `generate` compiles."""
        disable_fast_generation(self.dense)
        first, each = Times(), Times()
        try:
            for turn in range(repeats + 1):
                result = self.timed(self.dense, self.ids_BT, self.mask_BT, cache_implementation="static")
                if turn:
                    first.wall.append(result[0])
                    each.wall.append(result[1])
        finally:
            enable_fast_generation(self.dense, check=False)
        return first, each

    def static_rows(self, variant: Variant, repeats: int) -> Iterator[Row]:
        """Two rows `baseline`: transformers' static cache (`dense_ms`) against this engine with routing off
        (`mod_ms`), both dense: the faster is what a speed-up has to be held against.
        """
        static = self.static_times(repeats)
        engine = self.times([], repeats)[None]
        self.last[variant] = self.last[None]
        for index, name in enumerate(("prefill", "decode")):
            fields = self.fields(variant, name) | {"case": "baseline", "what": name, "ideal": 1.0}
            fields |= {"routed": "none", "routed_layers": 0, "keep_ratio": 1.0}
            yield make_row(static[index], engine[index], **fields)

    def rows(self, variants: Sequence[Variant], repeats: int, whole_warm_up: bool = True) -> Iterator[Row]:
        """Two rows a variant: `prefill` and `decode`."""
        times = self.times(variants, repeats, whole_warm_up)
        for variant in variants:
            for index, name in enumerate(("prefill", "decode")):
                yield make_row(times[None][index], times[variant][index], **self.fields(variant, name))

    def fields(self, variant: Variant, name: str, skip_name: str | None = None) -> dict[str, Any]:
        """What a row says besides the times; `skip_name` where the skip is not that of the settings."""
        config, last = self.dense.config, self.last[variant]
        settings = self.settings
        if skip_name is not None:
            settings = dataclasses.replace(settings, skip=skip_name, kv_cache_dtype="auto")
        skip = named(settings.skip)
        layers = self.twins[variant.routed].mod.layers
        kept, size = dict.fromkeys(layers, variant.ratio), settings.dtype.itemsize
        seen = sum(self.lengths) + len(self.lengths) * (self.tokens - 1)
        stored = statistics.fmean(sum(last["kept_tokens"][i]) for i in layers) / seen
        halfway = [n + self.tokens / 2 for n in self.lengths]
        ideal = (
            ideal_prefill(config, self.lengths, kept, settings.mod)
            if name == "prefill"
            else ideal_decode(config, halfway, kept, size, settings.mod)  # type: ignore[arg-type]
        )
        return {
            "case": name,
            "shape": settings.shape,
            "context": max(self.lengths),
            "batch": len(self.lengths),
            "routed": variant.routed,
            "routed_layers": len(layers),
            "num_layers": config.num_hidden_layers,
            "skip": settings.skip,
            "kv_cache_dtype": settings.kv_cache_dtype,
            # What a cache stores does not tell of MLPs, nor where recent tokens are stored too.
            "keep_ratio": variant.ratio if skip.runs_all or skip.stores_all else stored,
            "ideal": ideal,
            "kv_bytes": last["kv_bytes"],
            "kept_kv_bytes": sum(
                sum(tokens) * kv_token_bytes(config, size, settings.mod if i in kept else DENSE)
                for i, tokens in enumerate(last["kept_tokens"])
            ),
            "dense_kv_bytes": config.num_hidden_layers * seen * kv_token_bytes(config, size),
            "tokens": sum(self.lengths),
            "new_tokens": self.tokens,
        }


@contextlib.contextmanager
def fast_models(
    settings: Settings, context: int, routed: Sequence[str], compile: bool | str = True
) -> Iterator[tuple[Any, dict[str, Any]]]:
    """The dense model and a converted twin for each of `routed`, in fast generation with this `compile`."""
    dense = dense_model(settings, context)
    layers = {name: routed_layers(name, depth(settings)) for name in routed}
    numbers = {"kv_cache_dtype": settings.kv_cache_dtype}
    twins = {name: converted_twin(dense, layers[name], settings.skip, **numbers) for name in routed}
    with fast_twins(settings, dense, twins, compile):
        yield dense, twins


@contextlib.contextmanager
def fast_twins(
    settings: Settings, dense: Any, twins: dict[str, Any], compile: bool | str = True
) -> Iterator[None]:
    """Inside this block a dense model and its twins are in fast generation with this `compile`."""
    try:
        for model in (dense, *twins.values()):
            enable_fast_generation(model, compile, check=False)
        yield
    finally:
        for model in (dense, *twins.values()):
            disable_fast_generation(model)
        if settings.device.type == "cuda":
            torch.cuda.empty_cache()


@case
def generate(settings: Settings) -> Iterator[Row]:
    """Time to the first and to each further token of generate, fast generation on; random routing."""
    variants = [Variant(settings.routed, ratio) for ratio in settings.ratios]
    longest = max(settings.contexts) + settings.decode_tokens
    with fast_models(settings, longest, [settings.routed]) as (dense, twins):
        for context in settings.contexts:
            lengths = [context] * settings.batch
            workload = Workload(settings, dense, twins, lengths, settings.decode_tokens)
            yield from workload.rows(variants, settings.repeats)


generate.kv_cache_dtypes = ("auto", "int8")  # type: ignore[attr-defined]
