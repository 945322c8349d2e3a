"""A converted model as the product runs it: whole rows, and rows in pieces with the product's cache.

Shape letters: B rows, T tokens of a row, P tokens of a piece, G gates of a layer, D model dim, V vocabulary.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import modlab
from modlab.cache.bytes import snapshot
from modlab.errors import ModlabError
from modlab.hf.names import cache_argument, given_cache
from modlab.routing.kv_saving import rounding_of
from modlab.routing.record import by_gate
from modlab.routing.state import (
    record_routing,
    routing_of,
    routing_off,
    set_keep_recent,
    set_threshold,
    thresholds_restored,
)

PIECE = 1024
"""Tokens that go through at once with the cache of those before."""


@dataclass
class Stored:
    """What a cache holds at the end of rows: bytes allocated, those of a dense cache, and shares of keys.

    Attributes:
        kv_bytes, dense_kv_bytes: of all rows.
        keys: stored keys over seen ones.
    """

    kv_bytes: int
    dense_kv_bytes: int
    keys: float


class Product:
    """A converted model with what its measures ask of it.

    Args:
        name: for result files.
        model: converted, in eval mode, its head the product of states with one matrix.
    """

    def __init__(self, name: str, model: Any, tokenizer: Any) -> None:
        self.name, self.model, self.tokenizer = name, model, tokenizer
        self.routing = routing_of(model)
        self.device, self.dtype = model.device, model.dtype
        self.decoder = model.get_decoder()
        head = model.get_output_embeddings()
        if getattr(head, "bias", None) is not None or getattr(model.config, "final_logit_softcapping", None):
            raise ModlabError(f"{name}: the head does more than multiply, which is not measured here.")
        self.head_VD: Tensor = head.weight.detach()

    @classmethod
    def load(
        cls, folder: Path, routers: Path | None, device: str, fast: bool, kv_cache_dtype: str = "auto"
    ) -> Product:
        """The model of a folder with the routers put into it.

        Args:
            folder: of the base; of the converted model where no `routers` are given.
            fast: enable fast generation.
            kv_cache_dtype: as of `MoDConfig`.
        """
        dtype = torch.float32 if device == "cpu" else torch.bfloat16
        given = {"base": folder} if routers is not None else {}
        model, tokenizer = modlab.load(routers or folder, dtype=dtype, **given)  # type: ignore[arg-type]
        moved: Any = model
        moved.to(device).eval()
        modlab.set_kv_cache_dtype(model, kv_cache_dtype)
        if fast:
            modlab.enable_fast_generation(model, compile=False)  # a few batches do not earn it back
        return cls(folder.name, model, tokenizer)

    @property
    def first(self) -> int:
        return self.routing.config.keep_first

    @property
    def window(self) -> int:
        return self.routing.config.keep_recent

    def of_routing(self, saving: float) -> float:
        """What routing has to save of a saving; the type of stored keys and values saves the rest."""
        return rounding_of(self.model).routed(saving)

    def recent_for(self, saving: float) -> int:
        """How many of the latest tokens go with a saving by the routers' training, as far as routing has to
        save it; else the conversion's."""
        known = self.routing.trained
        if known is None or known.range is None:
            return self.window
        low, high = known.range
        found = known.recent_for(min(max(self.of_routing(saving), low), high))
        return self.window if found is None else found

    def ids(self, text: str) -> list[int]:
        """Tokens of a text, without special ones."""
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    @contextlib.contextmanager
    def at(self, threshold: float | None, recent: int | None = None) -> Iterator[None]:
        """Inside this block all layers have this threshold, and so many of the latest tokens stay anyway
        (None: as before); without a threshold routing is off, the model is dense."""
        if threshold is None:
            with routing_off(self.model):
                yield
            return
        with thresholds_restored(self.model):
            if recent is not None:
                set_keep_recent(self.model, recent)
            set_threshold(self.model, threshold)
            yield

    @torch.no_grad()
    def states(self, ids_BT: Tensor) -> Tensor:
        """Last states [B, T, D] of whole rows, without a cache."""
        states: Tensor = self.decoder(input_ids=ids_BT, use_cache=False).last_hidden_state
        return states

    @torch.no_grad()
    def gates(self, ids_BT: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Of each routed layer what whole rows' gates say, fp32 [B, T, G], and who is kept, bool alike."""
        with record_routing(self.model) as recording:
            self.states(ids_BT)
        (step,) = recording.steps
        return ([by_gate(step.gate[i]) for i in self.routing.layers], self.kept([step]))

    @torch.no_grad()
    def pieces(self, ids_BT: Tensor, size: int = PIECE) -> Iterator[tuple[Tensor, Any, list[Tensor]]]:
        """The rows in pieces, with the model's cache: last states [B, P, D], the cache after them, and who is
        kept in each routed layer, bool [B, P, G]."""
        cache = None
        for start in range(0, ids_BT.shape[1], size):
            given: dict[str, Any] = {} if cache is None else {cache_argument(self.model): cache}
            with record_routing(self.model) as recording:
                output = self.decoder(input_ids=ids_BT[:, start : start + size], use_cache=True, **given)
            cache = given_cache(output)
            yield output.last_hidden_state, cache, self.kept(recording.steps)

    def kept(self, steps: list[Any]) -> list[Tensor]:
        """Who is kept in each routed layer, bool [B, T, G], over the forwards recorded."""
        return [torch.cat([by_gate(step.keep[i]) for step in steps], 1) for i in self.routing.layers]


def stored(cache: Any) -> Stored:
    """What a cache holds now."""
    layers = snapshot(cache)
    rows = len(cache.kept_tokens[0])
    return Stored(
        sum(layer["kv_bytes"] for layer in layers),
        sum(layer["dense_kv_bytes"] for layer in layers),
        sum(layer["kept_tokens"] for layer in layers) / sum(rows * layer["seen_tokens"] for layer in layers),
    )
