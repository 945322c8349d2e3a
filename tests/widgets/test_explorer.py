"""The explorer's curve and runs belong to the recent tokens that they were measured with."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest

import modlab
from modlab.errors import ModlabError
from modlab.widgets import RoutingExplorer, explore
from modlab.widgets.jobs import Cancelled
from tests.helpers.models import dense_llama, routed_llama

TEXT = "the router decides which token runs and which token skips, and so on to the end of the line. " * 3
ASKED = (0.0, 0.45, 0.6)


@pytest.fixture
def model() -> Any:
    return routed_llama(skip="kv", keep_recent=40)


def measured(model: Any, word_tokenizer: Any) -> RoutingExplorer:
    explorer = explore(model, word_tokenizer, TEXT)
    explorer.measure_curve(ASKED)
    return explorer


def rerun(explorer: RoutingExplorer) -> None:
    explorer.run(0.45)


def again(explorer: RoutingExplorer) -> None:
    explorer.measure_curve(ASKED)


def find(explorer: RoutingExplorer) -> None:
    explorer.calibrate(keep_ratio=0.6)


@pytest.mark.parametrize("ask", [rerun, again, find])
def test_a_curve_is_measured_again_with_other_recent_tokens(
    model: Any, word_tokenizer: Any, ask: Callable[[RoutingExplorer], None]
) -> None:
    explorer = measured(model, word_tokenizer)
    before = explorer.points
    explorer.run(0.6)
    explorer.measure_speed()
    modlab.set_keep_recent(model, 8)  # as another cell does
    ask(explorer)
    want = measured(model, word_tokenizer)
    assert explorer.points == want.points and [point["p"] for point in explorer.points] == list(ASKED)
    assert want.points[-1]["kv_bytes"] < before[-1]["kv_bytes"]
    assert explorer.summary["recent"] == model.mod.config.recent_stored == 7
    assert [run["p"] for run in explorer.runs] == [explorer.summary["p"]] and not explorer.speed
    assert explorer.runs[0]["kv_bytes"] == explorer.summary["kv_bytes"]


def test_where_recent_tokens_stay_the_curve_does(model: Any, word_tokenizer: Any) -> None:
    explorer = measured(model, word_tokenizer)
    points, runs = explorer.points, explorer.runs
    explorer.run(0.6)
    assert explorer.points is points and explorer.runs[:-1] == runs


def test_a_given_sweep_is_measured_again_too(model: Any, word_tokenizer: Any) -> None:
    def sweep() -> Any:
        return modlab.sweep(model, word_tokenizer, [TEXT], ASKED, repeats=0, recall_rows=0, progress=False)

    explorer = explore(model, word_tokenizer, TEXT, sweep())
    modlab.set_keep_recent(model, 8)
    explorer.run(0.45)
    assert [point["kv_bytes"] for point in explorer.points] == sweep().kv_bytes.tolist()


def test_a_curve_that_was_stopped_does_not_mix_recent_tokens(
    model: Any, word_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One point is there when it is stopped, another when a cell sets others while it is measured."""
    explorer = explore(model, word_tokenizer, TEXT)
    at, asked = explorer._at, list[float]()

    def stopped(p: float) -> Any:
        if len(asked) == 1:
            raise Cancelled
        asked.append(p)
        return at(p)

    monkeypatch.setattr(explorer, "_at", stopped)
    with pytest.raises(Cancelled):
        explorer.measure_curve(ASKED)
    modlab.set_keep_recent(model, 20)

    def moved(p: float) -> Any:
        asked.append(p)
        if len(asked) == 3:
            cell = threading.Thread(target=modlab.set_keep_recent, args=(model, 8))
            cell.start()
            cell.join()
        return at(p)

    monkeypatch.setattr(explorer, "_at", moved)
    explorer.run(0.45)
    assert asked == [0.0, 0.0, 0.45, *ASKED]
    assert explorer.points == measured(model, word_tokenizer).points
    assert explorer.summary["recent"] == 7 and explorer.runs[0]["kv_bytes"] == explorer.summary["kv_bytes"]


