"""What kind of thing each token is: by the word it belongs to, in code and in prose."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modlab.traces.token_classes import CLASSES, classify, looks_like_code


def kinds(*tokens: str) -> list[str]:
    return [CLASSES[i] for i in classify(tokens)]


def pieces(text: str) -> list[str]:
    return re.findall(r" ?\w+|[^\w\s]|\s+", text)


CODE = "def read_table(path, n=10):\n    x1 = path + 2\n    return x1\n"
PROSE = "The import of tea for 10 pounds is not a class of its own, is it?"


def test_code() -> None:
    found = dict(zip(pieces(CODE), kinds(*pieces(CODE)), strict=True))
    assert {found[t] for t in ("def", "return")} == {"keyword"}
    assert {found[t] for t in (" read_table", "path", "x1", " x1")} == {"identifier"}
    assert found["10"] == found[" 2"] == "number"
    assert {found[t] for t in ("(", ")", ":", "=")} == {"punctuation"}
    assert found["\n    "] == "newline"


def test_prose_has_words_not_keywords() -> None:
    found = dict(zip(pieces(PROSE), kinds(*pieces(PROSE)), strict=True))
    assert {found[t] for t in (" import", " for", " is", " class")} == {"word"}
    assert found[" 10"] == "number" and found[","] == found["?"] == "punctuation"
    assert kinds("call ", "snake", "_case", " and", " camelCase") == ["word", "identifier"] + [
        "identifier", "word", "identifier",
    ]  # fmt: skip


def test_a_token_is_judged_by_its_whole_word() -> None:
    assert kinds("re", "ad_", "tab", "le") == ["identifier"] * 4
    assert (
        kinds(CODE, "de", "f", " f", "(", ")", ":") == ["keyword"] * 3 + ["identifier"] + ["punctuation"] * 3
    )
    assert kinds("x", "1") == ["identifier"] * 2


@pytest.mark.parametrize(
    "token, kind",
    [
        ("", "other"),
        (" ", "blank"),
        ("\t", "blank"),
        ("\n\n", "newline"),
        ("日本", "word"),
        ("🙂", "other"),
        ("—", "punctuation"),
    ],
)
def test_single_tokens(token: str, kind: str) -> None:
    assert kinds(token) == [kind]


def test_code_is_told_from_prose() -> None:
    assert looks_like_code(CODE) and not looks_like_code(PROSE) and not looks_like_code("")


@settings(max_examples=100, deadline=None)
@given(tokens=st.lists(st.text(max_size=6), max_size=20))
def test_every_token_has_one_class(tokens: list[str]) -> None:
    found = classify(tokens)
    assert len(found) == len(tokens) and all(0 <= i < len(CLASSES) for i in found)
