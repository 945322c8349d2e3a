"""docs/quality.md on real models: the verdicts follow from the records."""

from __future__ import annotations

import json
from typing import Any

import pytest

from modlab.recipes import RECIPES
from modlab.routing.kv_saving import rounding
from modlab.routing.trained import Trained
from scripts.pages import measured, real_models
from scripts.pages.blocks import ROOT


def record(model: str, gap: float, kl: float, arm: str = "distil", savings: tuple = (2.0, 4.0)) -> dict:
    """A measurement in which figures grow with the saving."""
    rows = [
        {
            "arm": name,
            "ratio_asked": s,
            "recall_gap": {"256": 0.0, "1024": gap * s},
            "kl_far": kl * s,
            "recent": 512,
        }
        for s in (1.0, *savings)
        for name in (arm, f"{arm}: chance")
    ]
    return {"model": model, "arm": arm, "date": "2026-11-30", "rows": rows}


def found(gap: float, kl: float, *more: dict) -> real_models.Settings:
    return real_models.settings([*(record(model, gap, kl) for model in real_models.SHIPPED), *more])


def test_the_highest_saving_is_the_one_that_every_model_reaches() -> None:
    assert real_models.highest(found(0.004, 0.004), 0.02, 0.02) == 4
    assert real_models.highest(found(0.009, 0.004), 0.02, 0.02) == 2
    assert real_models.highest(found(0.004, 0.02), 0.02, 0.02) is None
    assert real_models.highest(found(0.004, 0.02), 0.02, None) == 4
    worse = found(0.004, 0.004)
    worse["coder-1.5b"][4.0][0]["recall_gap"]["256"] = 1.0
    assert real_models.highest(worse, 0.05, None) == 2


def test_of_several_numbers_of_recent_tokens_one_within_the_limits_is_enough() -> None:
    """And the lowest KL among those counts; controls and another saving's rows do not."""
    one = record("coder-1.5b", 0.006, 0.003)
    row = one["rows"][-2] | {"arm": "distil, 384 recent tokens", "recent": 384}
    gaps = {"256": 0.0, "1024": 0.019}
    one["rows"] += [
        {**row, "arm": "distil, 384 recent tokens: chance", "recall_gap": gaps, "kl_far": 0.001},
        {**row, "recall_gap": gaps, "kl_far": 0.016},
        {**row, "arm": "distil, 256 recent tokens", "recent": 256, "recall_gap": gaps, "kl_far": 0.019},
        {"arm": "distil, 64 recent tokens", "ratio_asked": 4.0, "tasks": {}},
    ]
    others = [record(model, 0.004, 0.004) for model in real_models.SHIPPED if model != "coder-1.5b"]
    assert (
        real_models.highest(real_models.settings([*others, record("coder-1.5b", 0.006, 0.003)]), 0.02, 0.02)
        == 2
    )
    several = real_models.settings([*others, one])
    assert [told["recent"] for told in several["coder-1.5b"][4.0]] == [512, 384, 256]
    assert real_models.highest(several, 0.02, 0.02) == 4
    best = real_models.chosen(several["coder-1.5b"][4.0], 0.02, 0.02)
    assert best is not None and (best["recent"], best["kl_far"]) == (384, 0.016)
    assert real_models.chosen(several["coder-1.5b"][4.0], 0.01, 0.02) is None


def test_routers_that_do_not_ship_count_where_those_that_do_were_not_measured() -> None:
    other = record("coder-0.5b", 1.0, 1.0, f"distil{measured.VARIES}far", savings=(3.0, 4.0))
    rows = found(0.004, 0.004, other)
    assert real_models.highest(rows, 0.02, 0.02) == 4, "4x is that of routers that ship"
    assert real_models.common_savings(rows) == [2, 4], "3x was measured on one model alone"
    assert [row["ships"] for row in rows["coder-0.5b"][3.0] + rows["coder-0.5b"][4.0]] == [False, True]


@pytest.mark.parametrize("stored", real_models.STORED)
@pytest.mark.parametrize("name", real_models.LIMITS)
def test_recipes_aim_at_the_highest_saving_that_the_records_allow(name: str, stored: Any) -> None:
    """Of each way to store keys and values; and they store them as the higher one was measured."""
    found = real_models.by_storage(ROOT)
    saving = real_models.highest(found[stored], *real_models.LIMITS[name])
    recipe = RECIPES[name]
    assert recipe.kv_savings[stored] == saving
    assert recipe.kv_saving == max(recipe.kv_savings.values())
    said = real_models.recipes(ROOT)
    assert f"{real_models.STORED[stored]} {saving:g}x is the highest that has it, with " in said
    assert f"It aims at {recipe.kv_saving:g}x in eight bits" in said


