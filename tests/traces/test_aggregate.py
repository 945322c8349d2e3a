"""Counts over a corpus: equal to what single traces say, by class and by position."""

from typing import Any

import numpy as np
import pytest

import modlab
from modlab.errors import ModlabError
from modlab.traces.aggregate import position_edges
from modlab.traces.token_classes import CLASSES, classify
from tests.helpers.models import scatter_gates
from tests.helpers.tokenizers import make_tokenizer

TEXTS = ["def run(x):\n    return x + 12\n" * 3, "the router decides which token runs, and which skips. " * 4]


@pytest.fixture
def model(tiny_llama: Any) -> Any:
    scatter_gates(tiny_llama)
    return tiny_llama


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return make_tokenizer()


def test_counts_are_those_of_the_traces(model: Any, tokenizer: Any) -> None:
    found = modlab.aggregate_routing(model, tokenizer, TEXTS, progress=False)
    traces = [modlab.trace(model, tokenizer, text) for text in TEXTS]
    assert found.tokens == sum(len(t.tokens) for t in traces) and found.texts == 2
    kept = sum(int(t.keep.sum()) for t in traces)
    assert found.keep_ratio == pytest.approx(kept / (3 * found.tokens))
    frame = found.by_class()
    for name in frame.index:
        of_class = [np.asarray(classify(t.tokens)) == CLASSES.index(name) for t in traces]
        count = sum(int(c.sum()) for c in of_class)
        assert frame.tokens[name] == count
        for row, layer in enumerate([1, 3, 5]):
            want = sum(int(t.keep[row, c].sum()) for t, c in zip(traces, of_class, strict=True)) / count
            assert frame.loc[name, f"layer_{layer}"] == pytest.approx(want)
    assert {"keyword", "identifier", "number", "punctuation", "word"} <= set(frame.index)


def test_of_several_gates_the_share_that_keeps_a_token_counts(make_llama: Any, tokenizer: Any) -> None:
    config = modlab.MoDConfig(layers="all", gates="kv_head", keep_recent=4, keep_first=1)
    model = scatter_gates(modlab.convert(make_llama(), config))
    found = modlab.aggregate_routing(model, tokenizer, TEXTS, progress=False)
    traces = [modlab.trace(model, tokenizer, text) for text in TEXTS]
    want = sum(int(t.keep.sum()) for t in traces) / sum(t.keep.size for t in traces)
    assert 0 < want < 1 and found.keep_ratio == pytest.approx(want)


def test_positions(model: Any, tokenizer: Any) -> None:
    found = modlab.aggregate_routing(model, tokenizer, TEXTS, progress=False)
    frame = found.by_position(6)
    assert frame.tokens.sum() == found.tokens and len(frame) <= 6
    assert (found.position_kept[:4] == found.position_tokens[:4, None]).all()  # always kept
    weights = frame.tokens / frame.tokens.sum()
    assert float((frame["mean"] * weights).sum()) == pytest.approx(found.keep_ratio)
    assert position_edges(5, 16).tolist() == [0, 1, 2, 3, 4, 5] and position_edges(1, 4).tolist() == [0, 1]
    with pytest.raises(ModlabError, match="bins=0"):
        found.by_position(0)


def test_long_texts_are_read_in_pieces(model: Any, tokenizer: Any) -> None:
    found = modlab.aggregate_routing(model, tokenizer, TEXTS, seq_len=16, progress=False)
    assert len(found.position_tokens) == 16
    assert found.tokens == modlab.aggregate_routing(model, tokenizer, TEXTS, progress=False).tokens


def test_report_tells_the_progress_and_may_end_it(model: Any, tokenizer: Any) -> None:
    told: list[tuple[int, int]] = []

    def report(done: int, count: int) -> None:
        told.append((done, count))
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        modlab.aggregate_routing(model, tokenizer, TEXTS, seq_len=16, progress=False, report=report)
    assert [done for done, _ in told] == [1, 2] and told[0][1] > 2


def test_errors(model: Any, tokenizer: Any, make_llama: Any) -> None:
    with pytest.raises(ModlabError, match="No text"):
        modlab.aggregate_routing(model, tokenizer, ["", ""], progress=False)
    with pytest.raises(ModlabError, match=r"modlab\.convert"):
        modlab.aggregate_routing(make_llama(), tokenizer, TEXTS, progress=False)
