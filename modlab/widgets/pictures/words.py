"""What pictures say and draw of a token that a routed layer does not keep."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from modlab.skips import named


def words(skip: str) -> dict[str, Any]:
    """Texts and facts about what a token skips; js/store.js has them as `store.words`.

    Returns:
        the fields of `skips.base.Words`, and runs: whether a token that is not kept runs the layer all the
        same; saves: whether it leaves no keys and values there once it is not recent; gate: what one of
        several gates of a layer stands for.
    """
    chosen = named(skip)
    more = {
        "runs": chosen.runs_all,
        "saves": not chosen.stores_all,
        "gate": "KV head" if chosen.by_head else "gate",
    }
    return {**asdict(chosen.words), **more}
