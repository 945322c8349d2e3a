"""Writes a folder all or nothing, also if the process is killed in between.

    1. The new files are written into a hidden folder next to the target, and everything else that lies in the
       target is linked into it: the folder to be.
    2. The two change places in one step. From here on the new folder is there, whole.
    3. The old folder, now out of the way, gets the new files too, and the two change places again: the target
       is the same directory as before (for a shell that stands in it, a mount, a program that watches it).
    4. The hidden folder is removed. One that a killed process left behind is removed by the next save.

Where folders cannot be exchanged (network file systems, Windows, a parent folder without write access) files
are replaced one by one. A kill in between leaves a mixture there, which `modlab.load` refuses by the
hashes in modlab_config.json.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

from modlab.errors import ModlabError
from modlab.saving.exchange import exchange
from modlab.saving.locks import locked, try_lock, unlock

HIDDEN = ".modlab-saving-"
LOCK = ".lock"
DAY = 24 * 3600  # seconds


@contextlib.contextmanager
def atomic_directory(path: str | os.PathLike[str], replaces: tuple[str, ...] = ()) -> Iterator[Path]:
    """Yields a temporary folder; its files move into `path` only once the block has ended well.

    A full disk, an error, Ctrl-C or a kill inside the block leaves `path` as it was. Other files in `path`
    stay.

    Args:
        path: the folder to fill; made if absent. A symbolic link means the folder that it points to.
        replaces: glob patterns of old files in `path` that go when the new ones are in place (shards of
            another count).

    Raises:
        ModlabError: `path` is a file, or could not be written; the message says whether it is as it was.
    """
    if not os.fspath(path):
        raise ModlabError("the name of the folder to save to is empty: give one ('.' is the current folder).")
    target = Path(os.path.realpath(path))  # of "..", too, which has no name of its own
    if target.exists() and not target.is_dir():
        raise ModlabError(f"{str(path)!r} is a file: give the name of a folder to save to.")
    if target.exists() and not os.access(target, os.W_OK):
        raise ModlabError(f"the folder {str(path)!r} is write-protected: choose another, or lift that.")
    begun = False
    try:
        with _hidden_folder(target) as hidden:
            temporary = hidden / (target.name or "root")  # model cards are headed by their folder's name
            temporary.mkdir()
            yield temporary
            new = {p.relative_to(temporary) for p in temporary.rglob("*") if not p.is_dir()}
            stale = {p.relative_to(target) for pattern in replaces for p in target.glob(pattern)} - new
            if not target.exists():
                temporary.rename(target)
                return
            with locked(target), locked(temporary):  # which is `target`, too, for a while
                if not _replace_whole(temporary, target, new, stale):
                    begun = True
                    _replace_one_by_one(temporary, target, new, stale)
    except (OSError, SafetensorError) as error:
        state = (
            "and the folder may hold new and old files: save to it again once the cause is gone"
            if begun
            else "the folder is as it was. Free some space or choose another"
        )
        raise ModlabError(f"saving to {str(path)!r} failed ({error}); {state}.") from error


@contextlib.contextmanager
def _hidden_folder(target: Path) -> Iterator[Path]:
    """A new folder next to `target`, or inside it where the parent may not be written to; removed in the end,
    with those that killed processes have left."""
    home = target.parent
    if target.is_dir() and (target == home or not _same_disk(target, home) or not os.access(home, os.W_OK)):
        home = target
    home.mkdir(parents=True, exist_ok=True)
    prefix = HIDDEN + hashlib.sha256(os.fsencode(target.name)).hexdigest()[:8] + "-"
    with locked(home):
        for leftover in [*home.glob(prefix + "*"), *target.glob(prefix + "*")]:
            _remove_leftover(leftover)
        hidden = Path(tempfile.mkdtemp(prefix=prefix, dir=home))
        (hidden / LOCK).touch()
        lock = try_lock(hidden / LOCK)
    try:
        yield hidden
    finally:
        shutil.rmtree(hidden, ignore_errors=True)
        unlock(lock)


def _same_disk(one: Path, other: Path) -> bool:
    return one.stat().st_dev == other.stat().st_dev


def _replace_whole(temporary: Path, target: Path, new: set[Path], stale: set[Path]) -> bool:
    """Steps 1 to 3 of the module; False if the file system cannot do that, and `target` is as it was."""
    if target in temporary.parents:
        return False
    try:
        _link_rest(target, temporary, without=new | stale)
        shutil.copystat(target, temporary)
        exchange(temporary, target)
        with contextlib.suppress(OSError):  # the new folder then stays where it is, whole
            _take_over(temporary, target, new, stale)
            exchange(temporary, target)
    except OSError:
        return False
    return True


def _link_rest(source: Path, into: Path, without: set[Path], at: Path = Path()) -> None:
    """Links everything below `source / at` into `into`, but for the paths in `without`."""
    for entry in os.scandir(source / at):
        path = at / entry.name
        if entry.is_dir(follow_symlinks=False):
            (into / path).mkdir(exist_ok=True)
            _link_rest(source, into, without, path)
            shutil.copystat(entry, into / path)
        elif path not in without:
            os.link(entry, into / path, follow_symlinks=False)


def _take_over(old: Path, source: Path, new: set[Path], stale: set[Path]) -> None:
    """Makes the folder `old`, which nobody looks at now, what `source` is."""
    for file in new:
        (old / file).parent.mkdir(parents=True, exist_ok=True)
        (old / file).unlink(missing_ok=True)
        os.link(source / file, old / file)
    for file in stale:
        (old / file).unlink()


def _replace_one_by_one(temporary: Path, target: Path, new: set[Path], stale: set[Path]) -> None:
    for file in sorted(new):
        (target / file).parent.mkdir(parents=True, exist_ok=True)
        os.replace(temporary / file, target / file)
    for file in stale:
        (target / file).unlink()


def _remove_leftover(hidden: Path) -> None:
    """Removes a hidden folder whose process is gone: its lock is free, or where there are none a day old."""
    try:
        lock = try_lock(hidden / LOCK)
    except BlockingIOError:
        return
    except OSError:  # it was killed before it had a lock
        lock = None
    if lock is not None or not (hidden / LOCK).exists() or time.time() - hidden.stat().st_mtime > DAY:
        shutil.rmtree(hidden, ignore_errors=True)
    unlock(lock)
