"""One call of a layer, cut down to some of its tokens: every kind of argument on its own, without a model.

Shape letters: B rows, T tokens in, R rows of a group, S picked tokens, D model dim, N heads, C key columns.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache

from modlab.errors import ModlabError
from modlab.hf.arguments import LayerArguments, take_tokens

B, T, D, N = 3, 5, 4, 2
ROWS = torch.tensor([[2], [0]])
INDEX = torch.tensor([[1, 4], [0, 3]])


class Layer(nn.Module):
    """A layer's usual signature, and further arguments by name."""

    def forward(self, hidden_states, attention_mask=None, position_embeddings=None, alibi=None, **kwargs):
        return hidden_states, position_embeddings


def numbered(*shape: int) -> Tensor:
    """A tensor in which every value is another one."""
    return torch.arange(torch.Size(shape).numel(), dtype=torch.float32).view(shape)


def call(hidden: Tensor | None = None, *args: Any, **kwargs: Any) -> LayerArguments:
    hidden = numbered(B, T, D) if hidden is None else hidden
    return LayerArguments(Layer, (hidden, *args), kwargs, (B, T))


def by_hand(value_BT: Tensor) -> Tensor:
    return torch.stack([value_BT[2, [1, 4]], value_BT[0, [0, 3]]])


def test_hidden_states_are_gathered_by_row_and_time() -> None:
    hidden = numbered(B, T, D)
    assert torch.equal(call(hidden).select(ROWS, INDEX)["hidden_states"], by_hand(hidden))


def test_what_has_a_time_axis_is_gathered_too_whether_given_by_position_or_by_name() -> None:
    rotary, positions = (numbered(B, T, 6), numbered(B, T, 6) + 0.5), torch.arange(T).expand(B, T)
    picked = call(None, None, rotary, position_ids=positions).select(ROWS, INDEX)
    assert isinstance(picked["position_embeddings"], tuple)
    assert all(
        torch.equal(*pair) for pair in zip(picked["position_embeddings"], map(by_hand, rotary), strict=True)
    )
    assert torch.equal(picked["position_ids"], INDEX)


def test_one_table_for_all_rows_is_gathered_along_time_alone() -> None:
    table = numbered(1, T, 6)
    picked = call(position_ids=table).select(ROWS, INDEX)["position_ids"]
    assert torch.equal(picked, torch.stack([table[0, [1, 4]], table[0, [0, 3]]]))


def test_a_rotary_table_with_an_axis_for_heads() -> None:
    table = numbered(B, 1, T, 6)
    picked = call(freqs=table).select(ROWS, INDEX)["freqs"]
    assert torch.equal(picked[:, 0], by_hand(table[:, 0])) and picked.shape == (2, 1, 2, 6)


def test_the_mask_the_cache_and_what_has_no_time_axis_are_not_picked() -> None:
    cache, scale, flag = DynamicCache(), torch.tensor(36), True
    arguments = call(None, torch.ones(B, 1, T, T), cache=cache, num_items_in_batch=scale, flag=flag)
    assert set(arguments.select(ROWS, INDEX)) == {"hidden_states"}
    assert arguments.cache() is cache and arguments.cache_name() == "cache"
    assert arguments.mask_name() == "attention_mask" and arguments.mask().shape == (B, 1, T, T)


def test_something_about_each_row_follows_the_rows() -> None:
    """XMOD's languages; three rows of three tokens would be ambiguous, positions are known by name."""
    languages = torch.tensor([7, 8, 9])
    assert call(lang_ids=languages).select(ROWS, INDEX)["lang_ids"].tolist() == [9, 7]


def test_a_time_axis_without_rows_asks_for_one_row_at_a_time() -> None:
    """GPT-J's positions [T] in a batch: rows that keep other tokens cannot share them."""
    arguments = call(position_ids=torch.arange(T))
    assert arguments.one_row_each
    picked = arguments.select(torch.tensor([[1]]), torch.tensor([[0, 2]]))["position_ids"]
    assert picked.tolist() == [0, 2]
    assert not call(position_ids=torch.arange(T)[None]).one_row_each


def test_biases_of_scores_are_gathered_along_their_keys() -> None:
    """BLOOM's [B·N, 1, C]: the last column is the newest key, the rows of the batch lie outside."""
    alibi = numbered(B * N, 1, T)
    keys = torch.tensor([[0, 1, 4], [2, 3, 3]])
    picked = call(alibi=alibi).select(ROWS, INDEX, keys, columns=T)["alibi"]
    want = torch.stack([alibi.view(B, N, 1, T)[2][..., keys[0]], alibi.view(B, N, 1, T)[0][..., keys[1]]])
    assert torch.equal(picked, want.view(2 * N, 1, 3))


def test_a_bias_longer_than_the_keys_ends_with_them() -> None:
    """MPT's table is as long as the context, and has no rows: a group is one row then."""
    arguments = call(hidden=numbered(B, T, D), position_bias=numbered(N, 1, 9))
    assert arguments.one_row_each
    picked = arguments.select(torch.tensor([[1]]), torch.tensor([[0, 4]]), columns=T)["position_bias"]
    assert torch.equal(picked, numbered(N, 1, 9)[..., [4, 8]])


def test_a_time_axis_with_other_rows_is_refused_by_name() -> None:
    with pytest.raises(
        ModlabError, match=r"'strange' of shape \(7, 5, 2\) has a time axis but no batch axis"
    ):
        call(strange=numbered(7, T, 2)).select(ROWS, INDEX)


def test_parallel_streams_are_told_from_rows_by_the_forward() -> None:
    """Gemma 3n's [P, B, T, D], read as [B, T, P, D] and given back as it came."""
    streams = numbered(2, B, T, D)
    arguments = call(streams)
    assert arguments.streams_first and arguments.hidden.shape == (B, T, 2, D)
    assert torch.equal(arguments.residual_BTD, streams.mean(0))
    picked = arguments.select(ROWS, INDEX)["hidden_states"]
    y, _ = arguments.run(Layer().forward, {"hidden_states": picked})
    assert torch.equal(y, picked) and torch.equal(arguments.as_given(arguments.hidden), streams)


def test_changes_replace_arguments_however_they_were_given() -> None:
    arguments = call(None, None, "rotary", extra=1)
    seen = {}

    def forward(hidden_states, attention_mask, position_embeddings, *rest: Any, **kwargs: Any) -> Tensor:
        seen.update(mask=attention_mask, rotary=position_embeddings, **kwargs)
        return hidden_states

    y, rest = arguments.run(forward, {"attention_mask": "new", "extra": 2, "more": 3})
    assert seen == {"mask": "new", "rotary": "rotary", "extra": 2, "more": 3}
    assert rest == () and arguments.in_tuple is False
    assert (
        "extra" in arguments.bound.arguments["kwargs"] and arguments.bound.arguments["kwargs"]["extra"] == 1
    )


def test_the_gradient_of_picked_tokens_goes_where_they_came_from() -> None:
    value = numbered(B, T, D).requires_grad_()
    twice = torch.tensor([[1, 1], [0, 3]])
    take_tokens(value, ROWS, twice).sum().backward()
    count = torch.zeros(B, T)
    count[2, 1], count[0, 0], count[0, 3] = 2, 1, 1
    assert torch.equal(value.grad, count[..., None].expand(B, T, D))
