"""The arms of the study: which gates, made how."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from benchmarks.real_models.gates import GateForm


@dataclass(frozen=True)
class Arm:
    """Attributes:
    form: of the gates.
    score_rows: rows that the gates are first regressed on; 0 for fresh gates.
    plan: fields of `distil.Plan` other than its tokens; None for no distillation.
    """

    form: GateForm = GateForm()
    score_rows: int = 128
    plan: dict[str, Any] | None = field(default_factory=dict)


SPREAD = {"objective": "spread"}

ARMS: dict[str, Arm] = {
    "scores": Arm(plan=None),
    "scores-linear": Arm(form=GateForm(hidden=0), plan=None),
    "head": Arm(),
    "head-fresh": Arm(score_rows=0),
    "head-linear": Arm(form=GateForm(hidden=0)),
    "head-wide": Arm(form=GateForm(hidden=112)),
    "head-ahead": Arm(form=GateForm(ahead=16)),
    "head-fast": Arm(plan={"rate": 3e-3}),
    "head-mixed": Arm(plan={"objective": "mixed"}),
    "head-spread": Arm(plan=SPREAD),
    "head-spread-sharp": Arm(plan=SPREAD | {"gain": 4.0}),
    "head-spread-wide": Arm(form=GateForm(hidden=112), plan=SPREAD),
    "head-spread-ahead": Arm(form=GateForm(ahead=16), plan=SPREAD),
    "layer": Arm(form=GateForm(per_head=False)),
    "layer-spread": Arm(form=GateForm(per_head=False), plan=SPREAD),
}
