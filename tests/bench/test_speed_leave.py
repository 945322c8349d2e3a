"""The case `speed_leave` at a tiny size: what its rows say. Never a claim about time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from modlab.bench import registry, speed_leave
from modlab.bench.ideal import ideal_prefill, layer_weights, left_flops, prefill_flops
from modlab.bench.models import SHAPES
from modlab.bench.speed_kv import Sizes
from modlab.config import MoDConfig

SIZES = Sizes(short=40, long=300, longest=350, unequal=(30, 60, 200), new=6)


@pytest.fixture(scope="module")
def rows() -> Iterator[list[dict[str, Any]]]:
    settings = registry.Settings(shape="tiny", layers=6, repeats=1)
    with speed_leave.leaving_models(settings, 400) as (dense, twins):
        yield list(speed_leave.leaving_rows(settings, dense, twins, SIZES))


def test_rows_say_who_leaves_and_who_decides(rows: list[dict[str, Any]]) -> None:
    prompts = [row for row in rows if row["case"] == "prefill"]
    assert [row["granularity"] for row in prompts if row["context"] == 300] == [
        "none",
        *["layer", "kv_head"] * 2,
    ]
    assert {row["context"] for row in prompts} == {300, 200, 350}
    assert {(row["skip"], row["routed_layers"], row["routed"]) for row in prompts} == {
        ("prompt", 2, "upper"),
        ("kv+prompt", 6, "all"),
    }
    assert [row["what"] for row in rows if row["case"] == "baseline"] == ["prefill", "decode"]
    for row in prompts:
        assert row["ideal"] > 1.3
        assert (row["kv_saving"] > 1.3) == (row["skip"] == "kv+prompt" and row["context"] != 200)


def test_a_context_is_measured_alone() -> None:
    settings = registry.Settings(shape="tiny", layers=6, repeats=1, contexts=(350,))
    with speed_leave.leaving_models(settings, 400) as (dense, twins):
        rows = list(speed_leave.leaving_rows(settings, dense, twins, SIZES))
    assert [(row["case"], row["context"]) for row in rows] == [("prefill", 350)] * 3


def test_ideals_count_what_is_run() -> None:
    """By hand: two thirds of the layers in full, keys and values of the others."""
    config, length = SHAPES["llama-3-8b"].config(40_000), 32_768
    attention, mlp = layer_weights(config)
    pairs = 4 * length**2 / 2 * 4096
    whole = 2 * length * (attention + mlp) + pairs
    assert prefill_flops(config, [length], 1.0) == pytest.approx(whole)
    assert left_flops(config, [length]) == 2 * length * 4096 * 1024 * 2
    leaves = ideal_prefill(config, [length], {}, MoDConfig(skip="prompt"))
    assert leaves == pytest.approx(32 * whole / (21 * whole + 11 * left_flops(config, [length])))
    quarter = dict.fromkeys(range(32), 0.25)
    routed = ideal_prefill(config, [length], quarter, MoDConfig())
    both = ideal_prefill(config, [length], quarter, MoDConfig(skip="kv+prompt"))
    assert routed < leaves < both < routed * leaves
