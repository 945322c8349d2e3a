"""The case `growth` at a tiny size: its parts and what their rows say. Never a claim about time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from modlab.bench import growth, registry
from modlab.bench.fast import fast_models
from modlab.config import MoDConfig

SIZES = growth.Sizes(contexts=(200, 300, 400), batches=(2, 3), batch_context=150, fit=300)


@pytest.fixture(scope="module", params=[("layer", "alternate"), ("kv", "all")], ids=["layer", "kv"])
def models(request: Any) -> Iterator[tuple[registry.Settings, Any, dict[str, Any]]]:
    skip, routed = request.param
    settings = registry.Settings(shape="tiny", repeats=1, skip=skip, routed=routed)
    with fast_models(settings, 500, [routed]) as (dense, twins):
        yield settings, dense, twins


def found(part: str, models: Any) -> list[registry.Row]:
    settings, dense, twins = models
    rows = list(growth.PARTS[part](settings, dense, twins, SIZES))
    assert all({*registry.ROW_KEYS, "skip"} <= set(row) for row in rows)
    assert all(row["skip"] == settings.skip and row["routed"] == settings.routed for row in rows)
    return rows


def test_steps_by_context_have_costs_at_one_of_them(models: Any) -> None:
    rows = found("decode", models)
    assert [row["context"] for row in rows] == [n for n in SIZES.contexts for _ in growth.RATIOS]
    assert [row["keep_ratio"] for row in rows] == [*growth.RATIOS] * 3
    assert {row["context"] for row in rows if "kept_us" in row and "skipped_us" in row} == {SIZES.fit}


def test_what_is_stored_is_what_the_skip_stores(models: Any) -> None:
    """A tenth of the tokens of routed layers; of keys and values the recent ones as well."""
    settings = models[0]
    row = next(r for r in found("decode", models) if (r["context"], r["keep_ratio"]) == (400, 0.10))
    share = 0.1
    if settings.skip == "kv":
        recent = MoDConfig(skip="kv").keep_recent
        assert isinstance(recent, int)
        share = (recent + 0.1 * (400 - recent)) / 400
    routed = row["routed_layers"] / row["num_layers"]
    assert 1 / row["kv_saving"] == pytest.approx(1 - routed * (1 - share), rel=0.15)


def test_prompts_by_context_say_two_ratios_of_the_longest(models: Any) -> None:
    rows = found("prefill", models)
    assert {row["case"] for row in rows} == {"prefill"}
    of = {n: len([row for row in rows if row["context"] == n]) for n in SIZES.contexts}
    assert of == {200: 5, 300: 5, 400: 2}
    assert {row["context"] for row in rows if "kept_us" in row} == {SIZES.fit}


def test_steps_of_several_rows(models: Any) -> None:
    rows = found("batch", models)
    assert [(row["batch"], row["keep_ratio"]) for row in rows] == [(2, 0.1), (2, 0.5), (3, 0.1), (3, 0.5)]
    assert {row["context"] for row in rows} == {SIZES.batch_context}
