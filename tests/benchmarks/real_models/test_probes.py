"""Rows that ask for the past stand as they say they do."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.real_models.mixture import Mixture
from benchmarks.real_models.probes import recall, retrieval
from modlab.errors import ModlabError


def fill(rows: int, T: int) -> np.ndarray:
    return np.random.default_rng(0).integers(1000, size=(rows, T), dtype=np.int32)


def test_every_passage_comes_again_at_its_distance() -> None:
    probe = recall(fill(3, 2048), (256, 1024), each=3)
    assert len(probe.spans) == 3 * 6
    for row, begin, end, distance in probe.spans:
        assert end - begin == 63
        again, source = (
            probe.rows[row, begin - 1 : end],
            probe.rows[row, begin - 1 - distance : end - distance],
        )
        assert (again == source).all()


def test_every_question_was_answered_before() -> None:
    probe = retrieval(fill(2, 2048), lambda text: [ord(letter) for letter in text], (256, 1024), each=3)
    for row, begin, end, distance in probe.spans:
        answer = "".join(map(chr, probe.rows[row, begin:end]))
        question = "".join(map(chr, probe.rows[row, begin - 8 : begin]))
        assert answer.isdigit() and question.endswith("_code = ")
        assert (probe.rows[row, begin - distance : end - distance] == probe.rows[row, begin:end]).all()


def test_rows_without_room_are_refused() -> None:
    with pytest.raises(ModlabError, match="no room for 9 spans"):
        recall(fill(1, 512), (256,), each=9)


def test_the_mixture_repeats_lines_and_passages() -> None:
    stream = np.arange(50_000, dtype=np.int32)
    lines = np.full((4, 32), -1, dtype=np.int32)
    lines[:, :5] = 100_000 + np.arange(20).reshape(4, 5)
    rows = Mixture(stream, lines, passages=0.5, keyed=0.5).rows(40, 2048).numpy()
    keyed = (rows >= 100_000).any(1)
    assert 5 < keyed.sum() < 35
    for row, has_lines in zip(rows, keyed, strict=True):
        values, counts = np.unique(row, return_counts=True)
        assert (counts > 1).any()
        if has_lines:
            assert (counts[values >= 100_000] > 1).all()
    assert (Mixture(stream, lines, seed=3).rows(2, 64) == Mixture(stream, lines, seed=3).rows(2, 64)).all()
