"""The threshold at which K/V really is so many times smaller over the three texts together.

Set on other rows of these texts than those that are measured. What is allocated is more than what is stored
(an index, room to grow): how much is found by filling the product's cache.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.real_models.evaluate import MEASURED, older_share
from benchmarks.real_models.measured.product import Product, stored
from benchmarks.real_models.texts import COUNTED, Data
from modlab.errors import ModlabError

OVERHEAD = 1.05  # allocated over stored, to begin with
CLOSE = 0.02  # a ratio may be off by this share
ROUNDS = 5
SETTLE = 2  # passes until gates and threshold agree: what is dropped below changes the gates above


def held_rows(data: Data, rows: int) -> np.ndarray:
    """Rows of the three texts that are not measured, [3 * rows, T]."""
    return np.concatenate([data.texts[name][MEASURED : MEASURED + rows] for name in COUNTED])


def find(
    product: Product, data: Data, rows_each: int, asked: float, recent: int | None = None
) -> dict[str, Any]:
    """Threshold, and the ratio that it gives on the rows it was set on, so many of each text. What the
    type of stored keys and values saves is in that ratio: routing has to save the rest, if there is any.

    Args:
        recent: how many of the latest tokens stay anyway; by default what goes with the saving.

    Raises:
        ModlabError: the window alone takes more than that.
    """
    recent = product.recent_for(asked) if recent is None else recent
    routed = product.of_routing(asked)
    rows = torch.from_numpy(held_rows(data, rows_each).astype(np.int64)).to(product.device)
    T, overhead = rows.shape[1], OVERHEAD
    tried: list[dict[str, float]] = []
    p = _first_guess(product, routed)
    for _ in range(ROUNDS):
        share = min(older_share(routed * overhead, T, recent, product.first), 1.0)
        if share <= 0:
            raise ModlabError(
                f"{asked:g}x in rows of {T} tokens is less than the latest {recent} and the first "
                f"{product.first}: take longer rows or a smaller saving."
            )
        for _ in range(SETTLE):
            p = _keeping(product, rows, p, share, recent)
        with product.at(p, recent):
            *_, (_, cache, _) = product.pieces(rows)
        held = stored(cache)
        del cache
        ratio = held.dense_kv_bytes / held.kv_bytes
        tried.append(
            {"threshold": p, "ratio": ratio, "overhead": held.kv_bytes / held.dense_kv_bytes / held.keys}
        )
        if abs(ratio / asked - 1) <= CLOSE or (share == 1 and ratio > asked):
            break  # the latter: smaller than asked with all keys kept
        overhead *= asked / ratio
    best = min(tried, key=lambda one: abs(one["ratio"] / asked - 1))
    return {
        "asked": asked, "threshold": best["threshold"], "recent": recent, "ratio_set": best["ratio"],
        "tried": tried,
        "beyond_training": _beyond(product, routed, best["threshold"]),
    }  # fmt: skip


def _beyond(product: Product, routed: float, p: float) -> bool:
    """Whether the routers' training did not come so far: by the saving where they say to which it came, as
    the thresholds of such routers were set as these are; else by the threshold that the training left."""
    known = product.routing.trained
    if known is None or known.range is None:
        return False
    return routed > known.reached if known.reached else p > known.largest


def _first_guess(product: Product, routed: float) -> float:
    """What the routers know of the saving, as far as they know any."""
    known = product.routing.trained
    if known is None or known.range is None:
        return 0.5
    low, high = known.range
    return known.threshold_for(min(max(routed, low), high))


def _keeping(product: Product, rows: Tensor, p: float, share: float, recent: int) -> float:
    """The threshold that keeps this share of the keys that are neither first nor recent, gates as at `p`."""
    with product.at(p, recent):
        gates, _ = product.gates(rows)
    return keeping(gates, share, product.first, recent)


def keeping(gates: list[Tensor], share: float, first: int, recent: int) -> float:
    """The threshold that keeps this share of the keys that are neither first nor recent.

    Args:
        gates: of each layer, [B, T, G].
    """
    older = slice(first, gates[0].shape[1] - recent)
    values = torch.cat([gate[:, older].flatten() for gate in gates]).sort().values
    found = values[min(len(values) - 1, int(len(values) * (1 - share)))].item()
    return min(max(found, 1e-6), 1 - 1e-6)
