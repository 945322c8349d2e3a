"""Repeated passages and lines: shares, places, lengths of rows, refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset

from modlab import data
from modlab.data import far
from modlab.errors import ModlabError
from tests.helpers.tokenizers import character_tokenizer

T = 1024


@pytest.fixture(scope="module")
def rows() -> torch.Tensor:
    """No token comes twice in a row, so that every repetition is one that was put there."""
    return torch.arange(T).repeat(200, 1) + 1000


def repetitions(row: torch.Tensor) -> list[int]:
    """Distances between equal tokens of a row."""
    places: dict[int, int] = {}
    found = []
    for at, token in enumerate(row.tolist()):
        if token in places:
            found.append(at - places[token])
        places[token] = at
    return found


def test_the_asked_share_of_rows_has_passages_that_come_again(rows: torch.Tensor) -> None:
    changed = data.with_repeats(rows, passages=0.5, lines=0.0)
    assert changed.dtype == torch.int32 and changed.shape == rows.shape
    with_some = [row for row in changed if repetitions(row)]
    assert 80 <= len(with_some) <= 120
    assert torch.equal(changed[0], data.with_repeats(rows, passages=0.5, lines=0.0)[0])
    assert not torch.equal(changed, data.with_repeats(rows, passages=0.5, lines=0.0, seed=1))


def test_distances_reach_over_the_whole_row(rows: torch.Tensor) -> None:
    apart = [d for row in data.with_repeats(rows, passages=1.0, lines=0.0) for d in repetitions(row)]
    counts, _ = np.histogram(apart, bins=4, range=(0, T))
    assert all(counts > 0), counts
    assert max(apart) > 0.85 * T and min(apart) <= 64


def test_far_distances_come_as_often_as_near_ones(rows: torch.Tensor) -> None:
    drawn = np.random.default_rng(0)
    pairs = np.array([far._far_pair(255, 1, drawn) for _ in range(8000)])
    counts, _ = np.histogram(pairs[:, 1] - pairs[:, 0], bins=8, range=(1, 255))
    assert pairs.min() >= 0 and pairs.max() <= 254
    assert all(abs(counts / 1000 - 1) < 0.15), counts
    apart = [d for row in data.with_repeats(rows, passages=1.0, lines=0.0) for d in repetitions(row)]
    counts, _ = np.histogram(apart, bins=4, range=(0, T))
    assert counts[3] > counts.sum() / 16, counts


def test_a_share_of_the_repetitions_is_near_at_equally_many_distances() -> None:
    drawn = np.random.default_rng(0)
    pairs = np.array([far._far_pair(400, 5, drawn, near=0.5) for _ in range(8000)])
    apart = pairs[:, 1] - pairs[:, 0]
    assert pairs.min() >= 0 and pairs.max() <= 399 and apart.min() == 5
    counts, _ = np.histogram(apart, bins=[5, 53, 101, 201, 301, 401])
    wanted = np.array([2000 + 4000 * 48 / 395] * 2 + [4000 * 100 / 395] * 2 + [4000 * 99 / 395])
    assert all(abs(counts / wanted - 1) < 0.15), (counts, wanted)
    only = [far._far_pair(400, 5, drawn, near=1.0) for _ in range(500)]
    assert max(other - one for one, other in only) <= 100
    assert far._far_pair(30, 20, drawn, near=1.0)[1] <= 29, "where a quarter is too near for the passage"


@pytest.mark.parametrize("shares", [{"passages": 1.0, "lines": 0.0}, {"passages": 0.0, "lines": 1.0}])
def test_near_repetitions_are_put_into_rows_and_none_changes_nothing(
    rows: torch.Tensor, shares: dict[str, float]
) -> None:
    tokenizer = character_tokenizer()
    rows = rows[:40]
    far_rows, near_rows = (data.with_repeats(rows, tokenizer, near=near, **shares) for near in (0.0, 1.0))
    assert torch.equal(far_rows, data.with_repeats(rows, tokenizer, **shares))
    if shares["passages"]:
        apart = [d for row in near_rows for d in repetitions(row)]
        assert np.mean([d > 2 * T // far.NEAR for d in apart]) < 0.02 and min(apart) <= 64
    assert not torch.equal(far_rows, near_rows)
    (batch, *_) = data.mixed_lengths(rows, tokenizer, lengths=(T,), tokens=T * 40, near=1.0, **shares)
    assert torch.equal(batch, near_rows)


def test_lines_come_in_pairs_and_in_no_form_of_the_probe(rows: torch.Tensor) -> None:
    tokenizer = character_tokenizer(bos_token="<s>", eos_token="</s>")
    changed = data.with_repeats(rows, tokenizer, passages=0.0, lines=1.0)
    newline = tokenizer.convert_tokens_to_ids("\n")
    for row in changed[:20]:
        assert (row == newline).sum() >= 8
    lines = far._lines(tokenizer, 0)
    assert lines.shape == (far.LINES, far.LINE)
    written = {tokenizer.decode(line[line >= 0]) for line in lines[:200]}
    assert len(written) > 150
    assert not any("name_" in text for text in written)


def test_rows_of_a_data_set_and_the_given_tensor_stay_as_they_are(rows: torch.Tensor) -> None:
    before = rows.clone()
    table = Dataset.from_dict({"input_ids": rows[:10].tolist()})
    assert torch.equal(
        data.with_repeats(table, passages=1.0, lines=0.0),
        data.with_repeats(rows[:10], passages=1.0, lines=0.0),
    )
    assert torch.equal(rows, before)
    assert table[0]["input_ids"] == before[0].tolist()


def test_batches_of_several_lengths_share_the_tokens(rows: torch.Tensor) -> None:
    batches = data.mixed_lengths(rows, lengths=(256, 1024), tokens=2048, passages=1.0, lines=0.0)
    shapes = {tuple(batch.shape) for batch in batches}
    assert shapes == {(8, 256), (2, 1024)}
    each = [sum(b.numel() for b in batches if b.shape[1] == length) for length in (256, 1024)]
    assert each[0] == each[1] == 100 * T // 2048 * 2048
    found = [d for b in batches if b.shape[1] == 256 for row in b for d in repetitions(row)]
    assert found and max(found) < 256  # put there once the rows were cut
    order = [batch.shape[1] for batch in batches]
    assert order != sorted(order)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"passages": 1.5, "lines": 0.0}, "passages=1.5"),
        ({"passages": 0.7, "lines": 0.7}, "more than all rows"),
        ({"lines": 0.2}, "need the tokenizer"),
        ({"lines": 0.0, "seed": -1}, "seed=-1"),
        ({"lines": float("nan")}, "lines=nan"),
    ],
)
def test_refusals(rows: torch.Tensor, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ModlabError, match=message):
        data.with_repeats(rows, **settings)


@pytest.mark.parametrize("texts", ["words", ["words", "more"], [{"text": "words"}], Path("words.txt")])
def test_texts_are_sent_to_be_packed(texts: Any) -> None:
    for make in (
        lambda: data.with_repeats(texts, character_tokenizer()),
        lambda: data.mixed_lengths(texts, character_tokenizer(), lengths=(8,), tokens=8),
    ):
        with pytest.raises(ModlabError, match=r"texts, not token rows: data\.packed"):
            make()


def test_refusals_of_rows(rows: torch.Tensor) -> None:
    with pytest.raises(ModlabError, match="one length"):
        data.with_repeats([rows[0], rows[1][:100]], lines=0.0)
    with pytest.raises(ModlabError, match="labels"):
        data.with_repeats({"input_ids": rows, "labels": rows}, lines=0.0)
    with pytest.raises(ModlabError, match="seq_len=4096"):
        data.mixed_lengths(rows, lengths=(4096,), tokens=4096, lines=0.0)
    with pytest.raises(ModlabError, match="too few"):
        data.mixed_lengths(rows, lengths=(1024,), tokens=10**6, lines=0.0)
    with pytest.raises(ModlabError, match="lengths="):
        data.mixed_lengths(rows, lengths=(), tokens=4096, lines=0.0)
