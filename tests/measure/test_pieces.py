"""What a measure runs over: pieces that fit the model, from texts, rows and data sets."""

import pytest
import torch

from modlab import measure
from modlab.errors import ModlabError
from tests.measure.models import VOCAB, Letters, dense_model


def test_long_inputs_are_cut_and_short_leftovers_dropped():
    pieces = measure.as_batches(torch.arange(21)[None], seq_len=10)
    assert [p["input_ids"].tolist()[0] for p in pieces] == [list(range(10)), list(range(10, 20))]


def test_default_pieces_are_the_context_for_tokens_and_shorter_for_texts():
    model = dense_model()
    assert measure.piece_length(model, None, None) == 256
    model.config.max_position_embeddings = 8192
    assert measure.piece_length(model, None, None) == 8192
    assert measure.piece_length(model, Letters(), None) == measure.TEXT_PIECE
    assert measure.piece_length(model, Letters(), 4096) == 4096
    assert measure.piece_length(model, None, 10000) == 8192


def test_batches_from_texts_rows_and_datasets():
    assert measure.as_batches("abc", Letters())[0]["input_ids"].tolist() == [
        [97 % VOCAB, 98 % VOCAB, 99 % VOCAB]
    ]
    assert measure.as_batches([{"input_ids": [1, 2, 3]}])[0]["input_ids"].shape == (1, 3)
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_dict({"input_ids": [[1, 2, 3], [4, 5, 6]]})
    assert len(measure.as_batches(rows)) == 2


@pytest.mark.parametrize(
    ("data", "tokenizer", "message"),
    [
        ("", Letters(), "0 token"),
        (["abc", "x"], Letters(), "text 1"),
        ("abc", None, "tokenizer"),
        ([], None, "nothing to measure"),
        ([{"labels": [1, 2]}], None, "input_ids"),
    ],
)
def test_bad_data_is_refused(data, tokenizer, message):
    with pytest.raises(ModlabError, match=message):
        measure.as_batches(data, tokenizer)
