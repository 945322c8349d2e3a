"""Batches from whatever people have: each kind of input means one thing, each key is used or refused."""

from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import BatchEncoding

from modlab.data.batches import KEYS, as_batches, batch_of, check_vocabulary, items_of, iter_batches
from modlab.data.texts import token_ids
from modlab.errors import ModlabError
from tests.helpers.tokenizers import character_tokenizer

IDS = [5, 6, 7, 8]


@pytest.fixture
def tokenizer() -> Any:
    made = character_tokenizer(bos_token="<s>", eos_token="</s>")
    made.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    return made


@pytest.mark.parametrize(
    "one",
    [
        IDS,
        tuple(IDS),
        [IDS],
        np.array(IDS),
        np.array([IDS], dtype=np.int32),
        torch.tensor(IDS),
        torch.tensor([IDS], dtype=torch.int16),
        {"input_ids": IDS},
        [{"input_ids": IDS, "labels": None}],
        {"input_ids": torch.tensor([IDS])},
        BatchEncoding({"input_ids": IDS}),
        Dataset.from_dict({"input_ids": [IDS]}),
        iter([IDS]),
    ],
)
def test_one_row_of_ids_in_all_its_forms(one: Any) -> None:
    (batch,) = as_batches(one)
    assert set(batch) == {"input_ids"}
    assert batch["input_ids"].tolist() == [IDS] and batch["input_ids"].dtype == torch.long


def test_one_text_or_chat_in_all_its_forms(tokenizer: Any) -> None:
    chat = [{"role": "user", "content": "hello"}]
    for text, told in (("some text", "some text"), (chat, "user: hello\n")):
        wanted = [token_ids(told, tokenizer)]
        column = "text" if isinstance(text, str) else "messages"
        for one in (text, [text], iter([text]), {column: text}, Dataset.from_dict({column: [text]})):
            (batch,) = as_batches(one, tokenizer)
            assert batch["input_ids"].tolist() == wanted


def test_all_keys_arrive() -> None:
    row = {
        "input_ids": IDS,
        "attention_mask": [True, True, True, False],
        "labels": [-100, 6, 7, -100],
        "position_ids": [0, 1, 0, 1],
    }
    (batch,) = as_batches([row])
    assert tuple(batch) == KEYS
    assert {name: value[0].tolist() for name, value in batch.items()} == {
        **row,
        "attention_mask": [1, 1, 1, 0],
    }


def test_positions_of_one_row_are_those_of_all() -> None:
    batch = batch_of({"input_ids": [IDS, IDS], "position_ids": [[0, 1, 2, 3]]})
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3]] * 2


@pytest.mark.parametrize(
    ("item", "says"),
    [
        ({"input_ids": IDS, "token_type_ids": [0] * 4}, "token_type_ids"),
        ({"input_ids": IDS, "pixel_values": [0.5]}, "pixel_values"),
        ({"labels": IDS}, r"no input_ids; its keys are \['labels'\]"),
        ({"train": [IDS]}, r"\['train'\]"),
        ({"input_ids": [[1, 2], [3]]}, "rows of equal length"),
        ({"input_ids": IDS, "labels": IDS[:3]}, "one shape"),
        ({"input_ids": [0.5, 1.5]}, "whole numbers"),
        ({"input_ids": [True, False]}, "whole numbers"),
        ({"input_ids": ["a", "b"]}, "input_ids cannot"),
        ({"input_ids": IDS, "attention_mask": [0.0, 1.0, 1.0, 1.0]}, "whole numbers"),
        ({"input_ids": IDS, "attention_mask": [0, 1, 2, 1]}, "other values than 0"),
        ({"input_ids": [[[1, 2]]]}, r"\[T\] or \[B, T\]"),
        ({"input_ids": 3}, "shape"),
        ({"input_ids": [2**70, 1]}, "cannot be made a tensor"),
        (None, "None"),
        (object(), "tensor"),
    ],
)
def test_what_means_nothing_is_refused(item: Any, says: str) -> None:
    with pytest.raises(ModlabError, match=says):
        as_batches([item])


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (pd.DataFrame({"text": ["a"], "n": [1]}), r"columns \['text', 'n'\]"),
        (b"bytes", "decode"),
        (17, "int"),
        (None, "NoneType"),
        ([b"bytes"], "tensor"),
    ],
)
def test_data_that_is_no_data_is_refused(data: Any, says: str) -> None:
    with pytest.raises(ModlabError, match=says):
        as_batches(data)


@pytest.mark.parametrize(
    ("batch", "high"), [({"input_ids": [0, 20]}, 20), ({"input_ids": [0, 1], "labels": [-100, 25]}, 25)]
)
def test_ids_beyond_the_vocabulary_are_said_so(batch: Any, high: int) -> None:
    with pytest.raises(ModlabError, match=f"to {high}, but the model has 20 tokens.*tokenizer"):
        as_batches([batch], vocabulary=20)
    assert as_batches([batch], vocabulary=26) and as_batches([batch])


@pytest.mark.parametrize("ids", [[-1, 3], [-100, 3]])
def test_ids_below_zero_are_refused_whatever_the_model(ids: Any) -> None:
    with pytest.raises(ModlabError, match=f"from {ids[0]}"):
        check_vocabulary(batch_of(ids), None, "the data")


def test_only_labels_may_be_left_out() -> None:
    check_vocabulary(batch_of({"input_ids": IDS, "labels": [-100] * 4}), 9, "the data")


@pytest.mark.parametrize("batch_size", [0, -1])
def test_batches_of_no_row_are_refused(batch_size: int) -> None:
    with pytest.raises(ModlabError, match=f"batch_size={batch_size}"):
        iter_batches([IDS], batch_size=batch_size)


def test_one_batch_at_a_time() -> None:
    def rows() -> Any:
        yield IDS
        raise AssertionError("read too far")

    assert next(iter_batches(rows()))["input_ids"].tolist() == [IDS]


def test_documents_of_a_cut_row_keep_their_positions() -> None:
    row = {"input_ids": list(range(9)), "position_ids": [0, 1, 2, 3, 4, 5, 0, 1, 2]}
    pieces = as_batches([row], seq_len=4)
    assert [p["position_ids"].tolist()[0] for p in pieces] == [[0, 1, 2, 3], [0, 1, 0, 1]]


def test_lists_are_items_and_ids_are_one() -> None:
    assert list(items_of([IDS, IDS])) == [IDS, IDS]
    assert list(items_of(IDS)) == [IDS]
    assert list(items_of("text")) == ["text"]


@settings(max_examples=100, deadline=None)
@given(
    rows=st.lists(st.lists(st.integers(0, 99), min_size=1, max_size=17), min_size=1, max_size=8),
    seq_len=st.one_of(st.none(), st.integers(2, 9)),
    batch_size=st.one_of(st.none(), st.integers(1, 5)),
)
def test_nothing_is_lost_but_single_tokens(rows: Any, seq_len: int | None, batch_size: int | None) -> None:
    """Pieces in order are the rows, whatever they are cut and joined to."""
    found = [
        row for batch in iter_batches(rows, None, seq_len, batch_size) for row in batch["input_ids"].tolist()
    ]
    wanted = []
    for row in rows:
        step = seq_len or len(row)
        wanted += [piece for i in range(0, len(row), step) if len(piece := row[i : i + step]) > 1]
    assert found == wanted
    for batch in iter_batches(rows, None, seq_len, batch_size):
        assert batch_size is None or len(batch["input_ids"]) <= batch_size
