"""A KV cache that stores, per layer and row, only the tokens that the layer kept (with
skip="kv" the latest ones too).

A `RaggedLayer` keeps all rows of a batch in one flat buffer, each row in a segment of its own length:

    keys   [G, C, H]   | row 0 ......... free | row 1 ... free | row 2 ............ free |
    columns   [C]      | where in the padded batch each stored token stood
    indexer   [C, H]   | only in sparse attention: the key by which its indexer picks

so that allocated bytes follow kept tokens, whatever the rows' imbalance. Unrouted layers use the layer types
that `transformers.DynamicCache` would give them.

Shape letters: B batch rows, R rows of one group, S new kept tokens, K keys of a row, G kv heads, H head dim,
C capacity of the flat buffer in tokens.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, DynamicLayer

from modlab.cache import bytes as kv_bytes
from modlab.errors import ModlabError
from modlab.routing.state import routing_of

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

    from modlab.routing.state import Routing

NO_KEY = torch.iinfo(torch.int32).max
"""Column of a key slot that holds no token: later than every query, so it is never attended to."""


class RaggedLayer(CacheLayerMixin):
    """K/V of one routed layer: kept tokens only, one segment a row in a flat buffer.

    Prefill allocates exactly what it stores. Growth after that leaves each row `slack(n)` free tokens, so
    that decoding moves the buffer once every 16 kept tokens or more.

    Args:
        sliding_window: attention span of the layer in tokens, or None. Older tokens are dropped.
    """

    is_croppable = True
    buffers: tuple[str, ...] = ("keys", "values", "columns", "indexer_keys")

    def __init__(self, sliding_window: int | None = None) -> None:
        super().__init__()
        self.sliding_window = sliding_window
        self.is_sliding = sliding_window is not None
        self.record_past = False
        self._empty()

    def _empty(self) -> None:
        self.keys: Tensor | None = None
        self.values: Tensor | None = None
        self.columns: Tensor | None = None
        self.indexer_keys: Tensor | None = None
        self.is_initialized = False
        self.cumulative_length = 0  # columns seen, kept or not; the name is transformers' own
        self.floor = 0  # columns seen when something was last dropped: `crop` goes no further back
        self.starts: list[int] = []
        self.lengths: list[int] = []
        self.capacities: list[int] = []

    @staticmethod
    def slack(length: int) -> int:
        """Free tokens left to a row of `length` tokens when its segment grows: at most 16 or 1/32, the
        larger.
        """
        return max(16, length // 32)

    # ---- one forward: begin, then stage + write for each group of rows, then finish ----

    def begin(self, counts: list[int], num_columns: int, device: torch.device) -> None:
        """Makes room for `counts[b]` new tokens in each row b; `num_columns` tokens of each row have now been
        seen.
        """
        if not self.lengths:
            self.starts, self.lengths, self.capacities = ([0] * len(counts) for _ in range(3))
        needed = [n + new for n, new in zip(self.lengths, counts, strict=True)]
        if any(n > c for n, c in zip(needed, self.capacities, strict=True)):
            first = not any(self.lengths)
            rows = list(range(len(needed)))
            self._rebuild(rows, [n if first else n + self.slack(n) for n in needed], device)
        # Counted after the rebuild: what that may drop is what the first of the new tokens no longer sees.
        self.cumulative_length += num_columns

    def stage(self, rows: list[int], columns_RS: Tensor, kept_RS: Tensor | None = None) -> Tensor:
        """Claims the next slots of `rows` for tokens at `columns_RS`. (`kept_RS` is for `RecentLayer`: all
        tokens that this layer stores are kept ones.)

        Returns:
            columns of all keys that `write` will return, int32 [R, K]; `NO_KEY` beyond a row's length.
        """
        assert self.columns is not None
        S = columns_RS.shape[1]
        if len(rows) == 1:
            at = self.starts[rows[0]] + self.lengths[rows[0]]
            self.columns[at : at + S] = columns_RS[0]
        else:
            self.columns[self._slots(rows, S)] = columns_RS.to(torch.int32)
        for row in rows:
            self.lengths[row] += S
        return self.key_columns(rows)

    def write(self, rows: list[int], keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Stores K/V [R, G, S, H] of the tokens just staged; returns all keys and values of these rows [R, G,
        K, H].

        K is the longest row's length; slots beyond a shorter row's length repeat its last token (finite,
        masked).
        """
        if not self.is_initialized:
            self.lazy_initialization(keys, values)
        assert self.keys is not None and self.values is not None
        S = keys.shape[2]
        if len(rows) == 1:
            end = self.starts[rows[0]] + self.lengths[rows[0]]
            self.keys[:, end - S : end] = keys[0]
            self.values[:, end - S : end] = values[0]
            start = self.starts[rows[0]]
            return self.keys[None, :, start:end], self.values[None, :, start:end]
        slots_RS = self._slots(rows, S, staged=True)
        self.keys[:, slots_RS] = keys.transpose(0, 1)
        self.values[:, slots_RS] = values.transpose(0, 1)
        slots_R1K = self._key_slots(rows)[:, None]
        heads_G1 = torch.arange(len(self.keys), device=self.keys.device)[:, None]
        # Both axes indexed at once: the result is contiguous, which some attention modules count on.
        return self.keys[heads_G1, slots_R1K], self.values[heads_G1, slots_R1K]

    def write_indexer(self, rows: list[int], keys_RSH: Tensor) -> Tensor:
        """As `write`, for the one key a token by which sparse attention picks: [R, S, H] in, [R, K, H]
        out.
        """
        assert self.columns is not None
        if self.indexer_keys is None:
            self.indexer_keys = keys_RSH.new_empty(self.columns.numel(), keys_RSH.shape[-1])
        self.indexer_keys[self._slots(rows, keys_RSH.shape[1], staged=True)] = keys_RSH
        return self.indexer_keys[self._key_slots(rows)]

    def finish(self) -> None:
        """Drops what a sliding window has left behind, once that is more than the slack."""
        if self.sliding_window is None or self.record_past or not self.is_initialized:
            return
        limit = self.sliding_window - 1
        if any(n > limit + self.slack(limit) for n in self.lengths):
            self._rebuild(list(range(len(self.lengths))), None, self.columns.device)  # type: ignore[union-attr]

    def key_columns(self, rows: list[int]) -> Tensor:
        """Columns of the keys stored for `rows`, int32 [R, K]; `NO_KEY` beyond a row's length."""
        assert self.columns is not None
        if len(rows) == 1:
            start = self.starts[rows[0]]
            return self.columns[None, start : start + self.lengths[rows[0]]]
        columns_RK = self.columns[self._key_slots(rows)]
        lengths_R1 = torch.tensor([[self.lengths[row]] for row in rows], device=columns_RK.device)
        beyond = torch.arange(columns_RK.shape[1], device=columns_RK.device) >= lengths_R1
        return columns_RK.masked_fill(beyond, NO_KEY)

    # ---- the flat buffer ----

    def _slots(self, rows: list[int], S: int, staged: bool = False) -> Tensor:
        """Flat positions [R, S] of the next S slots of `rows`, or of the last S once they are staged."""
        assert self.columns is not None
        back = S if staged else 0
        ends = [self.starts[row] + self.lengths[row] - back for row in rows]
        device = self.columns.device
        return torch.tensor(ends, device=device)[:, None] + torch.arange(S, device=device)

    def _key_slots(self, rows: list[int]) -> Tensor:
        """Flat positions [R, K] of all keys of `rows`, clamped to each row's last key."""
        assert self.columns is not None
        device = self.columns.device
        starts_R1 = torch.tensor([[self.starts[row]] for row in rows], device=device)
        last_R1 = torch.tensor([[max(self.lengths[row] - 1, 0)] for row in rows], device=device)
        K = max(self.lengths[row] for row in rows)
        return starts_R1 + torch.minimum(torch.arange(K, device=device), last_R1)

    def _rebuild(
        self, rows: list[int], capacities: list[int] | None, device: torch.device, room: bool = True
    ) -> None:
        """Lays the buffer out anew with the old `rows` as its rows (repeats allowed), what no later token can
        attend to dropped. Without `capacities`: what is stored, with `room` for a few tokens more.
        """
        survivors = [self._survivors(row) for row in rows]
        lengths = [s.stop - s.start if isinstance(s, slice) else len(s) for s in survivors]
        if any(n < self.lengths[row] for n, row in zip(lengths, rows, strict=True)):
            self.floor = self.cumulative_length
        if capacities is None:
            capacities = [n + self.slack(n) if room else n for n in lengths]
        starts = [sum(capacities[:i]) for i in range(len(rows))]
        old = {name: getattr(self, name) for name in self.buffers}
        self._new_index(sum(capacities), device)
        if self.is_initialized:
            self._allocate(old["keys"], old["values"])
        if old["indexer_keys"] is not None:
            self.indexer_keys = old["indexer_keys"].new_empty(sum(capacities), old["indexer_keys"].shape[-1])
        for name, source in old.items():
            if source is None:
                continue
            target = getattr(self, name)
            along = target.dim() - 2 if target.dim() > 1 else 0
            for at, n, chosen in zip(starts, lengths, survivors, strict=True):
                into = target.narrow(along, at, n)
                if isinstance(chosen, slice):
                    into.copy_(source.narrow(along, chosen.start, n))
                else:
                    into.copy_(source.index_select(along, chosen))
        self.starts, self.lengths, self.capacities = starts, lengths, capacities

    def reserve(self, capacities: list[int], keys: Tensor, values: Tensor) -> None:
        """Lays out empty segments of these capacities, one a row; head counts, head dims, dtype and device as
        in the given K/V [R, G, S, H].
        """
        self.starts, self.lengths, self.capacities = ([0] * len(capacities) for _ in range(3))
        self._rebuild(list(range(len(capacities))), capacities, keys.device)
        self.lazy_initialization(keys, values)

    @classmethod
    def joined(cls, parts: list[RaggedLayer]) -> RaggedLayer:
        """The rows of several layers, one after another, in one buffer."""
        whole, at = cls(), 0
        for part in parts:
            whole.starts += [at + start for start in part.starts]
            whole.lengths += part.lengths
            whole.capacities += part.capacities
            at += sum(part.capacities)
        buffers = [(part.keys, part.values, part.columns) for part in parts]
        whole.columns = torch.cat([columns for _, _, columns in buffers if columns is not None])
        whole.lazy_initialization(buffers[0][0], buffers[0][1])  # type: ignore[arg-type]
        for target, name in ((whole.keys, "keys"), (whole.values, "values")):
            torch.cat([getattr(part, name) for part in parts], dim=1, out=target)
        whole.cumulative_length = parts[0].cumulative_length
        return whole

    def _new_index(self, capacity: int, device: torch.device) -> None:
        """An empty index of so many slots."""
        self.columns = torch.empty(capacity, dtype=torch.int32, device=device)

    def _survivors(self, row: int) -> slice | Tensor:
        """Flat positions of the row's tokens that a later token may attend to, in order."""
        return slice(self.starts[row] + self._stale(row), self.starts[row] + self.lengths[row])

    def _stale(self, row: int) -> int:
        """How many of the row's oldest tokens no later token can attend to (one host sync for a sliding
        layer).
        """
        if self.sliding_window is None or self.record_past or self.columns is None or not self.lengths[row]:
            return 0
        columns = self.columns[self.starts[row] : self.starts[row] + self.lengths[row]]
        return int((columns <= self.cumulative_length - self.sliding_window).sum())

    def _allocate(self, keys: Tensor, values: Tensor) -> None:
        """New K/V buffers of the current capacity; head count, head dim, dtype and device as in the
        arguments.
        """
        C = sum(self.capacities) if self.columns is None else self.columns.numel()
        self.keys = keys.new_empty(keys.shape[-3], C, keys.shape[-1])
        self.values = values.new_empty(values.shape[-3], C, values.shape[-1])

    # ---- transformers' cache-layer interface ----

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocates the K/V buffers once head count, head dim, dtype and device are known."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self._allocate(key_states.detach(), value_states.detach())
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Stores every token of every row, as a dense layer does (the cache of a reverted model)."""
        B, S = key_states.shape[0], key_states.shape[2]
        first = self.cumulative_length
        self.begin([S] * B, S, key_states.device)
        columns = torch.arange(first, first + S, device=key_states.device, dtype=torch.int32)
        self.stage(list(range(B)), columns.expand(B, S))
        return self.write(list(range(B)), key_states, value_states)

    def get_seq_length(self) -> int:
        """Tokens seen in each row, kept or not."""
        return self.cumulative_length

    def get_max_length(self) -> int:
        """-1 (no maximum), or the sliding window."""
        return -1 if self.sliding_window is None else self.sliding_window

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Key length and offset for the mask of *unrouted* layers of the same kind; routed ones build their
        own.
        """
        seen = self.cumulative_length
        if self.sliding_window is None:
            return seen + query_length, 0
        offset = max(seen - self.sliding_window + 1, 0)
        return seen - offset + query_length, offset

    def activate_past_recording(self) -> None:
        """Keeps what a sliding window would drop, until the next `crop` (assisted decoding asks for it)."""
        self.record_past = True

    def crop(self, tokens_to_remove: int) -> None:
        """Forgets the last `-tokens_to_remove` columns (a positive number is the length to crop to).

        Raises:
            ModlabError: see `check_crop`.
        """
        self.check_crop(tokens_to_remove)
        target = self._cropped_length(tokens_to_remove)
        if not target:
            self._empty()
            return
        if self.columns is not None and target < self.cumulative_length:
            for row, (start, n) in enumerate(zip(self.starts, self.lengths, strict=True)):
                self.lengths[row] = int((self.columns[start : start + n] < target).sum())
        self.cumulative_length = target
        roomy = any(c - n > 2 * self.slack(n) for n, c in zip(self.lengths, self.capacities, strict=True))
        if self.is_initialized and (roomy or self.sliding_window is not None):
            with self._not_recording():
                self._rebuild(list(range(len(self.lengths))), None, self.columns.device)  # type: ignore[union-attr]

    def check_crop(self, tokens_to_remove: int) -> None:
        """Refuses a crop after which the next token could attend to tokens that have been dropped.

        Raises:
            ModlabError: says how far back the cache can go.
        """
        target = self._cropped_length(tokens_to_remove)
        if 0 < target < min(self.floor, self.cumulative_length):
            raise ModlabError(
                f"the cache cannot be cropped to {target} of {self.cumulative_length} tokens, only to "
                f"{self.floor} or more (or to 0): {self._dropped}. Copy the cache before it goes on "
                "(copy.deepcopy), or give the prompt again."
            )

    @property
    def _dropped(self) -> str:
        return f"what a sliding window of {self.sliding_window} tokens left behind then is gone"

    def _cropped_length(self, tokens_to_remove: int) -> int:
        """Columns that `crop` leaves."""
        target = tokens_to_remove if tokens_to_remove > 0 else self.cumulative_length + tokens_to_remove
        return min(max(target, 0), self.cumulative_length)

    @contextlib.contextmanager
    def _not_recording(self) -> Iterator[None]:
        """Inside this block the past may be dropped."""
        recording, self.record_past = self.record_past, False
        try:
            yield
        finally:
            self.record_past = recording

    def reset(self) -> None:
        """Forgets everything and frees the buffers."""
        self._empty()

    def _select(self, rows: list[int]) -> None:
        if not self.lengths:
            return
        if self.columns is None:
            self.starts, self.lengths, self.capacities = ([0] * len(rows) for _ in range(3))
            return
        self._rebuild(rows, None, self.columns.device)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i becomes what row `beam_idx[i]` was (one host sync)."""
        self._select(beam_idx.tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row becomes `repeats` adjacent copies of itself."""
        self._select([row for row in range(len(self.lengths)) for _ in range(repeats)])

    def batch_select_indices(self, indices: Tensor) -> None:
        """Only the rows `indices` (integers or a bool mask) stay, in that order."""
        indices = torch.as_tensor(indices)
        self._select((indices.nonzero()[:, 0] if indices.dtype == torch.bool else indices).tolist())

    def offload(self) -> None:
        raise ModlabError(
            "a ragged layer cannot be offloaded: it is small because skipped tokens are not stored."
        )

    def __repr__(self) -> str:
        return f"RaggedLayer(seen={self.cumulative_length}, kept={self.lengths})"


