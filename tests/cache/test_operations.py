"""Properties of a cache's rows: any routing, padding and sequence of operations equals running without it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from modlab.cache.bytes import snapshot
from modlab.cache.layer import RaggedLayer
from modlab.errors import ModlabError
from tests.helpers.batches import (
    DROPPING,
    HEAD_DIM,
    HEADS_KV,
    LONGEST,
    VOCAB,
    Batch,
    assert_real_equal,
    batches,
    cases,
)

pytestmark = pytest.mark.timeout(3600)  # for what hangs; how long the examples take decides nothing

TOKEN_BYTES = 2 * HEADS_KV * HEAD_DIM * 4  # K and V, fp32
INDEX_BYTES = 4  # a ragged layer notes the column of each stored token
MOST_ROWS = 6


def windowed(model: Any, layer: int) -> bool:
    return model.mod.windows.get(layer) is not None


def check_bytes(cache: Any, batch: Batch, fresh: bool) -> None:
    """Allocated bytes follow kept tokens: exactly after one forward, within the slack after more."""
    rows = snapshot(cache)
    assert sum(row["kv_bytes"] for row in rows) == cache.nbytes
    assert sum(row["kept_tokens"] for row in rows) == int(cache.kept_tokens.sum())
    for index, layer in enumerate(cache.layers):
        if type(layer) is not RaggedLayer:
            continue
        kept = rows[index]["kept_tokens"]
        slack = (
            0 if fresh and not windowed(batch.model, index) else sum(max(16, n // 32) for n in layer.lengths)
        )
        # a sliding layer is trimmed once it holds a slack more than its window, so it may hold that much more
        assert kept * TOKEN_BYTES <= rows[index]["kv_bytes"]
        assert rows[index]["kv_bytes"] <= (kept + 2 * slack) * (TOKEN_BYTES + INDEX_BYTES)
        if fresh and not windowed(batch.model, index):
            assert rows[index]["kv_bytes"] == kept * (TOKEN_BYTES + INDEX_BYTES)


@cases(60)
@given(batches(models=DROPPING), st.integers(0, LONGEST))
def test_stored_bytes_are_the_kept_tokens_and_nothing_else(batch, cut) -> None:
    cut = min(cut, batch.length - 1)
    with torch.no_grad(), batch.forced():
        cache = None
        for start, stop in ((0, cut), (cut, batch.length)):
            if start < stop:
                out = batch.model(**batch.inputs(start, stop), past_key_values=cache, use_cache=True)
                cache = out.past_key_values
    expected = batch.expected_kept()
    for number, layer in enumerate(batch.model.mod.layers):
        if not windowed(batch.model, layer):
            assert cache.kept_tokens[layer].tolist() == expected[number].tolist()
    assert cache.get_seq_length() == batch.length
    check_bytes(cache, batch, fresh=not cut)


class Text:
    """The rows that a cache has seen, changed along with it.

    Attributes:
        ids, mask: [B, T].
        done: columns that the cache has seen.
    """

    def __init__(self, batch: Batch) -> None:
        self.batch, self.ids, self.mask, self.done = batch, batch.ids, batch.mask, 0
        self.cache: Any = None

    def inputs(self, start: int) -> dict[str, Tensor]:
        positions = (self.mask.cumsum(1) - 1).clamp_min(0)
        return {
            "input_ids": self.ids[:, start:],
            "attention_mask": self.mask,
            "position_ids": positions[:, start:],
        }

    def run(self) -> None:
        """Runs the columns that the cache has not seen, and holds them to a run without a cache."""
        model = self.batch.model
        out = model(**self.inputs(self.done), past_key_values=self.cache, use_cache=True)
        expected = model(**self.inputs(0), use_cache=False).logits[:, self.done :]
        assert_real_equal(out.logits, expected, self.mask[:, self.done :])
        self.cache, self.done = out.past_key_values, self.ids.shape[1]

    def write(self, count: int, seed: int) -> None:
        new = torch.randint(0, VOCAB, (len(self.ids), count), generator=torch.Generator().manual_seed(seed))
        self.ids = torch.cat([self.ids, new], 1)
        self.mask = torch.cat([self.mask, torch.ones_like(new)], 1)
        self.run()

    def take(self, rows: Tensor) -> None:
        self.ids, self.mask = self.ids[rows], self.mask[rows]

    def crop(self, back: int) -> None:
        """What assisted decoding does with rejected tokens; refused, by all layers or none, where a window or
        the recent past of skip="kv" has let go of what would be seen again."""
        back = min(back, self.done - 1)
        if not back:
            return
        try:
            self.cache.crop(-back)
        except (ModlabError, ValueError):
            assert self.batch.forgets
            return
        self.done -= back
        self.ids, self.mask = self.ids[:, : self.done], self.mask[:, : self.done]


OPERATIONS = st.one_of(
    st.tuples(st.just("write"), st.integers(1, 4), st.integers(0, 99)),
    st.tuples(st.just("crop"), st.integers(1, LONGEST)),
    st.tuples(st.just("repeat")),
    st.tuples(st.sampled_from(["reorder", "select"]), st.lists(st.integers(0, 99), min_size=1, max_size=4)),
)


@cases(100)
@given(batches(sides=("none", "left", "inside")), st.lists(OPERATIONS, min_size=1, max_size=5))
def test_any_sequence_of_operations_equals_running_without_a_cache(batch, operations) -> None:
    text = Text(batch)
    with torch.no_grad(), batch.forced():
        text.run()
        for name, *given_ in operations:
            rows = len(text.ids)
            if name == "write":
                if text.ids.shape[1] + given_[0] < 4 * LONGEST:
                    text.write(*given_)
            elif name == "crop":
                text.crop(*given_)
            elif name == "repeat":
                if 2 * rows <= MOST_ROWS:
                    text.cache.batch_repeat_interleave(2)
                    text.take(torch.arange(rows).repeat_interleave(2))
            else:
                index = torch.tensor([i % rows for i in given_[0]])
                if name == "reorder":
                    index = index.repeat(rows)[:rows]
                    text.cache.reorder_cache(index)
                else:
                    text.cache.batch_select_indices(index)
                text.take(index)
            assert text.cache.get_seq_length() == text.done
        text.write(2, 7)
    check_bytes(text.cache, batch, fresh=False)
