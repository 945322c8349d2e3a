"""The piece of the text that each token stands for, with any tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from modlab.data.batches import batch_of, check_vocabulary
from modlab.data.texts import is_chat, refuse_names, text_of, tokenised, unwrapped
from modlab.errors import ModlabError

_REACH = 8  # characters that a tokenizer may have dropped between two that it kept
_PENDING = 8  # tokens that may wait for the end of their character; UTF-8 needs four at most


def encode(tokenizer: Any, item: Any) -> tuple[list[int], list[str]]:
    """Token ids of a text, chat or row of ids, and the piece of the text that each token stands for.

    Joined, the pieces are the text (of ids: what they decode to). What several tokens share (the bytes of one
    emoji) goes to the first of them; what none stands for (trimmed blanks) to the next one.

    Raises:
        ModlabError: an empty text, or something else than a text, a chat or one row of ids.
    """
    item = unwrapped(item)
    if tokenizer is None:
        raise ModlabError("The tokenizer is needed, also of token ids: it says what text each stands for.")
    if not isinstance(item, str) and not is_chat(item):
        ids = _row_of_ids(item)
        return ids, decoded_pieces(tokenizer, ids)
    refuse_names(item)
    text, rendered = text_of(item, tokenizer)
    if not text:
        raise ModlabError("The text is empty: give at least one character.")
    fast = bool(getattr(tokenizer, "is_fast", False))
    ids, ends = tokenised(text, rendered, tokenizer, offsets=fast)
    if not ids:
        raise ModlabError(f"The tokenizer turned {text[:60]!r} into no token at all. Give some other text.")
    if ends is None:
        return ids, _aligned(decoded_pieces(tokenizer, ids), ids, text, tokenizer)
    pieces, done = [], 0
    for end in ends:
        pieces.append(text[done : max(done, end)])
        done = max(done, end)
    pieces[-1] += text[done:]
    return ids, pieces


def as_text(tokenizer: Any, item: Any) -> str:
    """A text, chat or row of ids as the one string that a view shows and a reader may change."""
    item = unwrapped(item)
    refuse_names(item)
    if isinstance(item, str) or is_chat(item):
        return text_of(item, tokenizer)[0]
    return "".join(encode(tokenizer, item)[1])


def _row_of_ids(item: Any) -> list[int]:
    batch = batch_of(item, "the text")
    check_vocabulary(batch, None, "the text")
    if unused := sorted(set(batch) - {"input_ids", "attention_mask"}):
        raise ModlabError(f"{', '.join(unused)}: of one text only its input_ids are used. Leave it out.")
    if len(batch["input_ids"]) != 1:
        raise ModlabError(f"One row of token ids is needed, not a batch of {len(batch['input_ids'])}.")
    ids = batch["input_ids"][0]
    if "attention_mask" in batch:
        ids = ids[batch["attention_mask"][0].bool()]
    if not len(ids):
        raise ModlabError("There are no token ids: give at least one.")
    return [int(i) for i in ids]


def decoded_pieces(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """What each id adds to the decoded text, special tokens included.

    Tokens are decoded together with those before them, because blanks depend on the neighbour and a character
    may take several tokens; it goes to the first of these.
    """

    def decode(start: int, stop: int) -> str:
        text: str = tokenizer.decode(
            list(ids[start:stop]),
            skip_special_tokens=False,
            clean_up_tokenization_spaces=False,
            spaces_between_special_tokens=False,
        )
        return text

    pieces = [""] * len(ids)
    before, done = 0, 0  # tokens from `before` on are decoded as context, those up to `done` are told
    for stop in range(1, len(ids) + 1):
        told, text = decode(before, done), decode(before, stop)
        more = text[len(told) :]
        last = stop == len(ids) or stop - done >= _PENDING
        if (more and not more.endswith("\ufffd")) or last:
            pieces[done] = more
            before, done = done, stop
    return pieces


def _aligned(pieces: list[str], ids: Sequence[int], text: str, tokenizer: Any) -> list[str]:
    """The pieces of the text that decoded pieces stand for, where the tokenizer changed case or blanks.

    Each character of a decoded piece claims the next alike one of the text, if it is near; what nobody claims
    goes to the next token, at the end to the last.
    """
    if "".join(pieces) == text:
        return pieces
    special, like = set(getattr(tokenizer, "all_special_ids", ())), _comparable(text)
    cut, done = [], 0
    for index, piece in zip(ids, pieces, strict=True):
        end = done
        if index in special:
            end += len(piece) if text.startswith(piece, done) else 0
        else:
            for char in _comparable(piece):
                at = like.find(char, end, end + _REACH)
                end = at + 1 if at >= 0 else end
        cut.append(text[done:end])
        done = end
    cut[-1] += text[done:]
    return cut


def _comparable(text: str) -> str:
    """Lower case, character by character, so that places stay."""
    return "".join(low if len(low := char.lower()) == 1 else char for char in text)
