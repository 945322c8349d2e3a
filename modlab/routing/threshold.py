"""What a threshold may be. Light: the settings ask here, before torch is needed."""

from __future__ import annotations

import numbers

from modlab.errors import ModlabError


def check_threshold(p: float) -> float:
    """`p` (of Python or NumPy) as a float, or an error unless it lies in [0, 1): every gate reaches 0, and
    none reaches 1."""
    if isinstance(p, bool) or not isinstance(p, numbers.Real) or not 0 <= p < 1:
        raise ModlabError(
            f"threshold p={p!r}: it must be at least 0 and below 1 (0 keeps every token, 0.5 is the paper's; "
            "lower keeps more tokens)."
        )
    return float(p)