@pytest.mark.parametrize("gates", ["layer", "kv_head"])
def test_the_budget_s_bounds_are_what_the_cache_takes(word_tokenizer: Any, gates: str) -> None:
    """Each KV head with a gate of its own has an index of its own, too."""
    open_gates = modlab.MoDConfig(layers="all", gates=gates, keep_recent=4)
    explorer = explore(modlab.convert(dense_llama(), open_gates), word_tokenizer, TEXT)
    layers, tokens = 6, len(word_tokenizer(TEXT)["input_ids"])
    takes = explorer.summary["kv_bytes"] / 2**20
    with pytest.raises(ModlabError, match="lie outside") as refused:
        explorer.calibrate(kv_mib=2 * takes, context=tokens)
    assert f"and {takes:.4g} MiB, with everything kept" in str(refused.value)
    budget = explorer.budget
    each = budget["token_bytes"] + budget["index_bytes"]  # the page's own sum
    assert each * tokens * layers == takes * 2**20
    assert budget["mib"] == pytest.approx(each * budget["context"] * 0.25 * layers / 2**20, rel=0.01)


@pytest.mark.parametrize(
    ("dtype", "stored", "said"),
    [
        ("int8", 2 * 2 * (16 + 2), "eight bits"),
        ("k6v4", 2 * (12 + 8 + 4), "six bits (keys) and four (values)"),
    ],
)
def test_a_switch_stores_keys_and_values_in_fewer_bits(
    model: Any, word_tokenizer: Any, dtype: Any, stored: int, said: str
) -> None:
    explorer = measured(model, word_tokenizer)
    before = dict(explorer.summary)
    assert list(before["stored_in"]) == ["auto", "int8", "k6v4"] and before["kv_cache_dtype"] == "auto"
    explorer._on_message(explorer, {"type": "store in", "dtype": dtype, "id": 1}, [])
    assert explorer.wait(60) and model.mod.config.kv_cache_dtype == dtype
    after = explorer.summary
    assert after["kv_cache_dtype"] == dtype and after["dense_bytes"] == before["dense_bytes"]
    assert after["kv_bytes"] < 0.8 * before["kv_bytes"] and after["loss"] != before["loss"]
    assert after["stored_bytes"] == stored < after["token_bytes"] == before["token_bytes"]
    assert explorer.budget["stored_bytes"] == after["stored_bytes"]
    want = measured(model, word_tokenizer)
    assert explorer.points == want.points, "all of the curve, and what it is compared with"
    assert after["open_loss"] == want.summary["open_loss"] != before["open_loss"]
    assert f"keys and values in {said}" in explorer._svg()
    explorer.store_in("auto")
    assert explorer.summary["kv_bytes"] == before["kv_bytes"] and not model.mod.ranges


@pytest.mark.parametrize("ask", [rerun, again, find])
def test_a_cell_may_switch_too(
    model: Any, word_tokenizer: Any, ask: Callable[[RoutingExplorer], None]
) -> None:
    explorer = measured(model, word_tokenizer)
    modlab.set_kv_cache_dtype(model, "int8")
    ask(explorer)
    want = measured(model, word_tokenizer)
    assert explorer.points == want.points and explorer.summary["open_loss"] == want.summary["open_loss"]
    assert explorer.budget["stored_bytes"] == want.budget["stored_bytes"]


def test_a_switch_that_is_stopped_leaves_the_model_as_it_was(
    model: Any, word_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    explorer, before = explore(model, word_tokenizer, TEXT), model.mod.config
    monkeypatch.setattr("modlab.widgets.explorer.run_traced", stopped)
    with pytest.raises(Cancelled):
        explorer.store_in("int8")
    assert model.mod.config.kv_cache_dtype == before.kv_cache_dtype == "auto" and not model.mod.ranges
    assert explorer.summary["kv_cache_dtype"] == "auto"


def stopped(*_: Any) -> Any:
    raise Cancelled


def test_where_no_cache_is_routed_there_is_no_switch(routed_model: Any, word_tokenizer: Any) -> None:
    explorer = explore(routed_model, word_tokenizer, TEXT)
    assert not explorer.summary["stored_in"]
    with pytest.raises(ModlabError):
        explorer.store_in("int8")
