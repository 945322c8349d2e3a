"""What kind of thing each token of a text is: identifier, keyword, number, punctuation, blank, word."""

from __future__ import annotations

import keyword
import re
import unicodedata
from collections.abc import Sequence

CLASSES = ("keyword", "identifier", "word", "number", "punctuation", "newline", "blank", "other")
"""The classes, in the order of `classify`'s indices."""

_IDENTIFIER_SIGN = re.compile(r"[_a-z0-9][A-Z]|_|[A-Za-z][0-9]")
_WORD = re.compile(r"\w+(?:['’][^\W\d_]+)?")
_KEYWORDS = frozenset(keyword.kwlist) | frozenset(keyword.softkwlist) - {"_", "type"}
# Keywords that are English words as well; in prose they are words.
_CODE_SIGNS = re.compile(r"[(){}\[\]=;]|^\s{4,}\S|^\s*(?:def|class|import|return|else|elif)\b")


def classify(tokens: Sequence[str]) -> list[int]:
    """The class of each token of one text, as an index into CLASSES.

    A token is judged by the word of the text that it is a part of: "read" and "_table" of "read_table" are
    both identifiers, and "1" in "x1" is one, too. In a text that looks like program code, a word is a keyword
    if Python has it as one, else an identifier; in prose it is a word, unless its form (snake_case,
    camelCase, a digit inside) says identifier. A word inside a string or comment of code counts as an
    identifier: this is a reading of forms, not a parser.

    Args:
        tokens: pieces of the text, as `RoutingTrace.tokens`: joined they are the text.
    """
    text = "".join(tokens)
    code = looks_like_code(text)
    of_word = [-1] * len(text)  # class of the word that each character is in
    for match in _WORD.finditer(text):
        of_word[match.start() : match.end()] = [_word_class(match.group(), code)] * len(match.group())
    classes, at = [], 0
    for token in tokens:
        classes.append(_token_class(token, of_word[at : at + len(token)]))
        at += len(token)
    return classes


def looks_like_code(text: str) -> bool:
    """Whether the text reads as program code: brackets, assignments, indented lines on most of its lines."""
    lines = [line for line in text.splitlines() if line.strip()]
    if not lines:
        return False
    signs = sum(bool(_CODE_SIGNS.search(line)) for line in lines)
    return signs >= 0.4 * len(lines)


def _word_class(word: str, code: bool) -> int:
    if word[0].isdigit():
        name = "number"
    elif code and word in _KEYWORDS:
        name = "keyword"
    elif code or _IDENTIFIER_SIGN.search(word):
        name = "identifier"
    else:
        name = "word"
    return CLASSES.index(name)


def _token_class(token: str, of_word: Sequence[int]) -> int:
    """A token with any character of a word is of that word's class; else what its first sign is."""
    inside = [c for c in of_word if c >= 0]
    if inside:
        return inside[0]
    signs = token.strip()
    if not signs:
        return CLASSES.index("newline" if "\n" in token else "blank" if token else "other")
    category = unicodedata.category(signs[0])
    return CLASSES.index("punctuation" if category[0] in "PS" and ord(signs[0]) < 0x2E80 else "other")
