"""Trained K/V routers as the start of an arm, at the saving that it aims at."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import modlab
from modlab.saving.demos import folder_named
from modlab.saving.description import read_description
from modlab.saving.files import CONFIG_FILE


def start(model: Any, source: str, saving: float) -> dict[str, Any]:
    """As `modlab.start_from`, with the threshold and the recent tokens that the routers know for `saving`;
    where they know none, those that they are saved with.

    Args:
        model: converted, not trained yet.
        source: a folder, or the name of routers that ship.

    Returns:
        from, tensors taken, `recent`, and `threshold` or None.
    """
    taken = modlab.start_from(model, source)
    folder = folder_named(source)
    known = read_description(Path(folder) / CONFIG_FILE, str(folder)).trained
    threshold = None
    if known is not None and known.savings:
        threshold = known.threshold_for(saving)
        modlab.set_threshold(model, threshold)
        if (recent := known.recent_for(saving)) is not None:
            modlab.set_keep_recent(model, recent)
    return {
        "from": Path(source).name, "tensors": len(taken), "threshold": threshold,
        "recent": model.mod.config.keep_recent,
    }  # fmt: skip
