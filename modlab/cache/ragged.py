"""A KV cache that stores, by layer and row, only the tokens that the layer keeps.

With `skip="kv"` it stores the latest ones too. Routed layers have the cache layer that their skip names, by
default a `RaggedLayer`; unrouted ones the layer types that `transformers.DynamicCache` would give them.

Shape letters: B batch rows, R rows of one group, S new kept tokens, K keys of a row, G kv heads, H head dim,
L layers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from modlab.cache import bytes as kv_bytes
from modlab.cache.layer import RaggedLayer
from modlab.errors import ModlabError
from modlab.routing.state import dtype_of, routing_of

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

    from modlab.routing.state import Routing


class RaggedCache(Cache):
    """A converted model's KV cache: `model.generate` and `model(..., use_cache=True)` use it unasked.

    `get_seq_length` counts seen tokens, so positions stay right; reorder, repeat, select, crop, reset and
    `copy.deepcopy` work as on a `DynamicCache`.

    Args:
        model: a converted model. (Internally: its config, with `routing`.)

    Attributes:
        nbytes: bytes allocated now, growth slack and index included.
        dense_nbytes: bytes that a dense cache would hold for the same tokens.
        kept_tokens: tokens stored, LongTensor [L, B]. An unrouted layer stores every column, padding too; of
            KV heads with gates of their own it is the mean, rounded up.

    Raises:
        ModlabError: the model is dense.
    """

    def __init__(self, model: PreTrainedModel | PreTrainedConfig, routing: Routing | None = None) -> None:
        config: Any = model.config if isinstance(model, nn.Module) else model
        if routing is None:
            routing = routing_of(model)  # type: ignore[arg-type]
        layers = list(DynamicCache(config=config).layers)
        # Early-exit drafts (`assistant_early_exit`) lower the config's number of layers for a while.
        for index in (i for i in routing.layers if i < len(layers)):
            # A window that transformers' own cache does not know (GPT-Neo's) is the mask's alone.
            sliding = getattr(layers[index], "is_sliding", False)
            window = routing.windows[index] if sliding else None
            gates, range = routing.gates_here[index], routing.ranges.get(index)
            own = routing.skip.cache_layer(routing.config, window, gates, range)
            layers[index] = own or layers[index]
        super().__init__(layers=layers)
        self.made_for = _stored_by(routing)

    def reset(self) -> None:
        """Forgets everything and frees the buffers of all layers."""
        super().reset()
        for layer in self.layers:
            # Some versions of transformers zero these and keep their length.
            if isinstance(layer, DynamicLayer):
                layer.keys = layer.values = None
                layer.is_initialized = False

    def crop(self, tokens_to_remove: int) -> None:
        """Forgets the last `-tokens_to_remove` columns of all layers, or of none; a positive number is the
        length to crop to, as in transformers.

        Raises:
            ModlabError: a layer could not go on from there (`RaggedLayer.check_crop`).
        """
        seen, tokens_to_remove = self.get_seq_length(), int(tokens_to_remove)
        target = min(max(tokens_to_remove if tokens_to_remove > 0 else seen + tokens_to_remove, 0), seen)
        layers: list[Any] = self.layers
        for layer in layers:
            if isinstance(layer, RaggedLayer):
                layer.check_crop(target - seen)
            elif target < seen:
                _check_crop(layer)
        for layer in layers:
            # What records its past trims it now; others have nothing to do where nothing is removed.
            if target < seen or getattr(layer, "record_past", False):
                layer.crop(target - seen)

    def check_conversion(self, routing: Routing) -> None:
        """An error if a model converted in another way made this cache: it stores what that one keeps."""
        if self.made_for != _stored_by(routing):
            raise ModlabError(
                "the cache was made for another conversion (skip, layers, gates, kv_cache_dtype "
                "or keep_recent differ). "
                "Use modlab.RaggedCache(model) of the model that runs, or give the prompt again."
            )

    def check_batch(self, rows: int) -> None:
        """An error unless the cache is empty or holds that many rows."""
        held = next((len(stored) for layer in self.layers if (stored := kv_bytes.stored_tokens(layer))), rows)
        if held != rows:
            raise ModlabError(
                f"the cache holds {held} row(s), the input has {rows}: use one cache for one batch, or "
                "cache.batch_repeat_interleave / batch_select_indices."
            )

    @property
    def nbytes(self) -> int:
        """Bytes allocated by all layers, each storage counted once."""
        return sum(row["kv_bytes"] for row in kv_bytes.snapshot(self))

    @property
    def dense_nbytes(self) -> int:
        """Bytes of K/V that a dense cache would hold for the same columns (of a sliding window's at most)."""
        return sum(row["dense_kv_bytes"] for row in kv_bytes.snapshot(self))

    @property
    def kept_tokens(self) -> Tensor:
        """Tokens stored in each layer and row, LongTensor [L, B]."""
        per_layer = [kv_bytes.stored_tokens(layer) for layer in self.layers]
        batch = max((len(row) for row in per_layer), default=0)
        return torch.tensor([row or [0] * batch for row in per_layer], dtype=torch.long).reshape(
            len(per_layer), batch
        )

    def __repr__(self) -> str:
        ragged = sum(isinstance(layer, RaggedLayer) for layer in self.layers)
        return (
            f"RaggedCache({ragged} of {len(self.layers)} layers ragged, {self.get_seq_length()} tokens seen)"
        )


def _stored_by(routing: Routing) -> tuple[Any, ...]:
    """The settings that say which tokens a cache stores where; thresholds may change meanwhile."""
    config = routing.config
    return config.skip, config.gates, config.keep_recent, tuple(routing.layers), dtype_of(routing.ranges)


def _check_crop(layer: Any) -> None:
    """Refuses to crop a layer of transformers' own that would raise, before any layer is cropped."""
    if getattr(layer, "record_past", True):
        return
    window = layer.sliding_window if getattr(layer, "is_sliding", False) else None
    if window is None or layer.get_seq_length() >= window:
        what = "state" if window is None else f"sliding window of {window} tokens"
        raise ModlabError(
            f"the cache cannot be cropped: a layer that is not routed has a {what} and does not record what "
            "it drops. Call cache.activate_past_recording() before the forwards that are to be taken back, "
            "or copy the cache (copy.deepcopy)."
        )


class PackedView(Cache):
    """A routed layer's cache while it runs one group of rows: `update` stores into those rows only."""

    def __init__(self, cache: RaggedCache, layer: RaggedLayer, rows: list[int]) -> None:
        super().__init__(layers=cache.layers)
        self.layer = layer
        self.rows = rows

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Stores K/V [R, G, S, H] of the group's kept tokens; returns all of the rows' K/V [R, G, K, H]."""
        self._check(layer_idx)
        return self.layer.write(self.rows, key_states, value_states)

    def update_indexer(self, indexer_key_states: Tensor, layer_idx: int) -> Tensor:
        """The same for the indexer of a sparse attention: [R, S, H] in, [R, K, H] out."""
        self._check(layer_idx)
        return self.layer.write_indexer(self.rows, indexer_key_states)

    def _check(self, layer_idx: int) -> None:
        if self.layers[layer_idx] is not self.layer:
            raise ModlabError(
                f"the attention of a routed layer wrote to cache layer {layer_idx}, not to its own: this "
                "architecture shares K/V between layers, leave such layers unrouted."
            )
