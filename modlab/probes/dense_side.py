"""What the rows of a known dense side were made of: other text or settings would pass for the same rows."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from modlab.errors import ModlabError

if TYPE_CHECKING:
    import pandas as pd
    from torch import Tensor

MADE_OF = "made_of"
"""The entry of `frame.attrs`."""

NO_MATTER = {"accelerator", "batch_size", "by_row", "progress"}
"""Settings of a probe that no row depends on."""


def digest_of(stream_M: Tensor, settings: Mapping[str, Any]) -> str:
    """Of the material, long [M], and of the settings that decide what the rows are. Several values of a
    setting count as a set: probes take them in an order of their own."""
    digest = hashlib.sha256(stream_M.cpu().contiguous().numpy().tobytes())
    for name in sorted(settings.keys() - NO_MATTER):
        digest.update(f"\0{name}={_plain(settings[name])}".encode())
    return digest.hexdigest()


def _plain(value: Any) -> str:
    """The same for 5 and NumPy's 5, for a list and a tuple."""
    several = isinstance(value, Iterable) and not isinstance(value, str)
    return " ".join(sorted({str(item) for item in value})) if several else str(value)


def sign(table: pd.DataFrame, digest: str) -> None:
    """Notes in a table of all rows what they are made of."""
    table.attrs[MADE_OF] = f"{digest} {len(table)}"


def check_dense(dense: pd.DataFrame, digest: str, keys: list[str], column: str, maker: str) -> None:
    """Whether `dense` has the dense side of the rows that are to be measured.

    Args:
        digest: of these rows.
        keys: columns that name a row.
        column: the dense figures.
        maker: what makes such a table, for the message.

    Raises:
        ModlabError: it is of other material or settings, or rows of it are missing or doubled.
    """
    known = getattr(dense, "attrs", {}).get(MADE_OF)
    if known is None or not {*keys, column} <= set(dense):
        raise ModlabError(
            f"dense is no table that says what its rows were made of: take what {maker} returns."
        )
    if known.split()[0] != digest:
        raise ModlabError(
            "the dense side is of other material or settings: make it with the same text, tokenizer and "
            f"arguments (seed and sizes too), by {maker}."
        )
    if known != f"{digest} {len(dense)}" or dense.duplicated(keys).any():
        raise ModlabError(
            f"the dense side has {len(dense)} rows, of which some are doubled or some are missing: take the "
            f"whole table that {maker} returned."
        )
