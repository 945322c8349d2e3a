"""Reads a JSON file that anybody may have written: an object of limited size, or a ModlabError.

Light: neither torch nor transformers.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, NoReturn

from modlab.errors import ModlabError

LARGEST = 16 * 2**20
"""Bytes. Files of modlab's have kilobytes; parsing this much takes a fraction of a second."""


def read_object(
    file: str | os.PathLike[str], cure: str, largest: int = LARGEST, finite: bool = True
) -> dict[str, Any]:
    """The JSON object in `file`.

    Args:
        file: what to read.
        cure: what the user can do about a damaged file; ends the error's sentence.
        largest: bytes; a larger file is refused unread.
        finite: whether NaN and infinity, which Python writes and JSON does not know, are refused.

    Raises:
        ModlabError: the file is missing, too large, no JSON, no object, or has such numbers in it.
    """
    path = Path(file)
    try:
        size = path.stat().st_size
        if size > largest:
            raise ValueError(f"{size:,} bytes, where at most {largest:,} are expected")
        found = json.loads(path.read_text(encoding="utf-8"), parse_constant=_no_number if finite else float)
    except RecursionError:
        raise ModlabError(f"{str(path)!r} cannot be read (nested too deeply): {cure}.") from None
    except (OSError, ValueError) as error:  # of JSON and of UTF-8, too
        raise ModlabError(f"{str(path)!r} cannot be read ({_first_line(error)}): {cure}.") from error
    if not isinstance(found, dict):
        raise ModlabError(f"{str(path)!r} holds a {type(found).__name__} and no JSON object: {cure}.")
    return found


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON")


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
