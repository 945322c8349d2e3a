"""The pieces of a text are the text again: with tokenizers that report offsets and with those that do not."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from modlab.data.pieces import decoded_pieces, encode
from modlab.errors import ModlabError
from tests.helpers.tokenizers import make_tokenizer

BYTES = ByT5Tokenizer()
TEXTS = [
    "plain",
    "café",
    "日本語",
    "ok \U0001f600",
    "שלום",
    "a\u0301 e\u0301",
    "  two  blanks\n\n",
    "\ufffd\ufffd",
    "</s> in the text",
    "\U0001f468\u200d\U0001f469\u200d\U0001f467",
]


class Slow:
    """A tokenizer as those without the Rust library are: no offsets."""

    is_fast = False

    def __init__(self, fast: Any) -> None:
        self.fast = fast
        self.all_special_ids = fast.all_special_ids

    def __call__(self, text: str, **more: Any) -> Any:
        assert "return_offsets_mapping" not in more
        return self.fast(text, **more)

    def decode(self, *args: Any, **more: Any) -> str:
        text: str = self.fast.decode(*args, **more)
        return text


def lowering() -> PreTrainedTokenizerFast:
    """Lower case, no accents, blanks gone: what BERT's tokenizers do."""
    inner = Tokenizer(
        models.WordPiece({"[UNK]": 0, **{c: i for i, c in enumerate("abcdefgh", 1)}}, unk_token="[UNK]")
    )
    inner.normalizer = normalizers.BertNormalizer()
    inner.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split("", "isolated")]
    )
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="[UNK]")


@pytest.fixture(scope="module")
def tokenizers() -> dict[str, Any]:
    fast = make_tokenizer()
    return {
        "fast": fast,
        "slow": Slow(fast),
        "bytes": BYTES,
        "lowering": lowering(),
        "slow lowering": Slow(lowering()),
    }


NAMES = ["fast", "slow", "bytes", "lowering", "slow lowering"]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("name", NAMES)
def test_pieces_join_to_the_text(name: str, text: str, tokenizers: dict[str, Any]) -> None:
    if "lowering" in name and not text.strip("\ufffd"):
        pytest.skip("BERT's normaliser drops the sign for broken text: there is no token")
    ids, pieces = encode(tokenizers[name], text)
    assert "".join(pieces) == text
    assert len(pieces) == len(ids) == len(tokenizers[name](text)["input_ids"])


@settings(max_examples=150, deadline=None)
@given(
    text=st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=40),
    name=st.sampled_from(NAMES),
)
def test_pieces_of_any_text_join_to_it(text: str, name: str, tokenizers: dict[str, Any]) -> None:
    if tokenizers[name](text)["input_ids"]:  # a tokenizer may have nothing for a blank
        assert "".join(encode(tokenizers[name], text)[1]) == text


def test_tokenizers_without_offsets_cut_as_those_with(tokenizers: dict[str, Any]) -> None:
    text = "the router decides which token runs, 日本 \U0001f642 and which one skips it\n  twice. "
    assert encode(tokenizers["slow"], text) == encode(tokenizers["fast"], text)


def test_a_character_of_several_tokens_goes_to_the_first(tokenizers: dict[str, Any]) -> None:
    assert encode(BYTES, "é!")[1] == ["é", "", "!", ""]


def test_pieces_stand_for_their_own_words_where_case_and_blanks_are_changed(
    tokenizers: dict[str, Any],
) -> None:
    ids, pieces = encode(tokenizers["slow lowering"], "Ab  Cd")
    assert [piece.strip() for piece in pieces] == ["A", "b", "C", "d"]


@pytest.mark.parametrize("kind", [list, tuple, torch.tensor, lambda ids: {"input_ids": [ids]}])
def test_token_ids_are_taken_as_they_are(kind: Any, tokenizers: dict[str, Any]) -> None:
    fast = tokenizers["fast"]
    ids, pieces = encode(fast, "café 日本")
    found, same = encode(fast, kind([1, *ids, 2]))
    assert found == [1, *ids, 2]
    assert same[0] == "<s>" and same[-1] == "</s>" and "".join(same[1:-1]) == "café 日本"


def test_padding_of_a_row_is_left_out(tokenizers: dict[str, Any]) -> None:
    padded = {"input_ids": [[0, 0, 40, 41]], "attention_mask": [[0, 0, 1, 1]]}
    assert encode(tokenizers["fast"], padded)[0] == [40, 41]


@pytest.mark.parametrize(
    ("item", "says"),
    [
        ("", "empty"),
        ([], "no token ids"),
        ([[1, 2], [3, 4]], "One row"),
        ({"input_ids": [1, 2], "labels": [1, 2]}, "labels"),
        ({"input_ids": [1, 2], "position_ids": [0, 1]}, "position_ids"),
        ({"text": "a", "name": "b"}, "no input_ids"),
        (None, "None"),
        (2.5, "whole numbers|shape"),
        ({"input_ids": [1, 2], "attention_mask": [0, 0]}, "no token ids"),
        ([1, -1], "from -1"),
    ],
)
def test_other_things_are_refused(item: Any, says: str, tokenizers: dict[str, Any]) -> None:
    with pytest.raises(ModlabError, match=says):
        encode(tokenizers["fast"], item)


def test_bytes_that_are_no_character_end_somewhere(tokenizers: dict[str, Any]) -> None:
    """Ids that decode to broken characters: each has a piece, and nothing of what follows is lost."""
    broken = [3 + 0xF0] * 20 + [3 + ord("x")]
    assert decoded_pieces(BYTES, broken)[-1].endswith("x") or "x" in "".join(decoded_pieces(BYTES, broken))
