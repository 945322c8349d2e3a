"""Paired probes: the two sides are those of a run each, and the standard error is that of differences."""

from __future__ import annotations

import functools

import pytest
import torch

import modlab
from modlab.errors import ModlabError
from modlab.probes import recall_gap, retrieval_gap
from tests.helpers.models import alternate_layers, dense_llama, scatter_gates
from tests.helpers.tokenizers import make_tokenizer

STREAM = torch.randint(3, 128, (1, 3000), generator=torch.Generator().manual_seed(0))
SMALL = {"rows": 5, "distances": (60, 150, 900), "progress": False}


@pytest.fixture(scope="module")
def sides():
    sizes = {"vocab_size": len(make_tokenizer()), "max_position_embeddings": 512}
    routed = modlab.convert(dense_llama(**sizes), alternate_layers(skip="kv", keep_recent=4))
    return scatter_gates(routed, 4.0), dense_llama(**sizes)


def test_recall_is_that_of_both_models(sides) -> None:
    model, dense = sides
    asked = {**SMALL, "passage": 16, "prefix": 8}
    with pytest.warns(UserWarning, match="distances left out. 900"):
        table = recall_gap(model, STREAM, **asked)
    fits = asked | {"distances": (60, 150)}
    mine = modlab.recall(model, STREAM, by_row=True, **fits)
    theirs = modlab.recall(dense, STREAM, by_row=True, **fits)
    assert table.distance.to_list() == [60, 150] and table.passages.to_list() == [5, 5]
    for line, distance in enumerate((60, 150)):
        one, other = (t[t.distance == distance].second_loss.to_numpy() for t in (mine, theirs))
        assert table.dense[line] == pytest.approx(other.mean()) != pytest.approx(one.mean())
        assert table.routed[line] == pytest.approx(one.mean())
        assert table.gap[line] == pytest.approx((one - other).mean())
        assert table.stderr[line] == pytest.approx((one - other).std(ddof=1) / 5**0.5)
    assert 0 < table.keep_ratio[0] < 1
    assert 900 in table.attrs["left_out"]


def test_retrieval_counts_what_the_dense_model_answers(sides) -> None:
    model, _ = sides
    asked = SMALL | {"distances": (100,), "pairs": 2}
    table = retrieval_gap(model, STREAM, make_tokenizer(), **asked)
    assert table.questions[0] == 5 and table.dense_right[0] == table.dense[0] * 5
    assert table.difference[0] == pytest.approx(table.routed[0] - table.dense[0])


def test_of_what_dense_answers_and_the_error_of_differences(sides, monkeypatch) -> None:
    import pandas as pd

    from modlab.probes import paired

    right = {True: [True, True, True, False], False: [True, False, True, True]}

    def probe(model, data, tokenizer, **settings):
        rows = [{"distance": 7, "row": i, "right": r, "keep_ratio": 0.5} for i, r in
                enumerate(right[model.mod.is_off])]  # fmt: skip
        frame = pd.DataFrame(rows)
        frame.attrs["left_out"] = {}
        return frame

    monkeypatch.setattr(paired, "retrieval", probe)
    (line,) = retrieval_gap(sides[0], STREAM, None).to_dict("records")
    assert (line["questions"], line["dense"], line["routed"]) == (4, 0.75, 0.75)
    assert line["dense_right"] == 3 and line["of_dense"] == pytest.approx(2 / 3)
    assert line["difference"] == 0 and line["stderr"] == pytest.approx((2 / 3) ** 0.5 / 2)


def test_a_dense_model_is_refused(sides) -> None:
    with pytest.raises(ModlabError, match="is dense"):
        recall_gap(sides[1], STREAM, **SMALL)


def test_a_dense_side_that_is_known_is_not_measured_again(sides, monkeypatch) -> None:
    from modlab.probes import paired, recall

    model, _ = sides
    asked = {**SMALL, "passage": 16, "prefix": 8, "distances": (60, 150)}
    want = recall_gap(model, STREAM, **asked)
    dense = paired.dense_rows(recall, model, STREAM, None, **asked)
    off = []

    @functools.wraps(recall)
    def probe(model, *rest, **settings):
        off.append(model.mod.is_off)
        return recall(model, *rest, **settings)

    monkeypatch.setattr(paired, "recall", probe)
    assert recall_gap(model, STREAM, dense=dense, **asked).equals(want)
    assert off == [False]
    once = asked | {"distances": iter((60, 150))}
    assert recall_gap(model, iter([STREAM]), dense=dense[::-1], **once).equals(want)
    assert recall_gap(model, STREAM, dense=dense, **asked | {"batch_size": 2}).gap.notna().all()


def test_a_dense_side_of_other_rows_is_refused_before_anything_runs(sides, monkeypatch) -> None:
    from modlab.probes import paired, recall, retrieval

    model, plain = sides
    asked = {**SMALL, "passage": 16, "prefix": 8, "distances": (60, 150)}
    dense = paired.dense_rows(recall, model, STREAM, None, **asked)
    near = SMALL | {"distances": (100,), "pairs": 2, "lead": 4}
    found = paired.dense_rows(retrieval, model, STREAM, make_tokenizer(), **near)
    for name, probe in {"recall": recall, "retrieval": retrieval}.items():
        monkeypatch.setattr(paired, name, functools.wraps(probe)(lambda *_, **__: pytest.fail("it ran")))
    others = ({"seed": 1}, {"rows": 4}, {"passage": 15}, {"prefix": 9}, {"distances": (60, 151)})
    for other in others:
        with pytest.raises(ModlabError, match="of other material or settings"):
            recall_gap(model, STREAM, dense=dense, **asked | other)
    with pytest.raises(ModlabError, match="of other material or settings"):
        recall_gap(model, STREAM.roll(1), dense=dense, **asked)
    for other in ({"pairs": 3}, {"lead": 5}):
        with pytest.raises(ModlabError, match="of other material or settings"):
            retrieval_gap(model, STREAM, make_tokenizer(), dense=found, **near | other)
    for parts in (dense[:8], dense.iloc[[0, 0, *range(2, 10)]]):
        with pytest.raises(ModlabError, match="doubled or some are missing"):
            recall_gap(model, STREAM, dense=parts, **asked)
    with pytest.raises(ModlabError, match=r"take what dense_rows\(recall"):
        recall_gap(model, STREAM, dense=recall(model, STREAM, by_row=True, **asked), **asked)
    with pytest.raises(ModlabError, match="is dense"):
        recall_gap(plain, STREAM, dense=dense, **asked)
