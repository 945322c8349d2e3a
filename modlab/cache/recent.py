"""The cache layer of skip="kv": kept tokens, and of the others the latest."""

from __future__ import annotations

import torch
from torch import Tensor

from modlab.cache.buffer import empty_like
from modlab.cache.layer import RaggedLayer, Taking
from modlab.cache.range import ALL_HEADS, STEP_TYPE, KVRange


class RecentLayer(RaggedLayer):
    """K/V of one layer whose router decides about the cache alone (`skip="kv"`): kept tokens, and of the
    others those that are among the latest `keep_recent`.

    Tokens that are not kept are swept out now and then, not one by one: after a prefill, and in decoding
    every 16 tokens or 1/32 of what is stored, the larger. Until then the mask hides them.

    Args:
        keep_recent: how many of the latest tokens a token may attend to, kept or not; itself counted.
        sliding_window: attention span of the layer in tokens, or None.
        range: how keys and values are coded in fewer bits; None: they are stored as they come.

    Attributes:
        kept: whether each stored token stays, bool [C].
        has_skipped: whether a token was ever stored that does not stay.
        keys, values: with a range its codes, and `dtype` is the type of what they stand for.
        key_steps, value_steps: with a range alone: the step of each, [G, C, 1].
    """

    notes = RaggedLayer.notes | {"kept": torch.bool}
    kept: Tensor | None
    contents = (*RaggedLayer.contents, "key_steps", "value_steps")
    key_steps: Tensor | None
    value_steps: Tensor | None

    def __init__(
        self, keep_recent: int, sliding_window: int | None = None, range: KVRange | None = None
    ) -> None:
        super().__init__(sliding_window)
        self.keep_recent, self.range = keep_recent, range

    def clear(self) -> None:
        """Forgets everything and frees the memory."""
        super().clear()
        self.has_skipped = False
        self.swept = 0  # columns seen at the last sweep

    def claim(self, rows: list[int], columns_RS: Tensor, kept_RS: Tensor | None = None) -> None:
        """As in a `RaggedLayer`, with `kept_RS`, bool, True for tokens that stay; None: all of them."""
        self.note("kept", rows, True if kept_RS is None else kept_RS, columns_RS.shape[1])
        self.has_skipped |= kept_RS is not None
        super().claim(rows, columns_RS)

    def segments(self, row: int) -> list[int]:
        """The segments that hold a row: one, for all heads."""
        return [row]

    def heads_of(self, segment: int) -> slice:
        """The KV heads that a segment holds keys of."""
        return ALL_HEADS

    def allocate(self, keys: Tensor, values: Tensor) -> None:
        """Room for keys and values like these [..., G, S, H], or for their codes and steps."""
        if self.range is None:
            super().allocate(keys, values)
            return
        of_head = (*keys.shape[:-2], 0)
        codes = (
            keys.new_empty(*of_head, width, dtype=self.range.code_type)  # their shape is enough
            for width in self.range.widths(keys.shape[-1], values.shape[-1])
        )
        super().allocate(*codes)
        steps = keys.new_empty(keys.shape[-3], 0, 1, dtype=STEP_TYPE)
        self.key_steps, self.value_steps = (empty_like(steps, self.capacity) for _ in range(2))

    def encoded(self, keys: Tensor, values: Tensor) -> dict[str, Tensor]:
        """What is stored of K/V [R, G, S, H], by the name of the content. Here, and nowhere else, they are
        rounded."""
        if self.range is None:
            return super().encoded(keys, values)
        (key_codes, key_steps), (value_codes, value_steps) = (
            self.range.encode_keys(keys.detach()),
            self.range.encode_values(values.detach()),
        )
        return {
            "keys": key_codes,
            "values": value_codes,
            "key_steps": key_steps,
            "value_steps": value_steps,
        }

    def decoded(self, take: Taking, heads: slice = ALL_HEADS) -> tuple[Tensor, Tensor]:
        """As of a `RaggedLayer`: in the model's type."""
        if self.range is None:
            return super().decoded(take, heads)
        key_codes, key_steps, value_codes, value_steps = (
            take(getattr(self, name)) for name in ("keys", "key_steps", "values", "value_steps")
        )
        return (
            self.range.decode_keys(key_codes, key_steps, self.dtype, heads),
            self.range.decode_values(value_codes, value_steps, self.dtype, heads),
        )

    def key_kept(self, rows: list[int]) -> Tensor:
        """Whether the keys stored for `rows` are kept ones, bool [R, K]; meaningless past a row's end."""
        return self.noted("kept", rows)

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
        self.rearrange(self.rows, room=not first)

    def rearrange(
        self,
        rows: list[int],
        capacities: list[int] | None = None,
        device: torch.device | None = None,
        room: bool = True,
    ) -> None:
        """As in a `RaggedLayer`: what is neither kept nor recent goes on the way."""
        super().rearrange(rows, capacities, device, room)
        if self.has_skipped and not self.record_past:
            self.swept = self.cumulative_length

    def survivors(self, row: int) -> slice | Tensor:
        """Places of the row's tokens that a later token may attend to, in order."""
        n = self.lengths[row]
        if self.record_past or not self.has_skipped or not n:
            return super().survivors(row)
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
