"""Reads a folder that may be saved to at the same time. Light."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from modlab.errors import ModlabError
from modlab.saving.files import ADAPTER_CONFIG, CONFIG_FILE, ROUTER_FILE
from modlab.saving.locks import locked

ATTEMPTS = 5
Read = TypeVar("Read")
State = list[tuple[int, int, int] | None]


def undisturbed(folder: Path, read: Callable[[], Read]) -> Read:
    """What `read` gives while no save replaces `folder`: savers wait, or else it is read again.

    Raises:
        ModlabError: of `read`; or the folder is saved to faster than it can be read.
    """
    if not folder.is_dir():
        return read()
    for _ in range(ATTEMPTS):
        with locked(folder, shared=True):
            before = _identity(folder)
            try:
                result = read()
            except ModlabError:
                if _identity(folder) == before:
                    raise
            else:
                if _identity(folder) == before:
                    return result
    raise ModlabError(f"{str(folder)!r} was replaced each time while it was read: load it again later.")


def _identity(folder: Path) -> State:
    """Another one after each save to `folder`. The folder itself counts: the new files pass through two, of
    which one is removed in the end."""
    found: State = []
    for name in ("", CONFIG_FILE, ROUTER_FILE, "config.json", ADAPTER_CONFIG):
        try:
            stat = (folder / name).stat()
            changed = (stat.st_mtime_ns, stat.st_size) if name else (0, 0)  # readers may write next to them
            found.append((stat.st_ino, *changed))
        except OSError:
            found.append(None)
    return found