class RecentLayer(RaggedLayer):
    """K/V of one layer whose router decides about the cache alone (`skip="kv"`): kept tokens, and of the
    others those that are among the latest `keep_recent`.

    Tokens that are not kept are swept out now and then, not one by one: after a prefill, and in decoding
    every 16 tokens or 1/32 of what is stored, the larger. Until then the mask hides them.

    Args:
        keep_recent: how many of the latest tokens a token may attend to, kept or not; itself counted.
        sliding_window: attention span of the layer in tokens, or None.
    """

    buffers = (*RaggedLayer.buffers, "kept")

    def __init__(self, keep_recent: int, sliding_window: int | None = None) -> None:
        super().__init__(sliding_window)
        self.keep_recent = keep_recent

    def _empty(self) -> None:
        super()._empty()
        self.kept: Tensor | None = None
        self.has_skipped = False  # whether a token was ever stored that is not kept
        self.swept = 0  # columns seen at the last sweep

    def _new_index(self, capacity: int, device: torch.device) -> None:
        super()._new_index(capacity, device)
        self.kept = torch.empty(capacity, dtype=torch.bool, device=device)

    def stage(self, rows: list[int], columns_RS: Tensor, kept_RS: Tensor | None = None) -> Tensor:
        """As in a `RaggedLayer`, with `kept_RS`, bool, True for tokens that stay; None: all of them."""
        keys_RK = super().stage(rows, columns_RS)
        assert self.kept is not None
        S = columns_RS.shape[1]
        if len(rows) == 1:
            end = self.starts[rows[0]] + self.lengths[rows[0]]
            self.kept[end - S : end] = True if kept_RS is None else kept_RS[0]
        else:
            self.kept[self._slots(rows, S, staged=True)] = True if kept_RS is None else kept_RS
        self.has_skipped |= kept_RS is not None
        return keys_RK

    def key_kept(self, rows: list[int]) -> Tensor:
        """Whether the keys stored for `rows` are kept ones, bool [R, K]; means nothing beyond a row's
        length.
        """
        assert self.kept is not None
        if len(rows) == 1:
            start = self.starts[rows[0]]
            return self.kept[None, start : start + self.lengths[rows[0]]]
        return self.kept[self._key_slots(rows)]

    def finish(self) -> None:
        """Sweeps, once that is worth it."""
        super().finish()
        if not self.record_past:
            self._sweep()

    def crop(self, tokens_to_remove: int) -> None:
        """As in a `RaggedLayer`."""
        super().crop(tokens_to_remove)
        self.swept = min(self.swept, self.cumulative_length)
        with self._not_recording():
            self._sweep()

    @property
    def _dropped(self) -> str:
        return f"of what the routers do not keep, only the latest {self.keep_recent} were still there then"

    def _sweep(self) -> None:
        """Drops what is neither kept nor recent, unless that can only be a few tokens: few against the recent
        ones, and against all that would have to be moved."""
        few = max(self.slack(self.keep_recent), self.slack(max(self.lengths, default=0)))
        due = self.cumulative_length - max(self.swept, self.keep_recent) >= few or (
            not self.swept and self.cumulative_length > self.keep_recent
        )
        if not (due and self.has_skipped and self.is_initialized):
            return
        first = not self.swept
        self._rebuild(list(range(len(self.lengths))), None, self.columns.device, room=not first)  # type: ignore[union-attr]

    def _rebuild(
        self, rows: list[int], capacities: list[int] | None, device: torch.device, room: bool = True
    ) -> None:
        super()._rebuild(rows, capacities, device, room)
        if self.has_skipped and not self.record_past:
            self.swept = self.cumulative_length

    def _survivors(self, row: int) -> slice | Tensor:
        n = self.lengths[row]
        if self.record_past or not self.has_skipped or not n:
            return super()._survivors(row)
        assert self.columns is not None and self.kept is not None
        here = slice(self.starts[row], self.starts[row] + n)
        alive = self.kept[here].clone()
        # All tokens of the row come here, and nothing was dropped among the latest: these are its last ones.
        alive[max(n - self.keep_recent + 1, 0) :] = True
        if self.sliding_window is not None:
            alive &= self.columns[here] > self.cumulative_length - self.sliding_window
        return alive.nonzero()[:, 0] + self.starts[row]

    def __repr__(self) -> str:
        return f"RecentLayer(seen={self.cumulative_length}, stored={self.lengths}, recent={self.keep_recent})"


