"""Two folders change places in one step of the file system. Light.

Linux and macOS can do that (`renameat2`, `renamex_np`), most local file systems with them; Python has no name
for it. Where it cannot be done `exchange` raises OSError and nothing has changed.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = -100  # AT_FDCWD
SWAP = 2  # RENAME_EXCHANGE of Linux and RENAME_SWAP of macOS


def exchange(one: Path, other: Path) -> None:
    """`one` and `other` change names; at every moment each name has one of the two.

    Raises:
        OSError: the operating system or the file system cannot do that, or may not.
    """
    failed = _system_call()(os.fsencode(one), os.fsencode(other))
    if failed:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), str(one), None, str(other))


@functools.cache
def _system_call() -> Callable[[bytes, bytes], int]:
    library: Any = ctypes.CDLL(None, use_errno=True) if sys.platform in ("linux", "darwin") else None
    if sys.platform == "linux" and hasattr(library, "renameat2"):
        return lambda one, other: int(library.renameat2(HERE, one, HERE, other, SWAP))
    if sys.platform == "darwin" and hasattr(library, "renamex_np"):
        return lambda one, other: int(library.renamex_np(one, other, SWAP))
    raise OSError(errno.ENOSYS, "this system cannot exchange two folders")
