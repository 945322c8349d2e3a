"""Warnings that point at the user's own line: what is worth a word may come up deep within a call."""

from __future__ import annotations

import sys
import warnings
from types import FrameType

BETWEEN = {"modlab", "torch", "transformers", "accelerate", "peft", "trl", "contextlib", "functools"}
"""Packages whose lines lie between a user's call and a warning."""


class ModlabWarning(UserWarning):
    """Something goes on, but not quite as asked for; the message says what, and what to do."""


def warn(message: str) -> None:
    """Warns at the nearest line outside `BETWEEN`, or at the outermost one, as in a command."""
    frame = sys._getframe(1)
    while frame.f_back is not None and _module(frame).partition(".")[0] in BETWEEN:
        frame = frame.f_back
    told = frame.f_globals.setdefault("__warningregistry__", {})
    at = frame.f_code.co_filename, frame.f_lineno, _module(frame)
    warnings.warn_explicit(message, ModlabWarning, *at, registry=told)


def _module(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__"))