class RaggedCache(Cache):
    """The KV cache of a converted model: what `model.generate` and `model(..., use_cache=True)` use without
    asking.

    `get_seq_length` counts seen tokens, so positions stay right; reorder, repeat, select, crop, reset and
    `copy.deepcopy` work as on a `DynamicCache`.

    Args:
        model: a converted model. (Internally: its config, with `routing`.)

    Attributes:
        nbytes: bytes allocated now, growth slack and index included.
        dense_nbytes: bytes that a dense cache would hold for the same tokens.
        kept_tokens: tokens stored, LongTensor [L, B]. An unrouted layer stores every column, padding too.
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
            layers[index] = routing.skip.cache_layer(routing.config, window) or layers[index]
        super().__init__(layers=layers)

    def reset(self) -> None:
        """Forgets everything and frees the buffers of all layers."""
        super().reset()
        for layer in self.layers:
            # Some versions of transformers zero these and keep their length.
            if isinstance(layer, DynamicLayer):
                layer.keys = layer.values = None
                layer.is_initialized = False

    def crop(self, tokens_to_remove: int) -> None:
        """Forgets the last `-tokens_to_remove` columns of all layers, or of none.

        Raises:
            ModlabError: a layer could not go on from there (`RaggedLayer.check_crop`).
        """
        seen = self.get_seq_length()
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
        """Bytes of K/V that a dense cache would hold for the same columns (sliding windows counted as
        windows).
        """
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
    """What a routed layer sees as its cache while it runs one group of rows: `update` stores into those rows
    only.
    """

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
