"""Pieces of work that several processes share: each is claimed, run once, and left as a JSON file.

A piece that was done is never run again, one that failed is tried again by the next command, and one whose
process was killed is free again: so the same command, given again, goes on where it stopped.
"""

from __future__ import annotations

import json
import os
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

WAIT = 0.5
"""Seconds until a process that has nothing to do looks again."""


@dataclass(frozen=True)
class Piece:
    """Attributes:
    name: of its file.
    run: what it finds, JSON-ready.
    needs: pieces that have to be done before.
    """

    name: str
    run: Callable[[], dict[str, Any]]
    needs: tuple[str, ...] = ()


class Folder:
    """The files of a run.

    Args:
        path: made if it is not there.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        path.mkdir(parents=True, exist_ok=True)

    def file(self, name: str) -> Path:
        return self.path / f"{name}.json"

    def done(self, name: str) -> bool:
        return self.file(name).exists()

    def read(self, name: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.file(name).read_text(encoding="utf-8"))
        return found

    def write(self, name: str, found: dict[str, Any]) -> None:
        """Whole or not at all."""
        part = self.path / f".{name}.{os.getpid()}"
        part.write_text(json.dumps(found) + "\n", encoding="utf-8")
        part.replace(self.file(name))

    def failed(self, name: str, since: float) -> bool:
        """Whether it has failed since that time of day."""
        try:
            return bool(self.read(f"{name}.failed")["at"] >= since)
        except FileNotFoundError:
            return False

    def claim(self, name: str) -> bool:
        """Whether this process may run the piece: nobody else who is alive does."""
        path = self.path / f"{name}.claim"
        for _ in range(2):
            try:
                with path.open("x") as file:
                    file.write(str(os.getpid()))
                return True
            except FileExistsError:
                if _alive(path):
                    return False
                path.unlink(missing_ok=True)
        return False

    def release(self, name: str) -> None:
        (self.path / f"{name}.claim").unlink(missing_ok=True)


def _alive(claim: Path) -> bool:
    """Whether the process that wrote a claim still runs; one that is just being written counts as alive."""
    try:
        text = claim.read_text()
        if not text:
            return True
        os.kill(int(text), 0)
    except (FileNotFoundError, ProcessLookupError):
        return False
    except PermissionError:
        return True
    return True


def run_all(
    pieces: Sequence[Piece], folder: Folder, say: Callable[[str], None], deadline: float | None = None
) -> list[str]:
    """Runs what nobody has run, in the order given, until all is done or has failed.

    Args:
        deadline: on `time.monotonic`; no piece is begun after it.

    Returns:
        names of the pieces that failed, here or in a process at the same work.
    """
    since, failed = time.time(), set[str]()
    while deadline is None or time.monotonic() < deadline:
        failed = {piece.name for piece in pieces if folder.failed(piece.name, since)}
        left = [piece for piece in pieces if piece.name not in failed and not folder.done(piece.name)]
        possible = {piece.name for piece in left}
        while lost := [p for p in left if not all(n in possible or folder.done(n) for n in p.needs)]:
            left = [piece for piece in left if piece not in lost]
            possible -= {piece.name for piece in lost}
        if not left:
            break
        for piece in left:
            if all(map(folder.done, piece.needs)) and folder.claim(piece.name):
                _run(piece, folder, say)
                break
        else:
            time.sleep(WAIT)
    return sorted(failed)


def _run(piece: Piece, folder: Folder, say: Callable[[str], None]) -> None:
    """Runs a claimed piece; what goes wrong is noted, and the others go on."""
    begun = time.monotonic()
    folder.file(f"{piece.name}.failed").unlink(missing_ok=True)
    try:
        if not folder.done(piece.name):  # another may have finished it before it was claimed
            say(f"{piece.name} ...")
            folder.write(piece.name, {**piece.run(), "seconds": time.monotonic() - begun})
            say(f"{piece.name} done, {time.monotonic() - begun:.1f} s")
    except Exception as problem:
        what = "".join(traceback.format_exception(problem))
        folder.write(f"{piece.name}.failed", {"error": what, "at": time.time()})
        say(f"{piece.name} FAILED after {time.monotonic() - begun:.1f} s: {problem}")
    finally:
        folder.release(piece.name)
