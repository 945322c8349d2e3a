"""One text or chat, as a string and as token ids.

A *text* is a string, and gets the special tokens that its tokenizer adds. A *chat* is a list of messages with
`role` and `content`; the tokenizer's chat template writes it, special tokens included.

What a string means is the same at every entry point. Where something is measured, traced, shown or continued,
it is the text. Where data to fit to or to pack are asked for (`data.packed`, `data.documents`, `fit_routers`,
`--data`), a string alone is the name of a source (`modlab.data.sources`); in a list it is a text here too.
What could be meant the other way is refused, not guessed: as a text the name of a file that is there, as a
list of texts one of such names alone, as a source what has blanks or line breaks. Rows of a data set are
texts whatever they say.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from modlab.errors import ModlabError

PYTHON = ("python", "python-stdlib")  # sources of their own
LONGEST_NAME = 1024  # characters; longer texts are not looked for on the disk


def is_chat(item: Any) -> bool:
    """Whether this is a list of messages, {"role": ..., "content": ...}."""
    return (
        isinstance(item, (list, tuple))
        and bool(item)
        and all(isinstance(message, Mapping) and "role" in message for message in item)
    )


def is_text(data: Any) -> bool:
    """Whether data is text that a tokenizer has yet to read: a source of `data.packed`, texts, chats."""
    if isinstance(data, (str, os.PathLike)):
        return True
    if hasattr(data, "column_names"):
        return "input_ids" not in data.column_names
    if isinstance(data, (list, tuple)) and data:
        first = unwrapped(data[0])
        return isinstance(first, str) or is_chat(first)
    return False


def unwrapped(item: Any) -> Any:
    """The text or chat of a data set's row {"text": ...} or {"messages": ...}; anything else as it is."""
    if not isinstance(item, Mapping) or item.get("input_ids") is not None:
        return item
    given = {name: value for name, value in item.items() if value is not None}
    if len(given) == 1 and (name := next(iter(given))) in ("text", "messages"):
        return given[name]
    return item


def checked(text: Any, what: str = "the text") -> str:
    """The text, if it is one.

    Raises:
        ModlabError: no string, or one with a lone surrogate, which no tokenizer can read.
    """
    if not isinstance(text, str):
        decode = ": decode them first" if isinstance(text, (bytes, bytearray)) else ""
        raise ModlabError(f"{what} is of type {type(text).__name__}, not a string{decode}.")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ModlabError(
            f"{what} has half a surrogate pair, {ascii(text[error.start])}, at character {error.start}: that "
            "is no Unicode text. Read its file with the right encoding, or with errors='replace'."
        ) from None
    return text


def refuse_names(items: Any, what: str = "the text") -> None:
    """Raises ModlabError where a text, or each of a list of texts, is the name of a file or folder that is
    there."""
    texts = [items] if isinstance(items, str) else items
    if isinstance(texts, (list, tuple)) and texts and all(map(_names_a_file, texts)):
        raise ModlabError(
            f"{what} is {texts[0]!r}, the name of a file or folder: is its content meant? Read it, "
            "Path(name).read_text(), or give modlab.data.packed(name, tokenizer). A blank at the end makes "
            "it a text."
        )


def _names_a_file(text: Any) -> bool:
    """Whether a file has this name, or a folder where the text is written as a path."""
    if (
        not isinstance(text, str)
        or not 0 < len(text) < LONGEST_NAME
        or not text.isprintable()
        or not any(map(str.isalnum, text))
    ):
        return False
    name = os.path.expanduser(text)
    return os.path.isfile(name) or ("/" in text and os.path.isdir(name))


def text_of(item: Any, tokenizer: Any, what: str = "the text") -> tuple[str, bool]:
    """A text or chat as one string, and whether it holds its special tokens already."""
    item = unwrapped(item)
    if not is_chat(item):
        return checked(item, what), False
    if tokenizer is None:
        raise ModlabError(f"{what} is a chat, which needs the tokenizer and its chat template.")
    if not getattr(tokenizer, "chat_template", None):
        raise ModlabError(
            f"{what} is a chat, but this tokenizer ({type(tokenizer).__name__}) has no chat template: give "
            "the text, or set tokenizer.chat_template."
        )
    try:
        return checked(tokenizer.apply_chat_template(list(item), tokenize=False), what), True
    except ModlabError:
        raise
    except Exception as error:  # a template may raise anything for messages that it does not know
        raise ModlabError(f"{what}: the chat template refuses these messages ({error}).") from error


def token_ids(item: Any, tokenizer: Any, what: str = "the text") -> list[int]:
    """Token ids of a text or chat."""
    return tokenised(*text_of(item, tokenizer, what), tokenizer)[0]


def tokenised(
    text: str, rendered: bool, tokenizer: Any, offsets: bool = False
) -> tuple[list[int], list[int] | None]:
    """(token ids, where each ends in the text or None); a begin token that the text holds is not doubled."""
    settings: dict[str, Any] = {"add_special_tokens": False} if rendered else {}
    if offsets:
        settings["return_offsets_mapping"] = True
    # verbose=False: a text longer than the context is no mistake here
    encoded = tokenizer(text, truncation=False, verbose=False, **settings)
    ids = list(encoded["input_ids"])
    ends = [end for _, end in encoded["offset_mapping"]] if offsets else None
    bos = getattr(tokenizer, "bos_token_id", None)
    if not rendered and bos is not None and ids[:2] == [bos, bos] and text.startswith(tokenizer.bos_token):
        return ids[1:], ends[1:] if ends else None
    return ids, ends
