"""Recent tokens against gated ones at equal bytes: KL to the dense model, and recall, on one text.

A cache of so many bytes holds the latest `recent` tokens of every head and, of those before, what the gates
keep. This measures how close the model comes to its dense self when more of the same bytes go to the former,
and what that costs where a passage from further back comes again.

Shape letters: T tokens of a row, P tokens of a piece, D model dim.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.real_models import evaluate
from benchmarks.real_models.divergence import kl_and_agreement
from benchmarks.real_models.evaluate import asked, gaps, older_share
from benchmarks.real_models.measured.product import Product, stored
from benchmarks.real_models.measured.thresholds import OVERHEAD, keeping
from benchmarks.real_models.probes import recall
from modlab.errors import ModlabError


@dataclass(frozen=True)
class Point:
    """What a cache is asked to be.

    Attributes:
        saving: how many times smaller than the dense one.
        threshold: of all gates.
        recent: how many of the latest tokens stay anyway.
    """

    saving: float
    threshold: float
    recent: int


def shipped(product: Product, savings: list[float]) -> list[Point]:
    """The settings that the routers bring along.

    Raises:
        ModlabError: they know no thresholds by saving.
    """
    known = product.routing.trained
    if known is None:
        raise ModlabError(f"{product.name}: its routers know no thresholds. Give --recent to set some.")
    return [Point(s, known.threshold_for(s), product.recent_for(s)) for s in savings]


def at_equal_bytes(
    product: Product, ids_T: Tensor, savings: list[float], recents: list[int]
) -> Iterator[Point]:
    """Each number of recent tokens with the threshold that leaves the rest of the same bytes.

    One pass for the gates, at the routers' present threshold: what is dropped changes the gates above it
    little, and the ratio that came out is measured.

    Args:
        ids_T: a row on which thresholds are set.

    Raises:
        ModlabError: the recent tokens alone take more than a saving allows.
    """
    gates, _ = product.gates(ids_T[None])
    for saving in savings:
        for recent in recents:
            share = older_share(saving * OVERHEAD, len(ids_T), recent, product.first)
            if share <= 0:
                raise ModlabError(
                    f"{saving:g}x in rows of {len(ids_T)} tokens is less than the latest {recent} and the "
                    f"first {product.first}: take longer rows, a smaller saving or fewer recent tokens."
                )
            yield Point(saving, keeping(gates, share, product.first, recent), recent)


def dense_states(product: Product, ids_T: Tensor) -> Tensor:
    """Last states [T, D] with routing off."""
    with product.at(None):
        return product.states(ids_T[None])[0]


def measure(product: Product, ids_T: Tensor, dense_TD: Tensor, point: Point) -> dict[str, Any]:
    """KL to the dense model over positions from `evaluate.FAR` on, and the ratio of bytes at the row's end;
    by the product's cache in pieces."""
    states, cache = [], None
    with product.at(point.threshold, point.recent):
        for states_BPD, filled, _ in product.pieces(ids_T[None]):
            states.append(states_BPD[0])
            cache = filled
    held = stored(cache)
    kl_T, _ = kl_and_agreement(torch.cat(states), dense_TD, product.head_VD)
    return {
        **asdict(point), "tokens": len(ids_T), "kl": kl_T[evaluate.FAR :].mean().item(),
        "ratio": held.dense_kv_bytes / held.kv_bytes,
    }  # fmt: skip


def recall_gaps(
    product: Product, ids_T: Tensor, points: list[Point], distances: tuple[int, ...], each: int
) -> Iterator[dict[str, Any]]:
    """Loss on the second copy of a passage above the dense model's, by distance, so many passages each in one
    row; whole rows, without a cache."""
    probe = recall(ids_T[None].numpy(), distances, each)
    of = probe.spans[:, 3]
    rows = torch.from_numpy(probe.rows)
    dense_S = asked(product, probe, dense_states(product, rows[0])[None])[0]
    for point in points:
        with product.at(point.threshold, point.recent):
            routed_S = asked(product, probe, product.states(rows))[0]
        yield asdict(point) | {"tokens": len(ids_T), "passages": each} | gaps(routed_S, dense_S, of)


def rows_of(product: Product, texts: list[str], length: int) -> tuple[Tensor, Tensor]:
    """Two rows that follow each other: thresholds are set on the first, the second is measured.

    Raises:
        ModlabError: the texts are too short.
    """
    ids = np.asarray(product.ids("\n".join(texts)), dtype=np.int64)
    if len(ids) < 2 * length:
        raise ModlabError(f"the texts have {len(ids)} tokens, two rows of {length} were asked for.")
    first, second = torch.from_numpy(ids[: 2 * length]).view(2, length)
    return first, second


def run(
    product: Product,
    texts: list[str],
    length: int,
    savings: list[float],
    recents: list[int],
    distances: tuple[int, ...] = (),
    each: int = 8,
) -> Iterator[dict[str, Any]]:
    """The lines of the command, as they are known: KL at every point, then recall where distances are given.

    Args:
        recents: settings at equal bytes, thresholds set on the row before; none: as the routers ship.
    """
    set_on_T, ids_T = rows_of(product, texts, length)
    given = at_equal_bytes(product, set_on_T, savings, recents) if recents else shipped(product, savings)
    points, dense_TD = list(given), dense_states(product, ids_T)
    for point in points:
        yield measure(product, ids_T, dense_TD, point)
    if distances:
        yield from recall_gaps(product, ids_T, points, distances, each)
