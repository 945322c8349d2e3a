"""What pictures say and draw of a token that a routed layer does not keep: only here is the skip asked."""

from __future__ import annotations

from typing import Any


def words(skip: str) -> dict[str, Any]:
    """Texts and facts about what a token skips; js/store.js has them as `store.words`.

    Returns:
        title: heads the heatmap. kept, left: name a cell that is kept, and one that is not, in a legend.
        past: the same of one token, "dropped". legend_kept, legend_left: the same for still pictures.
        runs: whether a token that is not kept runs the layer all the same.
        saves: whether it leaves no keys and values there once it is not recent.
    """
    if skip == "kv":
        return {
            "title": "Which layer keeps which token's keys and values",
            "kept": "kept",
            "left": "dropped",
            "past": "dropped",
            "legend_kept": "token kept",
            "legend_left": "dropped from the cache",
            "runs": True,
            "saves": True,
        }
    return {
        "title": "Which layer runs which token",
        "kept": "runs",
        "left": "skips",
        "past": "skipped",
        "legend_kept": "token runs",
        "legend_left": "token skips the layer",
        "runs": False,
        "saves": skip != "mlp",
    }
