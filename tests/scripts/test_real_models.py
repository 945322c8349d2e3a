"""docs/quality.md on real models: the verdicts follow from the records."""

from __future__ import annotations

import pytest

from modlab.recipes import RECIPES
from scripts.pages import measured, real_models
from scripts.pages.blocks import ROOT


def record(model: str, gap: float, kl: float, arm: str = "distil", savings: tuple = (2.0, 4.0)) -> dict:
    """A measurement in which figures grow with the saving."""
    rows = [
        {"arm": name, "ratio_asked": s, "recall_gap": {"256": 0.0, "1024": gap * s}, "kl_far": kl * s}
        for s in (1.0, *savings)
        for name in (arm, f"{arm}: chance")
    ]
    return {"model": model, "arm": arm, "date": "2026-11-30", "rows": rows}


def best(gap: float, kl: float, *more: dict) -> real_models.Best:
    return real_models.best_rows([*(record(model, gap, kl) for model in real_models.SHIPPED), *more])


def test_the_highest_saving_is_the_one_that_every_model_reaches() -> None:
    assert real_models.highest(best(0.004, 0.004), 0.02, 0.02) == 4
    assert real_models.highest(best(0.009, 0.004), 0.02, 0.02) == 2
    assert real_models.highest(best(0.004, 0.02), 0.02, 0.02) is None
    assert real_models.highest(best(0.004, 0.02), 0.02, None) == 4
    worse = best(0.004, 0.004)
    worse["coder-1.5b"][4.0]["recall_gap"]["256"] = 1.0
    assert real_models.highest(worse, 0.05, None) == 2


def test_routers_that_do_not_ship_count_where_those_that_do_were_not_measured() -> None:
    other = record("coder-0.5b", 1.0, 1.0, f"distil{measured.VARIES}far", savings=(3.0, 4.0))
    found = best(0.004, 0.004, other)
    assert real_models.highest(found, 0.02, 0.02) == 4, "4x is that of routers that ship"
    assert real_models.common_savings(found) == [2, 4], "3x was measured on one model alone"
    assert not found["coder-0.5b"][3.0]["ships"] and found["coder-0.5b"][4.0]["ships"]


@pytest.mark.parametrize("name", real_models.LIMITS)
def test_recipes_aim_at_the_highest_saving_that_the_records_allow(name: str) -> None:
    found = real_models.highest(real_models.best_rows(measured.records(ROOT)), *real_models.LIMITS[name])
    assert RECIPES[name].kv_saving == found
    assert f"{found:g}x is the highest that has it. It aims at {found:g}x." in real_models.recipes(ROOT)


def test_what_summaries_say_is_in_the_records() -> None:
    rows = real_models.best_rows(measured.records(ROOT))
    for saving, name, kl, gap in ((2.0, "default", 0.0021, 0.018), (4.0, "distil", 0.016, 0.039)):
        worst = [max(rows[model][saving]["recall_gap"].values()) for model in real_models.SHIPPED]
        assert max(worst) <= gap + 0.0005 and f"{gap}" in RECIPES[name].summary
        assert max(rows[model][saving]["kl_far"] for model in real_models.SHIPPED) <= kl + 0.0005
        assert f"{kl}" in RECIPES[name].summary


def test_the_page_shows_every_model_and_control() -> None:
    said = real_models.block(ROOT)
    for model in real_models.SHIPPED:
        assert said.count(f"| {model} | ") >= 4
    for control in ("**gates**", "window alone", "chance per head", "whole heads"):
        assert said.count(f"| {control} | ") == 2
