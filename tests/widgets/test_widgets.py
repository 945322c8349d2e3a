"""The widgets without a browser: what they send, what they run, what they show when it fails."""

import contextlib
import threading
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import modlab
from modlab.errors import ModlabError
from modlab.hf.model import model_name
from modlab.widgets import (
    RoutingExplorer,
    RoutingHeatmap,
    ThresholdCurve,
    TokenText,
    explore,
    link,
)
from modlab.widgets.pictures import page
from modlab.widgets.yardsticks import PASSAGE, far_recall, token_losses
from tests.helpers.models import dense_llama, routed_llama
from tests.helpers.traces import head_trace, make_trace

TEXT = "the router decides which token runs and which token skips, and so on to the end of the line. " * 3


@pytest.fixture
def explorer(routed_model: Any, word_tokenizer: Any) -> RoutingExplorer:
    return explore(routed_model, word_tokenizer, TEXT)


def shown(widget: Any) -> tuple[np.ndarray, np.ndarray]:
    """(gate, keep) [R, T] as the browser will read them from the bytes."""
    cells = np.frombuffer(widget.gates, dtype="<u2").reshape(len(widget.layers), -1)
    table = np.concatenate([[0], np.union1d(page.grid(), np.frombuffer(widget.fine, dtype="<f4"))])
    return table[cells & 0x3FFF], (cells & 0x8000) > 0


def ask(explorer: RoutingExplorer, p: Any, number: int = 1) -> None:
    """The message that the slider sends on release, and the end of the run that it asks for."""
    explorer._handle_custom_msg({"type": "run", "p": p, "id": number}, [])
    with contextlib.suppress(Exception):
        explorer.wait(60)


@settings(max_examples=200, deadline=None)
@given(level=st.integers(1, page.GRID - 1), side=st.sampled_from([-1, 0, 1]), p=st.integers(1, page.GRID - 1))
def test_bytes_decide_exactly_as_float32(level: int, side: int, p: int) -> None:
    gate = np.float32(level / page.GRID)
    for _ in range(abs(side)):
        gate = np.nextafter(gate, np.float32(side * np.inf), dtype=np.float32)
    for threshold in (level, p):
        trace = make_trace(1, 2, gate=np.array([[gate]]), keep=np.ones((1, 1)), keep_first=0)
        sent, _ = shown(RoutingHeatmapBytes(trace))
        p = np.float32(threshold / page.GRID)
        assert (sent[0, 0] >= p) == trace.preview_keep(threshold / page.GRID)[0, 0]


class RoutingHeatmapBytes:
    """Only what `shown` reads: a whole widget for every example would be slow."""

    def __init__(self, trace: modlab.RoutingTrace) -> None:
        self.gates, self.fine, self.layers = page.gate_bytes(trace), page.fine_values(trace), trace.layers


def test_gates_close_to_zero_and_one_are_told_apart() -> None:
    """Those of real models are: 0.0015 keeps half, 0.00002 nearly all."""
    rng = np.random.default_rng(0)
    logits = np.concatenate([rng.normal(-6.5, 2, (1, 900)), rng.normal(9, 3, (1, 900))])
    gate = (1 / (1 + np.exp(-logits))).astype(np.float32)
    trace = make_trace(900, 4, gate=gate, keep=gate >= 0.0015, layers=[1, 3], thresholds=[0.0015, 0.0015])
    sent, _ = shown(RoutingHeatmapBytes(trace))
    for p in page.keeping_one_in(trace, [1.2, 1.5, 3, 4, 8, 16]):
        assert not page.NEAR <= p <= 1 - page.NEAR
        assert np.array_equal(sent >= np.float32(p), gate >= np.float32(p)), p
    assert len(page.fine_values(trace)) <= page.FINE


def test_more_gates_than_the_table_has_room_for() -> None:
    rng = np.random.default_rng(1)
    gate = (rng.uniform(0, 0.01, (3, 8000))).astype(np.float32)
    trace = make_trace(8000, 6, gate=gate, keep=gate >= 0.005, thresholds=np.full(3, 0.00512345))
    fine = page.fine_values(trace)
    assert len(fine) <= page.FINE and np.float32(0.00512345) in fine
    sent, _ = shown(RoutingHeatmapBytes(trace))
    assert np.abs(sent - gate).max() < 1e-5
    for p in (0.00512345, 0.0049, 0.0077):
        assert np.array_equal(sent >= np.float32(p), gate >= np.float32(p))


