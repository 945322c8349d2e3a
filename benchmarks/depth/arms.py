"""The arms of the study: what is skipped, how it is trained."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from modlab.errors import ModlabError

Trains = Literal["none", "added", "lora", "all"]
Pull = Literal["none", "target", "load", "topk"]
Removes = Literal["", "layer", "attention"]


@dataclass(frozen=True)
class Arm:
    """One arm.

    Attributes:
        mod: fields of `MoDConfig`; none for static removal.
        trains: nothing, what conversion added alone (by `modlab.train`), LoRA on the base too, or all
            weights.
        published: whether it learns as its paper says, from the text (the loss of the next token) by
            `modlab.train`, instead of from the dense self.
        pull: the term next to the loss: none where the position decides, a two-sided pull to `compute`, the
            paper's load, top-k's.
        compute: share of the layers' operations that is aimed at, where something pulls.
        ratio: how many times fewer keys and values are to be stored, with "kv+prompt".
        int8: whether those that are stored have eight bits a number where the arm is measured, which makes
            the cache smaller once more.
        alpha: weight of the paper's load term.
        scored: whether gates start from the relative size of the update (`scores.py`).
        started: whether routers start from those of K/V routing, and begin at the ratio aimed at.
        fitted: whether projections start from the closed form (`modlab.fit_projections`).
        above: whether only what is above the point of leaving trains.
        removes: what static removal takes out: whole layers, or attentions.
        rate: learning rate of what conversion added; trained projections have the plan's.
        base_rate: learning rate of the base's weights, where they train.
    """

    mod: dict[str, Any] = field(default_factory=dict)
    trains: Trains = "added"
    published: bool = False
    pull: Pull = "none"
    compute: float = 1.0
    ratio: float = 1.0
    int8: bool = False
    alpha: float = 0.01
    scored: bool = False
    started: bool = False
    fitted: bool = False
    above: bool = False
    removes: Removes = ""
    rate: float = 2e-4
    base_rate: float = 3e-5


def _leave(after: float, rank: int = 0, **fields: Any) -> Arm:
    mod = {"skip": "prompt", "leave_after": after} | ({"leave_rank": rank} if rank else {})
    return Arm(mod, **fields)


def _routed(skip: str, compute: float, scored: bool, trains: Trains) -> Arm:
    mod = {"skip": skip, "layers": "inner", "router_hidden": 16}
    return Arm(mod, trains, pull="target", compute=compute, scored=scored, rate=2e-3)


def _both(after: float, ratio: float, **fields: Any) -> Arm:
    mod = {
        "skip": "kv+prompt",
        "layers": "all",
        "gates": "kv_head",
        "router_hidden": 16,
        "leave_after": after,
    }
    return Arm(mod, pull="target", ratio=ratio, **{"rate": 1e-2, **fields})


TRAINED: dict[str, tuple[bool, Trains]] = {
    "": (False, "added"),
    "-all": (False, "all"),
    "-scored": (True, "added"),
    "-scored-lora": (True, "lora"),
    "-scored-all": (True, "all"),
    "-scored-free": (True, "none"),
}
"""Whether gates start from scores, and what trains."""


REMOVED: tuple[Removes, ...] = ("layer", "attention")
HEALED: dict[str, Trains] = {"": "all", "-lora": "lora", "-free": "none"}

AFTER = {"1/2": 1 / 2, "2/3": 2 / 3, "3/4": 3 / 4}
"""Shares of the layers after which prompt tokens leave."""

PROJECTION_RATE = 2e-4
"""Learning rate of trained projections, where a run says nothing else."""

ARMS: dict[str, Arm] = {
    "leave-1/2": _leave(1 / 2),
    "leave-2/3": _leave(2 / 3),
    "leave-3/4": _leave(3 / 4),
    "kv+leave-2/3-4x": _both(2 / 3, 4.0),
    "kv+leave-1/2-4x": _both(1 / 2, 4.0),
    **{
        f"kv+leave-{name}-4x-started{more}": _both(
            after, 4.0, started=True, fitted=True, rate=2e-3, above=more == "-above",
            trains="none" if more == "-free" else "added",
        )
        for name, after in AFTER.items()
        for more in ("", "-above", "-free")
    },
    **{
        f"kv+leave-{name}-2x-int8-started-{more}": _both(
            after, 2.0, int8=True, started=True, fitted=True, rate=2e-3, above=more == "above",
            trains="none" if more == "free" else "added",
        )
        for name, after in AFTER.items()
        for more in ("above", "free")
    },
    **{
        f"leave-{name}-fitted{more}": _leave(after, fitted=True, trains="none" if more else "added")
        for name, after in AFTER.items()
        for more in ("", "-free")
    },
    **{f"leave-2/3-rank-{rank}": _leave(2 / 3, rank) for rank in (16, 64)},
    **{f"leave-2/3-rank-{rank}-fitted": _leave(2 / 3, rank, fitted=True) for rank in (16, 64)},
    **{
        f"{skip}-{compute:g}{name}": _routed(skip, compute, scored, trains)
        for compute in (0.9, 0.8)
        for skip in ("written", "sublayers", "mlp")
        for name, (scored, trains) in TRAINED.items()
    },
    **{
        f"paper-alpha-{alpha:g}": Arm(
            {"skip": "layer", "layers": "alternate", "gate": "paper", "init_gate": 0.5, "keep_first": 1},
            trains="all", published=True, pull="load", alpha=alpha, rate=3e-4, base_rate=3e-4,
        )
        for alpha in (0.003, 0.01, 0.03, 0.1)
    },
    "topk": Arm(
        {"skip": "layer", "layers": "alternate", "operator": "topk", "gate": "fused"},
        trains="all", published=True, pull="topk", rate=3e-4, base_rate=3e-4,
    ),
    **{
        f"static-{what}-{compute:g}{name}": Arm(removes=what, compute=compute, trains=trains)
        for what in REMOVED
        for compute in (0.9, 0.8)
        for name, trains in HEALED.items()
    },
}  # fmt: skip


def arm_named(name: str) -> Arm:
    """The arm of that name.

    Raises:
        ModlabError: there is none.
    """
    if name not in ARMS:
        raise ModlabError(f"no arm is called {name!r}; there are {', '.join(ARMS)}.")
    return ARMS[name]
