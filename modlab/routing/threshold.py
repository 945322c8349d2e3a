"""What a threshold may be. Light: the settings ask here, before torch is needed."""

from __future__ import annotations

import numbers

from modlab.errors import ModlabError


def check_threshold(p: float) -> float:
    """`p` (of Python or NumPy) as a float, or an error unless it lies strictly between 0 and 1: a sigmoid
    never reaches either end."""
    if isinstance(p, bool) or not isinstance(p, numbers.Real) or not 0 < p < 1:
        raise ModlabError(
            f"threshold p={p!r}: it must lie strictly between 0 and 1 (0.5 is the paper's; lower keeps more "
            "tokens)."
        )
    return float(p)
