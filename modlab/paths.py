"""Whether a name that a user gives is that of a file or folder here."""

from __future__ import annotations

import errno
import os

from modlab.errors import ModlabError

NOT_HERE = (errno.ENOENT, errno.ENOTDIR, errno.EBADF, errno.ELOOP)


def exists(path: str | os.PathLike[str], refusal: str) -> bool:
    """Whether something lies there. `Path.exists` is not asked: from Python 3.14 on it is also False for what
    the system refuses to look at, such as a text that was given for a name.

    Args:
        refusal: what to say then, with ``{}`` for the beginning of the name and ``{}`` for the reason.

    Raises:
        ModlabError: the system cannot have such a name, or does not let us look.
    """
    try:
        os.stat(path)
    except ValueError:  # a null character: no name at all
        return False
    except OSError as error:
        if error.errno in NOT_HERE:
            return False
        raise ModlabError(refusal.format(os.fspath(path)[:60], error.strerror)) from error
    return True