def test_a_slider_asks_for_p_or_for_a_share() -> None:
    assert not page.by_ratio(make_trace()) and page.by_ratio(make_trace(p=0.0015))
    assert page.by_ratio(head_trace()) and page.summary(head_trace())["by_ratio"]
    trace = make_trace(4000)
    for ratio, p in zip([16, 8, 4, 2], page.keeping_one_in(trace, [2, 4, 8, 16])[::-1], strict=True):
        assert (trace.gate >= p).mean() == pytest.approx(1 / ratio, rel=0.01)


def test_views_send_the_trace() -> None:
    trace = make_trace(80, 8)
    for view in (RoutingHeatmap(trace), TokenText(trace)):
        gate, keep = shown(view)
        assert np.array_equal(keep, trace.keep)
        assert np.abs(gate - trace.gate).max() < 1 / page.GRID
        assert view.tokens == trace.tokens and view.layers == trace.layers and view.threshold == 0.5
        assert len(view.gates) == 2 * trace.gate.size
        sent = np.frombuffer(view.losses, dtype="<f4")
        assert np.array_equal(sent, trace.loss, equal_nan=True)


def test_a_still_picture_is_beside_the_live_view(explorer: RoutingExplorer) -> None:
    sweep = pd.DataFrame({"threshold": [0.2, 0.5], "kv_bytes": [100, 80], "loss": [2.0, 2.1]})
    for view in (explorer, RoutingHeatmap(make_trace()), ThresholdCurve(sweep)):
        data, _ = view._repr_mimebundle_()
        assert "application/vnd.jupyter.widget-view+json" in data
        assert data["image/svg+xml"].startswith("<svg") and len(data["image/svg+xml"]) < 100_000


def test_explorer_measures(explorer: RoutingExplorer, routed_model: Any, word_tokenizer: Any) -> None:
    first = explorer.trace
    ask(explorer, 0.7)
    assert routed_model.mod.thresholds == {1: 0.7, 3: 0.7, 5: 0.7}
    want = modlab.trace(routed_model, word_tokenizer, TEXT)
    assert np.array_equal(explorer.trace.keep, want.keep) and not np.array_equal(first.keep, want.keep)
    assert np.array_equal(shown(explorer)[1], want.keep)
    summary = explorer.summary
    assert (summary["p"], explorer.threshold, summary["varies"]) == (0.7, 0.7, False)
    assert summary["loss"] == pytest.approx(want.mean_loss)
    kept = want.keep.sum() + 3 * len(want.tokens)
    # Allocated bytes: the kept tokens' own, and an index of four bytes for each token of the ragged layers.
    assert summary["kv_bytes"] == kept * want.kv_bytes_per_token + 4 * want.keep.sum()
    assert summary["dense_bytes"] == 6 * len(want.tokens) * want.kv_bytes_per_token
    assert explorer.job == {"state": "idle", "id": 1, "text": "", "fraction": 0.0, "error": ""}
    assert [run["p"] for run in explorer.runs] == [0.5, 0.7]
    ask(explorer, 0.5, 2)
    assert [run["p"] for run in explorer.runs] == [0.7, 0.5] and np.array_equal(
        explorer.trace.keep, first.keep
    )


def test_busy_is_told_before_the_run_and_ended_after(explorer: RoutingExplorer) -> None:
    states: list[dict[str, Any]] = []
    explorer.observe(lambda change: states.append(change.new), "job")
    ask(explorer, 0.6, 5)
    assert {s["id"] for s in states} == {5}
    assert states[0]["state"] == "running" and states[-1]["state"] == "idle"


@pytest.mark.parametrize("p", [1.0, 1.5, "half", None])
def test_a_failed_run_is_shown_and_changes_nothing(
    explorer: RoutingExplorer, routed_model: Any, p: Any
) -> None:
    before, thresholds = explorer.gates, dict(routed_model.mod.thresholds)
    ask(explorer, p, 9)
    assert explorer.job["state"] == "failed" and explorer.job["id"] == 9
    assert "failed" in explorer.job["error"] and str(p) in explorer.job["error"]
    assert explorer.gates == before and routed_model.mod.thresholds == thresholds
    ask(explorer, 0.6, 10)
    assert explorer.job["error"] == "" and explorer.summary["p"] == 0.6


def test_a_model_that_breaks_later_is_shown(explorer: RoutingExplorer, routed_model: Any) -> None:
    modlab.revert(routed_model)
    ask(explorer, 0.6)
    assert "dense" in explorer.job["error"] and explorer.job["state"] == "failed"


