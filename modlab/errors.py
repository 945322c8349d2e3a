"""The one exception type that modlab raises for mistakes a user can correct, and checks of plain numbers."""

import math
import operator
from numbers import Real
from typing import Any


class ModlabError(ValueError):
    """A setting, input or file is wrong; the message says which, with what value, and what to do."""


def check_count(name: str, value: Any, least: int = 1) -> int:
    """`value` as an int, or an error unless it is a whole number of at least `least`."""
    try:
        count = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        count = None
    if count is None or count < least:
        raise ModlabError(f"{name}={value!r:.80}: give a whole number of at least {least}.")
    return count


def check_number(name: str, value: Any) -> float:
    """`value` as a float, or an error unless it is a finite number."""
    if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
        raise ModlabError(f"{name}={value!r:.80}: give a number.")
    return float(value)
