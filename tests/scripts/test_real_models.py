"""docs/quality.md on real models: the verdicts follow from the records."""

from __future__ import annotations

from scripts.pages import real_models
from scripts.pages.blocks import ROOT


def records(gap: float, kl: float) -> dict:
    def rows(run: str) -> list[dict]:
        return [
            {
                "run": run,
                "arm": "head",
                "ratio_asked": ratio,
                "recall_gap": {"256": gap * ratio},
                "kl_far": kl * ratio,
            }
            for ratio in (2.0, 4.0)
        ]

    return {model: {"rows": rows(run)} for model, run in real_models.SHIPPED.items()}


def test_the_highest_ratio_is_the_one_that_every_model_reaches() -> None:
    assert real_models.highest(records(0.004, 0.004), 0.02, 0.02) == 4
    assert real_models.highest(records(0.009, 0.004), 0.02, 0.02) == 2
    assert real_models.highest(records(0.004, 0.02), 0.02, 0.02) is None
    one_worse = records(0.004, 0.004)
    one_worse["coder-1.5b"]["rows"][1]["recall_gap"]["256"] = 1.0
    assert real_models.highest(one_worse, 0.05, None) == 2


def test_the_page_shows_every_model_and_control() -> None:
    said = real_models.block(ROOT)
    for model in real_models.SHIPPED:
        assert said.count(f"| {model} | ") >= 4
    for control in ("**gates**", "window alone", "chance per head", "whole heads"):
        assert said.count(f"| {control} | ") == 2
    assert "Recipe `default`" in said and "none has it" in said and "2x is the highest" in said
