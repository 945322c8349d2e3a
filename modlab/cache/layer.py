"""A cache layer of transformers that stores, per row, only the tokens that its layer kept.

Shape letters: B batch rows, R rows of one group, S new kept tokens, K keys of a row, G kv heads, H head dim,
C capacity of the flat buffer in tokens.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from modlab.cache.buffer import SegmentedBuffer
from modlab.cache.range import ALL_HEADS
from modlab.errors import ModlabError

Taking = Callable[[Tensor], Tensor]
"""Finds some tokens in a content [..., C, H] of the buffer."""

NO_KEY = torch.iinfo(torch.int32).max
"""Column of a place that holds no token: later than every query, so it is never attended to."""


class RaggedLayer(SegmentedBuffer, CacheLayerMixin):
    """K/V of one routed layer: kept tokens only, one segment a row in a flat buffer.

    Args:
        sliding_window: attention span of the layer in tokens, or None. Older tokens are dropped.

    Attributes:
        indexer_keys: only in sparse attention: the key by which its indexer picks, [C, H].
        cumulative_length: columns seen, kept or not; the name is transformers' own.
        floor: columns seen when something was last dropped: `crop` goes no further back.
    """

    is_croppable = True
    contents = (*SegmentedBuffer.contents, "indexer_keys")
    indexer_keys: Tensor | None

    def __init__(self, sliding_window: int | None = None) -> None:
        CacheLayerMixin.__init__(self)
        self.sliding_window = sliding_window
        self.is_sliding = sliding_window is not None
        self.record_past = False
        self.clear()

    def clear(self) -> None:
        """Forgets everything and frees the memory."""
        super().clear()
        self.is_initialized = False
        self.cumulative_length = 0
        self.floor = 0

    # One forward: begin, then stage and write for each group of rows, then finish

    def begin(self, counts: list[int], num_columns: int, device: torch.device) -> None:
        """Makes room for `counts[b]` new tokens in row b; `num_columns` tokens of each row have been seen."""
        self.make_room(counts, device)
        # Counted afterwards: what a new layout drops is what the first of the new tokens no longer sees.
        self.cumulative_length += num_columns

    def claim(self, rows: list[int], columns_RS: Tensor, kept_RS: Tensor | None = None) -> None:
        """Claims the next places of `rows` for tokens at `columns_RS`. (`kept_RS` is for `RecentLayer`: all
        tokens that this layer stores are kept ones.)"""
        S = columns_RS.shape[1]
        self.note("columns", rows, columns_RS, S)
        for row in rows:
            self.lengths[row] += S

    def stage(self, rows: list[int], columns_RS: Tensor, kept_RS: Tensor | None = None) -> Tensor:
        """`claim`, for a `write`.

        Returns:
            columns of all keys that `write` will return, int32 [R, K]; `NO_KEY` beyond a row's length.
        """
        self.claim(rows, columns_RS, kept_RS)
        return self.key_columns(rows)

    def store(self, rows: list[int], keys: Tensor, values: Tensor) -> None:
        """Stores K/V [R, G, S, H] of the tokens just claimed."""
        if not self.is_initialized:
            self.lazy_initialization(keys, values)
        S, contents = keys.shape[2], self.encoded(keys, values)
        if len(rows) == 1:
            end = self.starts[rows[0]] + self.lengths[rows[0]]
            for name, new in contents.items():
                getattr(self, name)[:, end - S : end] = new[0]
            return
        places_RS = self.last_places(rows, S)
        for name, new in contents.items():
            getattr(self, name)[:, places_RS] = new.transpose(0, 1)

    def encoded(self, keys: Tensor, values: Tensor) -> dict[str, Tensor]:
        """What is stored of K/V [R, G, S, H], by the name of the content."""
        return {"keys": keys, "values": values}

    def decoded(self, take: Taking, heads: slice = ALL_HEADS) -> tuple[Tensor, Tensor]:
        """K/V as attention sees them, of the tokens that `take` finds in each content.

        Args:
            heads: whose they are, where not of all.
        """
        assert self.keys is not None and self.values is not None
        return take(self.keys), take(self.values)

    def write(self, rows: list[int], keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """`store`; returns all K/V of these rows [R, G, K, H].

        K is the longest row's length; beyond a shorter row's length its last token is repeated (finite,
        masked).
        """
        self.store(rows, keys, values)
        if len(rows) == 1:
            start = self.starts[rows[0]]
            end = start + self.lengths[rows[0]]
            return self.decoded(lambda content: content[None, :, start:end])
        places_R1K = self.places(rows)[:, None]
        heads_G1 = torch.arange(keys.shape[1], device=keys.device)[:, None]
        # Both axes indexed at once: the result is contiguous, which some attention modules count on.
        return self.decoded(lambda content: content[heads_G1, places_R1K])

    def write_indexer(self, rows: list[int], keys_RSH: Tensor) -> Tensor:
        """As `write`, for the one key a token by which sparse attention picks: [R, S, H] to [R, K, H]."""
        if self.indexer_keys is None:
            self.indexer_keys = keys_RSH.new_empty(self.capacity, keys_RSH.shape[-1])
        self.indexer_keys[self.last_places(rows, keys_RSH.shape[1])] = keys_RSH
        return self.indexer_keys[self.places(rows)]

    def finish(self) -> None:
        """Drops what a sliding window has left behind, once that is more than the slack."""
        if self.sliding_window is None or self.record_past or not self.is_initialized:
            return
        limit = self.sliding_window - 1
        if any(n > limit + self.slack(limit) for n in self.lengths):
            self.rearrange(self.rows)

    def held(self, rows: list[int]) -> list[int]:
        """How many keys `write` returns for each of `rows`, those beyond its length left aside."""
        return [self.lengths[row] for row in rows]

    def key_columns(self, rows: list[int]) -> Tensor:
        """Columns of the keys stored for `rows`, int32 [R, K]; `NO_KEY` beyond a row's length."""
        columns_RK = self.noted("columns", rows)
        if len(rows) == 1:
            return columns_RK
        lengths_R1 = torch.tensor([[self.lengths[row]] for row in rows], device=columns_RK.device)
        beyond = torch.arange(columns_RK.shape[1], device=columns_RK.device) >= lengths_R1
        return columns_RK.masked_fill(beyond, NO_KEY)

    # What is dropped

    def rearrange(
        self,
        rows: list[int],
        capacities: list[int] | None = None,
        device: torch.device | None = None,
        room: bool = True,
    ) -> None:
        """As of the buffer; what no later token can attend to is dropped."""
        before = sum(self.lengths[row] for row in rows)
        super().rearrange(rows, capacities, device, room)
        if sum(self.lengths) < before:
            self.floor = self.cumulative_length

    def survivors(self, row: int) -> slice | Tensor:
        """Places of the row's tokens that a later token may attend to, in order."""
        return slice(self.starts[row] + self._stale(row), self.starts[row] + self.lengths[row])

    def _stale(self, row: int) -> int:
        """How many of the row's oldest tokens no later token sees (one host sync for a sliding layer)."""
        if self.sliding_window is None or self.record_past or self.columns is None or not self.lengths[row]:
            return 0
        columns = self.columns[self.starts[row] : self.starts[row] + self.lengths[row]]
        return int((columns <= self.cumulative_length - self.sliding_window).sum())

    # transformers' cache-layer interface

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocates the K/V buffers once head count, head dim, dtype and device are known."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.allocate(key_states.detach(), value_states.detach())
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Stores every token of every row, as a dense layer does (the cache of a reverted model).

        Raises:
            ModlabError: a token that a dense layer would attend to was dropped before, or never stored.
        """
        B, S = key_states.shape[0], key_states.shape[2]
        first = self.cumulative_length
        seen = first if self.sliding_window is None else min(first, self.sliding_window - 1)
        if min(self.lengths, default=0) < seen:
            raise ModlabError(
                f"this cache was filled by a converted model and holds {min(self.lengths)} of {seen} tokens: "
                "a dense layer would attend to all of them. After modlab.revert begin with a new cache."
            )
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
        """Key length and offset for the mask of *unrouted* layers of this kind; routed ones build theirs."""
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
            self.clear()
            return
        if self.columns is not None and target < self.cumulative_length:
            for row, (start, n) in enumerate(zip(self.starts, self.lengths, strict=True)):
                self.lengths[row] = int((self.columns[start : start + n] < target).sum())
        self.cumulative_length = target
        roomy = any(c - n > 2 * self.slack(n) for n, c in zip(self.lengths, self.capacities, strict=True))
        if self.is_initialized and (roomy or self.sliding_window is not None):
            with self._not_recording():
                self.rearrange(self.rows)

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
        # transformers 5.17 counts in a tensor: a length that is one would change wherever it was noted.
        tokens_to_remove = int(tokens_to_remove)
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
        self.clear()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i becomes what row `beam_idx[i]` was (one host sync)."""
        self.select(beam_idx.tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row becomes `repeats` adjacent copies of itself."""
        self.select([row for row in self.rows for _ in range(repeats)])

    def batch_select_indices(self, indices: Tensor) -> None:
        """Only the rows `indices` (integers or a bool mask) stay, in that order."""
        indices = torch.as_tensor(indices)
        self.select((indices.nonzero()[:, 0] if indices.dtype == torch.bool else indices).tolist())

    def offload(self) -> None:
        """Refused: a `ModlabError`."""
        raise ModlabError(
            "a ragged layer cannot be offloaded: it is small because skipped tokens are not stored."
        )

    def __repr__(self) -> str:
        return f"RaggedLayer(seen={self.cumulative_length}, kept={self.lengths})"
