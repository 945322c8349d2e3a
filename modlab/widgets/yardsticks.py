"""What a text's figures are compared with, and the figures that a mean loss hides: far recall, and time.

Shape letters: T tokens of the text.
"""

from __future__ import annotations

import contextlib
import statistics
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from modlab.data.pieces import encode
from modlab.hf.model import context_length, device_of
from modlab.widgets.jobs import Job

PASSAGE = 64  # tokens that come a second time
NEW_TOKENS, RUNS = 32, 3  # of a measurement of time


@dataclass(frozen=True)
class Yardstick:
    """What a model with everything kept, or a dense one, makes of a text.

    Attributes:
        loss_T: float64[T - 1], nats of each predicted token.
        recall_P: float64, nats of each scored token of the passages that come again; empty if not measured.
    """

    loss_T: NDArray[np.float64]
    recall_P: NDArray[np.float64]

    @property
    def loss(self) -> float:
        """Mean over the text, NaN for a text of one token."""
        return mean(self.loss_T)

    @property
    def recall(self) -> float:
        """Mean over the passages, NaN if not measured."""
        return mean(self.recall_P)


def token_losses(model: Any, tokenizer: Any, text: str) -> NDArray[np.float64]:
    """float64[T - 1]: nats of each token of the text but its first."""
    from modlab.probes.scoring import score

    ids = encode(tokenizer, text)[0]
    if len(ids) < 2:
        return np.empty(0)
    scores = score(model, [torch.tensor(ids)], range(1, len(ids)), batch_size=1)
    return scores.loss[0].double().numpy()


def far_recall(model: Any, tokenizer: Any, text: str) -> NDArray[np.float64]:
    """Nats of each token of two passages of the text that come again after its end; empty for a short text.

    What a mean loss, made mostly of near text, hardly shows: a model that still has the first copy in its
    cache predicts the second one easily (see `modlab.probes.recall`, which measures it over many texts).
    """
    from modlab.probes.scoring import score

    ids = encode(tokenizer, text)[0][: (context_length(model) or 1 << 30) - 2 * PASSAGE]
    if len(ids) < 4 * PASSAGE:
        return np.empty(0)
    row, columns = list(ids), list[int]()
    for start in (8, len(ids) // 2 - PASSAGE):
        columns += range(len(row) + 1, len(row) + PASSAGE)  # not its first: nothing says that a copy begins
        row += ids[start : start + PASSAGE]
    return score(model, [torch.tensor(row)], columns, batch_size=1).loss[0].double().numpy()


def mean(values: NDArray[np.float64]) -> float:
    """NaN of nothing, without a warning."""
    return float(values.mean()) if len(values) else float("nan")


def stderr(values: NDArray[np.float64], base: NDArray[np.float64]) -> float | None:
    """Standard error of the mean difference of two losses, token by token; None where nothing pairs."""
    if len(values) != len(base) or len(values) < 2:
        return None
    return float((values - base).std(ddof=1) / len(values) ** 0.5)


def times(model: Any, dense: Any, ids: list[int], job: Job | None) -> dict[str, dict[str, float]]:
    """Milliseconds to the first token and for each further one of `generate`, both sides: medians of RUNS.

    Both take turns, so that a machine that slows down slows them both.

    Args:
        model: a converted model.
        dense: what it is compared with; None: itself with routing off.
        ids: the prompt.
    """
    from modlab.measure.timing import time_generate
    from modlab.routing.state import routing_off

    sides = {"routed": model, "dense": model if dense is None else dense}
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
    count = (RUNS + 1) * len(sides)
    for turn in range(RUNS + 1):
        for index, (name, which) in enumerate(sides.items()):
            if job is not None:
                done = (turn * len(sides) + index) / count
                job.report(f"Timing the {name} model, run {turn + 1} of {RUNS + 1}", done)
            prompt, itself = torch.tensor([ids], device=device_of(which)), name == "dense" and dense is None
            with routing_off(model) if itself else contextlib.nullcontext():
                found[name].append(time_generate(which, prompt, NEW_TOKENS))
    return {
        name: {
            "first_ms": statistics.median(first for first, _ in runs[1:]),  # the first run warms up
            "next_ms": statistics.median(after for _, after in runs[1:]),
        }
        for name, runs in found.items()
    }
