"""Locks by which a save that replaces a folder and a load that reads it wait for each other. Light.

They are the operating system's (`flock`): held by a process, gone with it, heeded by modlab alone. Where
there are none (Windows, some network file systems) nobody waits.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

PATIENCE = 10.0
"""Seconds to wait for a lock. A holder that takes longer (a load of gigabytes, or another program) is not
waited for: a load notices by itself that its folder was replaced."""


@contextlib.contextmanager
def locked(path: Path, shared: bool = False) -> Iterator[None]:
    """Inside this block no other process holds the lock on `path`, or with `shared` none that is not shared.

    Args:
        path: a file or folder; of a folder that is replaced while we wait, the newer one.
        shared: for readers.
    """
    end = time.monotonic() + PATIENCE
    lock = None
    while True:
        try:
            lock = try_lock(path, shared)
            if lock is None or _is_named(lock, path):
                break
            unlock(lock)
        except BlockingIOError:
            lock = None
            if time.monotonic() > end:
                break
            time.sleep(0.01)
        except OSError:  # not there any more, or not to be read: what is done there says so
            lock = None
            break
    try:
        yield
    finally:
        unlock(lock)


def try_lock(path: Path, shared: bool = False) -> int | None:
    """A descriptor that holds the lock until it is closed or the process ends; None where there are no locks.

    Raises:
        BlockingIOError: another process holds it.
        OSError: there is no such file or folder, or it may not be read.
    """
    if fcntl is None:
        return None
    opened = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(opened, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(opened)
        raise
    except OSError:
        os.close(opened)
        return None
    return opened


def unlock(lock: int | None) -> None:
    """Gives a lock of `try_lock` back."""
    if lock is not None:
        os.close(lock)


def _is_named(lock: int, path: Path) -> bool:
    """Whether what was locked still has that name."""
    held, named = os.fstat(lock), path.stat()
    return (held.st_dev, held.st_ino) == (named.st_dev, named.st_ino)