def test_a_recipe_that_nothing_was_measured_of_in_eight_bits_has_no_saving_there() -> None:
    measured_so = set(real_models.LIMITS)
    assert measured_so == {name for name, recipe in RECIPES.items() if measured.INT8 in recipe.kv_savings}


@pytest.mark.parametrize(
    ("name", "stored", "kl", "gap"),
    [
        ("safe", "auto", "0.0021", "0.018"),
        ("default", "int8", "0.0081", "0.020"),
        ("default", "auto", "0.0071", "0.019"),
        ("memory", "int8", None, "0.044"),
        ("memory", "auto", None, "0.039"),
        ("distil", "auto", "0.016", "0.039"),
    ],
)
def test_what_summaries_say_is_in_the_records(name: str, stored: str, kl: str | None, gap: str) -> None:
    found, said = real_models.by_storage(ROOT), RECIPES[name].summary
    of = [real_models.of_recipe(found, name, model, stored) for model in real_models.SHIPPED]
    worst = max(max(row["recall_gap"].values()) for row in of)
    assert worst == pytest.approx(float(gap), abs=0.0005) and gap in said
    if kl is not None:
        digits = len(kl) - 2
        assert f"{max(row['kl_far'] for row in of):.{digits}f}" == kl and kl in said


def test_eight_bits_are_closer_to_dense_than_safe_which_is_what_the_page_says() -> None:
    """docs/quality.md: 2x of both together, for which nearly all keys are kept."""
    found = real_models.by_storage(ROOT)
    for model in real_models.SHIPPED:
        (rounded,) = found[measured.INT8][model][2.0]
        safe = real_models.of_recipe(found, "safe", model)
        assert max(rounded["recall_gap"].values()) < max(safe["recall_gap"].values())


@pytest.mark.parametrize("name", real_models.LIMITS)
def test_six_and_four_bits_raise_no_recipe(name: str) -> None:
    """docs/defaults.md: within the same limits they go no further than what the recipes have."""
    fewer = real_models.settings(measured.records(ROOT, measured.K6V4))
    assert real_models.common_savings(fewer) == [8, 16]
    assert (real_models.highest(fewer, *real_models.LIMITS[name]) or 0) <= RECIPES[name].kv_saving
    assert measured.K6V4 not in RECIPES[name].kv_savings


def test_the_worst_of_the_models_counts() -> None:
    rows = found(0.004, 0.003, record("coder-1.5b", 0.001, 0.02))
    assert real_models.worst_of_models(rows, 4.0) == (0.08, 0.016)


@pytest.mark.parametrize("model", real_models.SHIPPED)
def test_routers_ship_with_the_thresholds_and_recent_tokens_of_the_records(model: str) -> None:
    """At each recipe's saving those that its rule chose; in between thresholds rise, recent tokens do not."""
    file = ROOT / "modlab" / "routers" / f"{model}-kv" / "modlab_config.json"
    trained = Trained.from_dict(json.loads(file.read_text(encoding="utf-8"))["trained"])
    found = real_models.by_storage(ROOT)
    for name in ("safe", "default", "memory"):
        row = real_models.of_recipe(found, name, model, measured.AUTO)
        assert trained.threshold_for(row["ratio_asked"]) == pytest.approx(row["threshold"], rel=1e-4)
        assert trained.recent_for(row["ratio_asked"]) == row["recent"]
    size = 128 if model == "coder-1.5b" else 64  # of a head
    together = trained.counted(rounding("int8", (1, size, size), 2).total)
    for name in real_models.LIMITS:
        row = real_models.of_recipe(found, name, model)
        # In eight bits they were set on rows once more, by the bytes there: what is reckoned is close to it.
        assert together.threshold_for(row["ratio_asked"]) == pytest.approx(row["threshold"], rel=0.01)
        assert together.recent_for(row["ratio_asked"]) == row["recent"]
    savings = [2 + step / 8 for step in range(17)]
    thresholds, recent = zip(
        *((trained.threshold_for(s), trained.recent_for(s)) for s in savings), strict=True
    )
    assert sorted(thresholds) == list(thresholds) and len(set(thresholds)) == len(savings)
    assert sorted(recent, reverse=True) == list(recent)


def test_the_page_shows_every_model_and_control() -> None:
    said = real_models.block(ROOT)
    for model in real_models.SHIPPED:
        assert said.count(f"| {model} | ") >= 4
    for control in ("**gates**", "window alone", "chance per head", "whole heads"):
        assert said.count(f"| {control} | ") == 2
