"""What is known of a model's routers: on which weights and texts they were made, which threshold gives what.

    modlab.set_kv_saving(model, 4)  # thresholds for a cache a quarter of the dense one

Light: a description of files is read before torch is needed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from typing import Any

from modlab.errors import ModlabError, check_number
from modlab.routing.threshold import check_threshold

TEXTS = ("weights", "data", "method", "results")


@dataclass(frozen=True)
class Trained:
    """What is known of routers; saved and loaded with them.

    Attributes:
        savings: threshold p by KV saving (dense bytes over allocated ones), as calibrated over several texts
            together; one text may get more or less. On disk and in `Routing.trained` by what routing saves
            alone; where fewer bits save as well, `kv_saving.known_of` says them by what both save.
        seq_len: tokens of the texts in which that is so. Shorter ones save less, as the latest `keep_recent`
            tokens are always there; longer ones more.
        recent: `keep_recent` that goes with each saving; empty where all have the conversion's.
        tokens: that the routers were trained on.
        weights: the weights under the routers then, in words.
        data: the texts of the training, in words.
        method: how they were trained, in words.
        results: where the measured figures are.
        reached: the largest of the savings that the training itself came to. Thresholds of larger ones were
            set afterwards: they give the saving, but nothing has taught the routers what to keep there. 0:
            it came to all of them.
    """

    savings: dict[float, float] = field(default_factory=dict)
    seq_len: int = 0
    recent: dict[float, int] = field(default_factory=dict)
    tokens: int = 0
    weights: str = ""
    data: str = ""
    method: str = ""
    results: str = ""
    reached: float = 0.0

    @property
    def range(self) -> tuple[float, float] | None:
        """Smallest and largest KV saving with a known threshold."""
        return (min(self.savings), max(self.savings)) if self.savings else None

    def threshold_for(self, saving: float) -> float:
        """The threshold of a KV saving, between known ones by their logits over the saving's logarithm.

        Raises:
            ModlabError: none is known, or the saving lies outside their range.
        """
        check_number("kv_saving", saving)
        if self.range is None:
            raise ModlabError(
                "these routers know no thresholds by KV saving: modlab.calibrate(model, texts, "
                "keep_ratio=...) finds the threshold of a keep ratio."
            )
        low, high = self.range
        if not low <= saving <= high:
            raise ModlabError(
                f"kv_saving={saving:g}: these routers know thresholds for {low:.4g}x to {high:.4g}x, and "
                "move within that. modlab.calibrate(model, texts, keep_ratio=...) goes beyond all the same."
            )
        logits = {known: math.log(p / (1 - p)) for known, p in self.savings.items()}
        return 1 / (1 + math.exp(-_between(logits, saving)))

    def threshold_below(self, saving: float) -> float:
        """An estimate of the threshold of a saving between 1x, where it is 0, and the smallest known: as if
        gates' logits were spread as the logistic distribution is, which those of distilled routers nearly are
        (the threshold's logit then goes with the logarithm of saving - 1).

        Raises:
            ModlabError: the saving lies elsewhere, or none is known.
        """
        known = sorted(self.savings.items())
        if not known or not 1 <= saving < known[0][0]:
            raise ModlabError(f"kv_saving={saving:g} is not below those that are known ({self.range}).")
        if saving == 1:
            return 0.0
        points = [(math.log(s - 1), math.log(p / (1 - p))) for s, p in known[:2]]
        (x0, y0), (x1, y1) = points[0], points[-1]
        slope = (y1 - y0) / (x1 - x0) if len(points) == 2 else 1.0
        logit = y0 - slope * (x0 - math.log(saving - 1))
        return 1 / (1 + math.exp(min(-logit, 700.0)))

    def recent_for(self, saving: float) -> int | None:
        """`keep_recent` at a KV saving within their range, between known ones by logarithms; None where
        none is known."""
        if not self.recent:
            return None
        return round(math.exp(_between({known: math.log(n) for known, n in self.recent.items()}, saving)))

    @property
    def trained_to(self) -> float:
        """The largest KV saving trained for; infinite if none is known."""
        return self.reached or (self.range[1] if self.range else math.inf)

    @property
    def largest(self) -> float:
        """Threshold of the largest KV saving trained for; 1 if none is known, which no threshold exceeds."""
        return self.savings[self.trained_to] if self.range else 1.0

    @property
    def beyond(self) -> str:
        """What is to be said of every threshold above `largest`: the rest of a sentence that names it."""
        if self.range is None:
            return ""
        return (
            f"lies beyond {self.largest:.4g}, that of {self.trained_to:.4g}x, the largest KV saving "
            "that these routers were trained for: a threshold moves well below it, not beyond. Measure far "
            "recall (modlab.probes.recall_gap)."
        )

    def warning_for(self, p: float) -> str:
        """What is to be said of a threshold beyond that of the largest saving trained for; "" if nothing."""
        return f"threshold {p:.4g} {self.beyond}" if p > self.largest * (1 + 1e-6) else ""

    def counted(self, saving: Callable[[float], float]) -> Trained:
        """The same thresholds under other savings: `saving`, which rises, of each of them."""
        return replace(
            self,
            savings={saving(known): p for known, p in self.savings.items()},
            recent={saving(known): tokens for known, tokens in self.recent.items()},
            reached=saving(self.reached) if self.reached else 0.0,
        )

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dict; `from_dict` reads it back."""
        named = {
            name: {f"{saving:g}": value for saving, value in sorted(getattr(self, name).items())}
            for name in ("savings", "recent")
        }
        return asdict(self) | named | {"reached": float(f"{self.reached:g}")}  # as the savings are written

    @classmethod
    def from_dict(cls, values: Any) -> Trained:
        """What `to_dict` wrote.

        Raises:
            ModlabError: it is something else.
        """
        if not isinstance(values, dict) or (unknown := sorted(set(values) - set(cls.__dataclass_fields__))):
            what = f"has {unknown[0]!r}" if isinstance(values, dict) else f"is {values!r:.60}"
            raise ModlabError(f"what is said of the routers' training {what}, which cannot be read")
        for name in TEXTS:
            if not isinstance(values.get(name, ""), str):
                raise ModlabError(f"{name}={values[name]!r:.60} of the routers' training is no text")
        for name in ("seq_len", "tokens"):
            if type(values.get(name, 0)) is not int or values.get(name, 0) < 0:
                raise ModlabError(f"{name}={values[name]!r:.60} of the routers' training is no count")
        savings = _savings(values.get("savings", {}))
        if (reached := values.get("reached", 0.0)) not in (0.0, *savings) or isinstance(reached, bool):
            raise ModlabError(
                f"reached={reached!r:.60} of the routers' training is none of its savings "
                f"({', '.join(f'{saving:g}' for saving in savings)}), nor 0"
            )
        return cls(**{**values, "savings": savings, "recent": _recent(values.get("recent", {}), savings)})


def _between(known: Mapping[float, float], saving: float) -> float:
    """The value at a saving, linear in its logarithm between known ones."""
    points = sorted(known.items())
    if len(points) == 1:
        return points[0][1]
    (s0, v0), (s1, v1) = next(pair for pair in pairwise(points) if saving <= pair[1][0])
    share = math.log(saving / s0) / math.log(s1 / s0)
    return (1 - share) * v0 + share * v1


def _recent(found: Any, savings: dict[float, float]) -> dict[float, int]:
    if not isinstance(found, Mapping):
        raise ModlabError(f"recent={found!r:.60} of the routers' training are not tokens by saving")
    read = _by_saving(found)
    for saving, tokens in read.items():
        if type(tokens) is not int or tokens < 1:
            raise ModlabError(
                f"the routers' training gives {saving:g}x {tokens!r:.60} recent tokens: a count from 1 on"
            )
    if read and read.keys() != savings.keys():
        raise ModlabError(
            f"recent={found!r:.60} of the routers' training names other savings than their thresholds"
        )
    return read


def _savings(found: Any) -> dict[float, float]:
    if not isinstance(found, Mapping):
        raise ModlabError(f"savings={found!r:.60} of the routers' training are not thresholds by saving")
    read = {saving: check_threshold(p) for saving, p in _by_saving(found).items()}
    for saving, p in read.items():
        if not p:
            raise ModlabError(
                f"the routers' training gives {saving:g}x a threshold of 0, which saves nothing"
            )
    if any(later <= earlier for (_, earlier), (_, later) in pairwise(sorted(read.items()))):
        raise ModlabError(f"savings={found!r:.80} of the routers' training do not rise with their thresholds")
    return read


def _by_saving(found: Mapping[Any, Any]) -> dict[float, Any]:
    """The same with numbers for keys."""
    read = {}
    for saving, value in found.items():
        try:
            number = float(saving)
        except (TypeError, ValueError):
            number = math.nan
        if not 1 <= number < math.inf:
            raise ModlabError(f"the routers' training names a KV saving {saving!r:.60}: a number from 1 on")
        read[number] = value
    return read