def test_other_messages_are_ignored(explorer: RoutingExplorer, routed_model: Any) -> None:
    explorer._handle_custom_msg({"type": "hello"}, [])
    assert routed_model.mod.thresholds[1] == 0.5 and explorer.job["id"] == 0


def test_runs_from_several_threads_do_not_mix(routed_model: Any, word_tokenizer: Any) -> None:
    explorers = [explore(routed_model, word_tokenizer, TEXT) for _ in range(2)]
    alone = {}
    for p in (0.4, 0.5, 0.6, 0.7):
        modlab.set_threshold(routed_model, p)
        alone[p] = modlab.trace(routed_model, word_tokenizer, TEXT).keep
    seen: list[tuple[float, np.ndarray]] = []

    def work(explorer: RoutingExplorer, ps: tuple[float, ...]) -> None:
        for number, p in enumerate(ps * 3):
            ask(explorer, p, number + 1)
            seen.append((p, explorer.trace.keep))

    plans = ((0.4, 0.7), (0.6, 0.5))
    threads = [
        threading.Thread(target=work, args=(one, plan)) for one, plan in zip(explorers, plans, strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert len(seen) == 12
    for p, keep in seen:
        assert np.array_equal(keep, alone[p])


def test_thresholds_by_layer_are_told(routed_model: Any, word_tokenizer: Any) -> None:
    modlab.set_threshold(routed_model, {1: 0.4, 3: 0.5, 5: 0.6})
    explorer = explore(routed_model, word_tokenizer, TEXT)
    assert explorer.summary["varies"] is True and explorer.threshold == pytest.approx(0.5)
    assert explorer.runs == []  # not a point of a curve over one p


def test_curve_takes_the_frame_of_sweep(routed_model: Any, word_tokenizer: Any) -> None:
    sweep = modlab.sweep(
        routed_model, word_tokenizer, [TEXT], thresholds=[0.6, 0.3], repeats=0, progress=False
    )
    explorer = explore(routed_model, word_tokenizer, TEXT, sweep)
    assert [point["p"] for point in explorer.points] == [0.3, 0.6]
    assert explorer.points[0]["loss"] == pytest.approx(sweep.set_index("threshold").loss[0.3])
    assert ThresholdCurve(sweep, p=0.4).threshold == 0.4
    with pytest.raises(ModlabError, match="no column loss"):
        ThresholdCurve(sweep.drop(columns="loss"))
    with pytest.raises(ModlabError, match="two thresholds"):
        ThresholdCurve(sweep[:1])


def test_the_curve_has_far_recall_and_errors_against_the_dense_model(
    routed_model: Any, word_tokenizer: Any
) -> None:
    dense, long = dense_llama(), TEXT * 3
    explorer = explore(routed_model, word_tokenizer, long, dense=dense)
    ids = torch.tensor([word_tokenizer(long)["input_ids"]])
    with torch.no_grad():
        want = torch.nn.functional.cross_entropy(dense(ids).logits[0, :-1], ids[0, 1:])
    assert explorer.summary["dense_loss"] == pytest.approx(float(want), rel=1e-5)
    assert "open_loss" in explorer.summary and "dense_recall" not in explorer.summary
    explorer.measure_curve([0.0, 0.5])
    assert {"dense_recall", "open_recall"} <= set(explorer.summary)
    opened, halved = explorer.points
    assert opened["recall"] == pytest.approx(explorer.summary["open_recall"])
    assert opened["loss"] == pytest.approx(explorer.summary["open_loss"], rel=1e-6)
    row = torch.cat([ids[0], ids[0, 8 : 8 + PASSAGE]])[None]
    with torch.no_grad():
        again = torch.nn.functional.cross_entropy(
            routed_model(row).logits[0, ids.shape[1] : -1], row[0, ids.shape[1] + 1 :], reduction="none"
        )
    modlab.set_threshold(routed_model, 0.5)
    found = far_recall(routed_model, word_tokenizer, long)
    assert found[: PASSAGE - 1] == pytest.approx(again.double().numpy(), rel=1e-4)
    assert halved["recall"] == pytest.approx(found.mean())
    control = token_losses(dense, word_tokenizer, long)
    difference = modlab.trace(routed_model, word_tokenizer, long).loss[1:] - control
    assert halved["loss_stderr"] == pytest.approx(difference.std(ddof=1) / len(difference) ** 0.5, rel=1e-4)


def test_a_short_text_has_no_far_recall(
    explorer: RoutingExplorer, word_tokenizer: Any, routed_model: Any
) -> None:
    explorer.set_text("too short to come again")
    explorer.wait(60)
    explorer.measure_curve([0.0, 0.5])
    assert [point["recall"] for point in explorer.points] == [None, None]
    assert not len(far_recall(routed_model, word_tokenizer, "a few words"))


def test_the_speed_is_measured_when_asked_for(routed_model: Any, word_tokenizer: Any) -> None:
    explorer = explore(routed_model, word_tokenizer, TEXT, dense=dense_llama())
    told: list[dict[str, Any]] = []
    explorer.observe(lambda change: told.append(change.new), "job")
    assert explorer.speed == {}
    explorer._handle_custom_msg({"type": "speed", "id": 1}, [])
    explorer.wait(120)
    speed = explorer.speed
    assert speed["p"] == 0.5 and speed["tokens"] == len(explorer.tokens) and speed["device"] == "cpu"
    assert all(speed[which][ms] > 0 for which in ("routed", "dense") for ms in ("first_ms", "next_ms"))
    assert any("Timing the dense model" in state["text"] for state in told)
    explorer.set_text("another text")
    explorer.wait(60)
    assert explorer.speed == {}


def test_without_a_dense_model_the_speed_is_compared_with_routing_off(
    routed_model: Any, word_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from modlab.measure import timing

    timed = timing.time_generate
    off: list[bool] = []

    def watched(model: Any, *more: Any) -> Any:
        off.append(model.mod.of_thread.off)
        return timed(model, *more)

    monkeypatch.setattr(timing, "time_generate", watched)
    speed = explore(routed_model, word_tokenizer, TEXT).measure_speed()
    assert speed["dense"]["next_ms"] > 0 and off == [False, True] * (len(off) // 2) and len(off) > 2
    assert not routed_model.mod.of_thread.off


def test_a_switch_changes_between_what_is_routed(routed_model: Any, word_tokenizer: Any) -> None:
    other = routed_llama(skip="kv")
    explorer = explore(routed_model, word_tokenizer, TEXT, others=[other])
    assert explorer.forms == ["whole layers", "keys and values"] and explorer.form == "whole layers"
    explorer.measure_curve([0.2, 0.6])
    explorer._handle_custom_msg({"type": "form", "form": "keys and values", "id": 1}, [])
    explorer.wait(60)
    want = modlab.trace(other, word_tokenizer, TEXT)
    assert explorer.form == "keys and values" and np.array_equal(explorer.trace.keep, want.keep)
    assert explorer.summary["words"]["past"] == "dropped" and explorer.layers == want.layers
    assert [point["p"] for point in explorer.points] == [0.2, 0.6]  # measured again, of this model
    before = dict(routed_model.mod.thresholds)
    explorer.run(0.7)  # the slider steers the model that shows
    assert set(other.mod.thresholds.values()) == {0.7} and routed_model.mod.thresholds == before
    with pytest.raises(ModlabError, match=r"routes 'MLPs'.*whole layers, keys and values"):
        explorer.switch("MLPs")
    assert explorer.form == "keys and values"


def test_views_of_one_text_share_a_group() -> None:
    trace, other = make_trace(), make_trace(seed=1, tokens=[f"x{i}" for i in range(60)])
    heatmap, text = RoutingHeatmap(trace), TokenText(make_trace(seed=2))  # other gates, the same text
    assert heatmap.group == text.group != TokenText(other).group
    assert RoutingHeatmap(trace, group="").group == ""


def test_link_moves_thresholds_and_joins_groups() -> None:
    a, b = RoutingHeatmap(make_trace()), TokenText(make_trace(tokens=[f"x{i}" for i in range(60)]))
    (made,) = link(a, b)
    assert made.source == (a, "threshold") and made.target == (b, "threshold")
    assert a.group == b.group


def test_errors(routed_model: Any, word_tokenizer: Any, make_llama: Any) -> None:
    with pytest.raises(ModlabError, match=r"modlab\.convert"):
        explore(make_llama(), word_tokenizer, TEXT)
    with pytest.raises(ModlabError, match="empty"):
        explore(routed_model, word_tokenizer, "")
    with pytest.raises(ModlabError, match="at least 0 and below 1"):
        RoutingHeatmap(make_trace(), threshold=1.0)
    with pytest.raises(ModlabError, match=r"100,000 tokens.*at most 65,536.*trace\.part"):
        RoutingHeatmap(make_trace(100_000, 2))


@pytest.mark.parametrize("name", ["demo", "demo-kv", "demo-dense"])
def test_each_demo_shows_under_its_own_name(name: str) -> None:
    """Routers in a folder of their own are not shown as the base that they are put on."""
    assert model_name(modlab.load(name)[0]) == name
