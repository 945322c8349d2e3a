"""What a router keeps, in a word: tokens of one kind, rare ones, everything, or nothing but recent ones.

A name is a reading of one text, not a finding about the model: the figures behind it come with it.

Shape letters: T tokens of the text, R rows of its trace, a row a gate.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from modlab.traces.routing_trace import RoutingTrace
from modlab.traces.token_classes import CLASSES, classify

ALL, NONE = 0.9, 0.02
"""Shares from which on, and up to which, a head is said to keep everything, or nothing."""
AGREES = 0.25
"""Least phi coefficient (the correlation of two yes-or-no's) between being kept and being of a kind."""
RARE = 2  # a token that the text has so many times at most is rare in it
SHOWN = 8  # tokens told of what is kept, and of what is dropped

PLURAL = {"newline": "line ends", "blank": "blanks", "punctuation": "punctuation", "other": "other signs"}
Mask = NDArray[np.bool_]


def kinds(tokens: list[str], ids: NDArray[np.int64]) -> dict[str, Mask]:
    """bool[T] for each kind of token that a head may be named after."""
    of_class = np.asarray(classify(tokens))
    found = {
        PLURAL.get(name, f"{name}s"): of_class == index
        for index, name in enumerate(CLASSES)
        if (of_class == index).any()
    }
    times = Counter(ids.tolist())
    found["rare tokens"] = np.asarray([times[i] <= RARE for i in ids.tolist()])
    found["line beginnings"] = np.asarray([False, *("\n" in token for token in tokens[:-1])])
    return found


def name_heads(trace: RoutingTrace) -> list[dict[str, Any]]:
    """For each of the R rows: layer, head (of its layer), name, says (a sentence with the figures behind the
    name), share (kept, first tokens left out), kinds ([{name, text, kept}]: share of the text, of what the
    head keeps), keeps and drops ([[token, times kept, times in the text]], the most frequent ones)."""
    after = slice(min(trace.keep_first, len(trace.tokens) - 1), None)
    of_kind = {name: mask[after] for name, mask in kinds(trace.tokens, trace.token_ids).items()}
    found = []
    for row, layer in enumerate(trace.layers):
        keep = trace.keep[row, after]
        name, says = _named(trace, row, keep, of_kind)
        found.append(
            {
                "layer": int(layer),
                "head": row - trace.layers.index(layer),
                "name": name,
                "says": says,
                "share": float(keep.mean()),
                "kinds": _shares(keep, of_kind),
                **_examples(trace.tokens[after], keep),
            }
        )
    return found


def names_in_words(heads: Sequence[Mapping[str, Any]]) -> list[str]:
    """A line a name, with the layers and heads that have it, those of most heads first."""
    several = any(head["head"] for head in heads)
    of: dict[str, list[str]] = {}
    for head in heads:
        where = f"{head['layer']}.{head['head']}" if several else str(head["layer"])
        of.setdefault(head["name"], []).append(where)
    what = "layer.KV head" if several else "layer"
    return [
        f"{name} ({len(places)}): {what} {', '.join(places)}"
        for name, places in sorted(of.items(), key=lambda item: -len(item[1]))
    ]


def _named(trace: RoutingTrace, row: int, keep: Mask, of_kind: dict[str, Mask]) -> tuple[str, str]:
    share = float(keep.mean())
    if share >= ALL:
        return "everything", f"It keeps {share:.0%} of the tokens."
    if share <= NONE:
        first = trace.gate[row, : trace.keep_first] >= trace.thresholds[row]
        latest = f", next to the latest {trace.keep_recent + 1}" if trace.keep_recent else ""
        if first.any():
            return "first tokens", f"It asks for first tokens and {share:.1%} of the others{latest}."
        name = "recent tokens" if trace.keep_recent else "next to nothing"
        return name, f"Its gate keeps {share:.1%} of the tokens{latest} and the first ones."
    best = max(of_kind, key=lambda name: phi(keep, of_kind[name]))
    if phi(keep, of_kind[best]) < AGREES:
        return "a mix", f"It keeps {share:.0%} of the tokens, of no kind that stands out."
    kept, text = _share(of_kind[best], keep), float(of_kind[best].mean())
    return best, f"{kept:.0%} of what it keeps are {best}, which are {text:.0%} of the text."


def phi(a: Mask, b: Mask) -> float:
    """The phi coefficient of two masks, -1..1; 0 where one of them is constant."""
    spread = float(a.std() * b.std())
    return float(((a & b).mean() - a.mean() * b.mean()) / spread) if spread else 0.0


def _share(mask: Mask, keep: Mask) -> float:
    return float(mask[keep].mean()) if keep.any() else 0.0


def _shares(keep: Mask, of_kind: dict[str, Mask]) -> list[dict[str, Any]]:
    rows = [(name, float(mask.mean()), _share(mask, keep)) for name, mask in of_kind.items()]
    rows.sort(key=lambda row: -row[2])
    return [dict(zip(("name", "text", "kept"), row, strict=True)) for row in rows]


def _examples(tokens: list[str], keep: Mask) -> dict[str, list[Any]]:
    times = Counter(tokens)
    kept = Counter(token for token, stays in zip(tokens, keep.tolist(), strict=True) if stays)
    dropped = times - kept
    return {
        name: [[token, kept[token], times[token]] for token, _ in counts.most_common(SHOWN)]
        for name, counts in (("keeps", kept), ("drops", dropped))
    }
