"""Case `speed_kv_cpu`: K/V routing without a GPU, by the ordinary path: a prompt, and tokens after it.

Random weights and forced routing, a gate a layer and one a KV head, as in `speed_kv`. The dense model is
transformers' own with its own cache.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from modlab.bench.clock import interleaved
from modlab.bench.ideal import ideal_decode, ideal_prefill
from modlab.bench.models import converted_twin, dense_model, depth, routed_layers
from modlab.bench.registry import Row, Settings, case
from modlab.bench.rows import cache_facts, make_row
from modlab.bench.speed_kv import HIDDEN, granularity_of, head_shares, table_of
from modlab.hf.names import cache_argument, given_cache
from modlab.routing.state import routing_override
from modlab.routing.table import RoutingTable

GRANULARITIES = ("layer", "kv_head")


@dataclasses.dataclass
class Side:
    """One model with what forces its routing, and where its text stands.

    Attributes:
        table: None for the dense model.
        cache, token: of the last forward.
    """

    model: Any
    table: RoutingTable | None = None
    cache: Any = None
    token: Any = None

    @torch.no_grad()
    def read(self, ids_BT: torch.Tensor, tokens: int = 0) -> None:
        """Reads a prompt with a new cache, or `tokens` more of its own, greedily."""
        forced = contextlib.nullcontext() if self.table is None else routing_override(self.model, self.table)
        with forced:
            if not tokens:
                self.cache = None  # the one before is gone before this one is made
                self._take(self.model(ids_BT, use_cache=True, logits_to_keep=1))
            for _ in range(tokens):
                held = {cache_argument(self.model): self.cache}
                self._take(self.model(self.token, use_cache=True, **held))

    def _take(self, output: Any) -> None:
        self.cache, self.token = given_cache(output), output.logits[:, -1:].argmax(-1)


def sides(settings: Settings, ratio: float, context: int) -> dict[str, Side]:
    """The dense model, and a twin for each granularity, all layers routed."""
    tokens = settings.decode_tokens * (settings.repeats + 1)
    dense, layers = dense_model(settings, context + tokens), routed_layers("all", depth(settings))
    found = {"dense": Side(dense)}
    for gates in GRANULARITIES:
        shares = torch.full((len(layers), 1), ratio)
        if gates == "kv_head":
            shares = head_shares(len(layers), dense.config.num_key_value_heads, ratio, settings.seed)
        twin = converted_twin(dense, layers, "kv", gates=gates, router_hidden=HIDDEN)
        found[gates] = Side(twin, table_of(layers, shares, context + tokens, settings))
    return found


@case
def speed_kv_cpu(settings: Settings) -> Iterator[Row]:
    """K/V routing by the ordinary path, by layer and by head: a prompt of each context, tokens after it."""
    settings = dataclasses.replace(settings, skip="kv")
    for context in settings.contexts:
        for ratio in settings.ratios:
            yield from _rows(settings, sides(settings, ratio, context), ratio, context)


def _rows(settings: Settings, models: dict[str, Side], ratio: float, context: int) -> Iterator[Row]:
    dense, device, n = models["dense"].model, settings.device, settings.decode_tokens
    ids_BT = torch.randint(0, dense.config.vocab_size, (settings.batch, context), device=device)
    lengths, layers = [context] * settings.batch, routed_layers("all", depth(settings))
    shares = dict.fromkeys(layers, ratio)
    short = ids_BT[:, : min(context, 256)]
    for side in models.values():
        side.read(short)  # what is made once is made
    prompts = {name: partial(side.read, ids_BT) for name, side in models.items()}
    stretches = {name: partial(side.read, ids_BT, n) for name, side in models.items()}
    for name, calls, warm, per in (("prefill", prompts, 0, 1), ("decode", stretches, 1, n)):
        times = interleaved(calls, settings.repeats, device, per=per, warmup=warm)
        dense_bytes, _ = cache_facts(models["dense"].cache, layers, settings.batch)
        ideal = ideal_prefill(dense.config, lengths, shares, settings.mod)
        if name == "decode":
            ideal = ideal_decode(dense.config, lengths, shares, settings.dtype.itemsize, settings.mod)
        for gates in GRANULARITIES:
            kv_bytes, _ = cache_facts(models[gates].cache, layers, settings.batch)
            yield make_row(
                times["dense"],
                times[gates],
                case=name,
                shape=settings.shape,
                context=context,
                batch=settings.batch,
                routed_layers=len(layers),
                num_layers=len(layers),
                skip="kv",
                keep_ratio=ratio,
                ideal=ideal,
                kv_bytes=kv_bytes,
                dense_kv_bytes=dense_bytes,
                threads=torch.get_num_threads(),
                decode_tokens=n,
                **granularity_of(gates, len(layers), len(layers)),
            )
