"""The widgets that steer a model, without a browser: what they compute is what the model does."""

import re
import threading
import time
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import modlab
from modlab import published
from modlab.errors import ModlabError
from modlab.routing.trained import Trained
from modlab.widgets import (
    CacheView,
    CellFlip,
    ClassHeatmap,
    Compare,
    Frontier,
    Thresholds,
    TokenPath,
    compare,
)
from modlab.widgets.model_access import lock_of
from modlab.widgets.writing import Writing, write_in_turns
from tests.helpers.models import dense_llama, leaving_llama, scatter_gates
from tests.helpers.traces import make_trace

TEXT = "the router decides which token runs and which token skips, and so on to the end of the line. " * 3


def send(widget: Any, **content: Any) -> None:
    """A message as the browser sends it, and the end of what it asks for."""
    widget._handle_custom_msg(content, [])
    widget.wait(60)


def sweep() -> pd.DataFrame:
    return pd.DataFrame(
        {
            "threshold": [0.5, 0.2, 0.8],
            "keep_ratio": [0.4, 0.8, 0.1],
            "kv_bytes": [700, 900, 600],
            "loss": [2.1, 2.0, 2.6],
            "prefill_ms": [10.0, 12.0, 9.0],
            "decode_ms": [float("nan"), 2.0, 2.0],
        }
    )


VIEWS_WITH_A_SLIDER = {
    "explore": lambda model, tokenizer: modlab.widgets.explore(model, tokenizer, TEXT),
    "Thresholds": lambda model, tokenizer: Thresholds(model, tokenizer, TEXT),
    "Compare": lambda model, tokenizer: Compare(model, tokenizer, TEXT),
    "CacheView": lambda model, tokenizer: CacheView(model, tokenizer, TEXT),
    "Frontier": lambda model, tokenizer: Frontier(sweep(), model),
}


@pytest.mark.parametrize("view", VIEWS_WITH_A_SLIDER)
def test_a_slider_of_a_model_in_which_no_gate_decides_is_refused(view: str, word_tokenizer: Any) -> None:
    model = leaving_llama("prompt")
    with pytest.raises(ModlabError, match="'prompt' no gate decides"):
        VIEWS_WITH_A_SLIDER[view](model, word_tokenizer)
    VIEWS_WITH_A_SLIDER[view](leaving_llama("kv+prompt"), word_tokenizer).close()  # there gates decide


def test_explore_refuses_another_model_in_which_no_gate_decides(
    routed_model: Any, word_tokenizer: Any
) -> None:
    with pytest.raises(ModlabError, match="'prompt' no gate decides"):
        modlab.widgets.explore(routed_model, word_tokenizer, TEXT, others=[leaving_llama("prompt")])


def test_a_flip_is_what_an_override_does(routed_model: Any, word_tokenizer: Any) -> None:
    before = modlab.trace(routed_model, word_tokenizer, TEXT)
    widget = CellFlip(routed_model, word_tokenizer, TEXT)
    assert widget.effect["loss"] == pytest.approx(before.mean_loss) and widget.effect["others"] == 0
    row, token = 0, 30
    keep = not before.keep[row, token]
    widget.flip(1, token)
    assert widget.wait(60) and widget.forced == {(1, token): keep}

    def decide(layer: int, gate: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        kept = (gate >= 0.5) | (position < 4)
        return kept.masked_fill(position == token, keep) if layer == 1 else kept

    with modlab.routing_override(routed_model, decide):
        after = modlab.trace(routed_model, word_tokenizer, TEXT)
    assert np.array_equal(widget.trace.keep, after.keep) and widget.trace.keep[row, token] == keep
    assert widget.effect["loss"] == pytest.approx(after.mean_loss)
    assert widget.effect["others"] == int((before.keep != after.keep).sum()) - 1
    deltas = np.frombuffer(widget.deltas, "<f4")
    assert deltas == pytest.approx(np.nan_to_num(after.loss - before.loss), abs=1e-6)
    assert (deltas[: token + 1] == 0).all() and deltas.any()  # causal: only later tokens change
    per_cell = before.kv_bytes_per_token + 4
    change = int(after.keep.sum()) - int(before.keep.sum())
    assert widget.effect["kv_bytes"] - widget.effect["kv_bytes_before"] == change * per_cell
    widget.reset()
    assert (
        widget.wait(60)
        and widget.effect["loss"] == pytest.approx(before.mean_loss)
        and not any(np.frombuffer(widget.deltas, "<f4"))
    )


def test_next_tokens_are_the_models_probabilities(routed_model: Any, word_tokenizer: Any) -> None:
    widget = CellFlip(routed_model, word_tokenizer, TEXT)
    send(widget, type="flips", flips=[[3, 20, True]], position=25, id=1)
    ids = torch.tensor([word_tokenizer(TEXT)["input_ids"]])
    with torch.no_grad():
        want = routed_model(ids).logits[0, 25].softmax(-1)
    assert widget.effect["at"] == 25 and len(widget.effect["next"]) == 8
    best = word_tokenizer.decode([int(want.argmax())])
    shown = {row["token"]: row for row in widget.effect["next"]}
    assert shown[best]["before"] == pytest.approx(float(want.max()), rel=1e-5)


def test_flips_follow_a_new_threshold(routed_model: Any, word_tokenizer: Any) -> None:
    widget = CellFlip(routed_model, word_tokenizer, TEXT)
    modlab.set_threshold(routed_model, 0.6)
    widget.flip(1, 30, True)
    widget.wait(60)
    assert widget.effect["loss_before"] == pytest.approx(
        modlab.trace(routed_model, word_tokenizer, TEXT).mean_loss
    )


def test_cells_that_cannot_be_flipped(routed_model: Any, word_tokenizer: Any) -> None:
    widget = CellFlip(routed_model, word_tokenizer, TEXT)
    with pytest.raises(ModlabError, match="layer 2 is not routed"):
        widget.flip(2, 5)
    with pytest.raises(ModlabError, match="no token 9999"):
        widget.flip(1, 9999)
    loss = widget.effect["loss"]
    with pytest.raises(ModlabError):
        send(widget, type="flips", flips=[[2, 5, True]], id=3)
    assert "not routed" in widget.job["error"] and widget.effect["loss"] == loss


def test_thresholds_of_each_layer(routed_model: Any, word_tokenizer: Any) -> None:
    widget = Thresholds(routed_model, word_tokenizer, TEXT)
    send(widget, type="run", ps=[0.4, 0.5, 0.6], id=1)
    assert widget.thresholds == routed_model.mod.thresholds == {1: 0.4, 3: 0.5, 5: 0.6}
    want = modlab.trace(routed_model, word_tokenizer, TEXT)
    assert np.array_equal(widget.trace.keep, want.keep)
    assert widget.layer_thresholds == pytest.approx([0.4, 0.5, 0.6]) == widget.summary["ps"]


def test_calibrate_to_a_keep_ratio_and_to_a_budget(routed_model: Any, word_tokenizer: Any) -> None:
    widget = Thresholds(routed_model, word_tokenizer, TEXT)
    widget.calibrate(keep_ratio=0.4)
    assert widget.trace.keep.mean() == pytest.approx(0.4, abs=0.011)
    length = len(widget.trace.tokens)
    budget = 0.8 * widget.summary["dense_bytes"]
    send(widget, type="calibrate", kv_mib=budget / 2**20, context=length, per_layer=True, id=2)
    assert widget.summary["kv_bytes"] == pytest.approx(budget, rel=0.02)
    assert widget.summary["varies"]


def test_a_calibration_that_fails_changes_nothing(routed_model: Any, word_tokenizer: Any) -> None:
    widget = Thresholds(routed_model, word_tokenizer, TEXT)
    before = widget.thresholds
    with pytest.raises(ModlabError, match="takes between"):
        send(widget, type="calibrate", kv_mib=1e-6, context=100, id=1)
    assert "takes between" in widget.job["error"] and widget.thresholds == before
    with pytest.raises(ModlabError, match="one of them"):
        widget.calibrate()


def test_a_run_can_be_stopped(routed_model: Any, word_tokenizer: Any) -> None:
    widget = Thresholds(routed_model, word_tokenizer, TEXT)
    before, gates = widget.thresholds, widget.gates
    begun, asked = threading.Event(), threading.Event()

    def hold(*_: Any) -> None:
        begun.set()
        assert asked.wait(60)

    hook = routed_model.get_decoder().layers[2].register_forward_pre_hook(hold)
    try:
        widget._handle_custom_msg({"type": "calibrate", "keep_ratio": 0.3, "id": 1}, [])
        assert begun.wait(60)
        widget._handle_custom_msg({"type": "cancel"}, [])
        asked.set()
        assert widget.wait(60)
    finally:
        hook.remove()
    assert widget.job["state"] == "cancelled" and widget.thresholds == before and widget.gates == gates
    assert len(routed_model.get_decoder().layers[0]._forward_pre_hooks) == 0


def test_a_model_in_use_is_waited_for(routed_model: Any, word_tokenizer: Any) -> None:
    widget = Thresholds(routed_model, word_tokenizer, TEXT)
    waits = threading.Event()
    widget.observe(
        lambda change: waits.set() if "Waiting for the model" in change.new["text"] else None, "job"
    )
    with lock_of(routed_model):
        widget._handle_custom_msg({"type": "run", "ps": [0.6] * 3, "id": 1}, [])
        assert waits.wait(60) and widget.thresholds[1] == 0.5
    assert widget.wait(30) and widget.thresholds[1] == 0.6


@pytest.mark.parametrize(
    "want",
    [
        {"kv_mib": None},
        {"kv_mib": 0},
        {"kv_mib": 1e-6},
        {"kv_mib": 1e6},
        {"kv_mib": 0.1, "context": 0},
        {"keep_ratio": None},
        {"keep_ratio": 1.2},
        {"keep_ratio": 0.0001},
    ],
)
def test_find_tells_its_errors_to_a_reader(
    routed_model: Any, word_tokenizer: Any, want: dict[str, Any]
) -> None:
    """What the fields of the page can hold, an empty one (None) too, ends in a sentence, not in Python."""
    widget = Thresholds(routed_model, word_tokenizer, TEXT)
    before = widget.thresholds
    with pytest.raises(ModlabError):
        send(widget, type="calibrate", id=1, **{"context": 2048, **want})
    error = widget.job["error"]
    assert error and not re.search(r"Error|None|NoneType|_|\(\)|=", error), error
    assert widget.thresholds == before


def test_compare_generates_as_the_model_does(routed_model: Any, word_tokenizer: Any) -> None:
    widget = Compare(routed_model, word_tokenizer, "the router decides", p=(0.4, 0.6), max_new_tokens=12)
    sides = widget.run()
    assert routed_model.mod.thresholds[1] == 0.5  # as before
    for side, p in zip(sides, (0.4, 0.6), strict=True):
        modlab.set_threshold(routed_model, p)
        ids = torch.tensor([word_tokenizer("the router decides")["input_ids"]])
        out = routed_model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False
        )
        assert side["text"] == word_tokenizer.decode(out[0, ids.shape[1] :])
        assert len(side["pieces"]) == len(side["same"]) == out.shape[1] - ids.shape[1]
        assert side["kv_bytes"] > 0 and side["dense_bytes"] > 0 and side["seconds"] > 0


def test_compare_marks_what_differs(routed_model: Any, word_tokenizer: Any) -> None:
    widget = Compare(routed_model, word_tokenizer, "the router", p=(0.5, 0.5), max_new_tokens=8)
    send(widget, type="generate", prompt="the token", ps=[0.5, 0.5], max_new_tokens=6, id=1)
    assert [all(side["same"]) for side in widget.sides] == [True, True]
    assert widget.sides[0]["prompt"] == "the token" and len(widget.sides[0]["pieces"]) == 6
    widget.ps = [0.05, 0.95]
    widget.max_new_tokens = 20
    a, b = widget.run()
    kept = [[piece for piece, same in zip(s["pieces"], s["same"], strict=True) if same] for s in (a, b)]
    assert kept[0] == kept[1] and not all(a["same"])


def test_compare_writes_both_sides_in_turns(
    routed_model: Any, word_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compare, "REPORT_EVERY", 0.0)
    widget = Compare(routed_model, word_tokenizer, "the router decides", p=(0.05, 0.95), max_new_tokens=10)
    told: list[list[dict[str, Any]]] = []
    widget.observe(lambda change: told.append(change.new), "sides")
    send(widget, type="generate", prompt="the router decides", ps=[0.05, 0.95], max_new_tokens=10, id=1)
    counts = [tuple(len(side["pieces"]) for side in sides) for sides in told]
    assert counts[:4] == [(1, 0), (1, 1), (2, 1), (2, 2)]
    running, over = told[7], told[-1]
    assert not any(side["done"] for side in running) and all(side["done"] for side in over)
    for side in running:  # what a side is ahead of the other is not called a difference
        assert side["kv_bytes"] > 0 and side["dense_bytes"] > 0 and side["tokens_per_s"] > 0
    assert told[2][0]["same"][-1] and len(told[2][1]["pieces"]) == 1
    assert [side["dense_bytes"] for side in over] > [side["dense_bytes"] for side in running]
    assert all(side["seconds"] >= side["first_s"] > 0 for side in over)


def test_an_error_in_one_continuation_ends_the_others(routed_model: Any, word_tokenizer: Any) -> None:
    writings = [Writing(word_tokenizer, p) for p in (0.2, 0.5, 0.8)]
    hooks = len(routed_model.get_decoder()._forward_hooks)
    ids = torch.tensor([word_tokenizer("the router decides")["input_ids"]])

    def after() -> None:
        if len(writings[1].ids) == 3:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        write_in_turns(routed_model, writings, ids, 10, after)
    assert [len(writing.ids) for writing in writings] == [3, 3, 2]
    assert not any(thread.name == "modlab-write" for thread in threading.enumerate())
    assert len(routed_model.get_decoder()._forward_hooks) == hooks and not any(w.done for w in writings)


def test_continuations_of_unequal_length(routed_model: Any, word_tokenizer: Any) -> None:
    """One that ends early leaves the turns to the others."""
    prompt = torch.tensor([word_tokenizer("the router decides")["input_ids"]])
    alone = Writing(word_tokenizer, 0.2)
    write_in_turns(routed_model, [alone], prompt, 8, lambda: None)
    eos = routed_model.generation_config.eos_token_id
    routed_model.generation_config.eos_token_id = alone.ids[2]
    try:
        both = [Writing(word_tokenizer, 0.2), Writing(word_tokenizer, 0.97)]
        write_in_turns(routed_model, both, prompt, 8, lambda: None)
    finally:
        routed_model.generation_config.eos_token_id = eos
    assert both[0].ids == alone.ids[: alone.ids.index(alone.ids[2]) + 1] and all(w.done for w in both)
    assert routed_model.mod.thresholds[1] == 0.5


def test_compare_stops_and_fails_without_a_trace(routed_model: Any, word_tokenizer: Any) -> None:
    widget = Compare(routed_model, word_tokenizer, "the router", max_new_tokens=4)
    sides = widget.run() and widget.sides
    with pytest.raises(ModlabError, match="at least 0 and below 1"):
        send(widget, type="generate", prompt="the", ps=[0.5, 1.5], max_new_tokens=6, id=1)
    with pytest.raises(ModlabError, match="empty"):
        send(widget, type="generate", prompt="", ps=[0.5, 0.6], max_new_tokens=6, id=2)
    widget._handle_custom_msg(
        {"type": "generate", "prompt": "the", "ps": [0.2, 0.8], "max_new_tokens": 1500, "id": 3}, []
    )
    time.sleep(0.5)
    widget.cancel()
    assert widget.wait(20) and widget.job["state"] == "cancelled"
    assert widget.sides == sides and routed_model.mod.thresholds[1] == 0.5
    with pytest.raises(ModlabError):
        Compare(routed_model, word_tokenizer, "the", p=(1.0, 0.5))


def test_frontier_offers_what_was_measured(routed_model: Any) -> None:
    widget = Frontier(sweep(), routed_model, {"dense": {"kv_bytes": 1000, "loss": 1.9}})
    (line,) = widget.lines
    assert [d["at"] for d in line["points"]] == [0.2, 0.5, 0.8] and widget.threshold == 0.5
    assert [axis["key"] for axis in line["costs"]] == ["kv_bytes", "prefill_ms"]  # a gap: not offered
    assert [axis["key"] for axis in line["qualities"]] == ["loss"] and line["dial"] == "threshold"
    send(widget, type="set", p=0.7, id=1)
    assert routed_model.mod.thresholds[1] == 0.7 == widget.applied
    assert Frontier(sweep(), routed_model).threshold == 0.8 and Frontier(sweep()).threshold == 0.5
    widget.choose(0.3)
    assert routed_model.mod.thresholds[1] == 0.3 == widget.threshold
    with pytest.raises(ModlabError, match="at least 0 and below 1"):
        widget.choose(1.0)
    with pytest.raises(ModlabError, match="decode_ms.*not measured; there is prefill_ms"):
        Frontier(sweep(), time="decode_ms")
    with pytest.raises(ModlabError, match="no column loss"):
        Frontier(sweep().drop(columns="loss"))
    with pytest.raises(ModlabError, match="two thresholds"):
        Frontier(sweep()[:1])
    with pytest.raises(ModlabError, match="Nothing to draw"):
        Frontier()


def test_frontier_against_times_of_another_machine() -> None:
    frame = pd.DataFrame({"keep_ratio": [0.2, 1.0], "dense_ms": [6.0, 6.0], "mod_ms": [3.0, 7.0]})
    frame.attrs["origin"] = "decode on a machine"
    widget = Frontier(sweep(), references={"dense": {"loss": 1.9}}, elsewhere={"another": frame})
    (line,) = widget.lines
    axis = line["costs"][-1]
    assert axis["title"] == "another" and "decode on a machine" in axis["note"]
    # keep ratios 0.8, 0.4, and 0.1, which is less than was measured there
    assert [point[axis["key"]] for point in line["points"]] == pytest.approx([6.0, 4.0, 3.0])
    assert line["references"][0][axis["key"]] == 6.0
    with pytest.raises(ModlabError, match="no column mod_ms"):
        Frontier(sweep(), elsewhere={"another": frame.drop(columns="mod_ms")})


def test_a_real_models_line_is_the_committed_one(routed_model: Any) -> None:
    frames = published.real_models()
    widget = Frontier(sweep(), routed_model, real=frames)
    assert [line["name"] for line in widget.lines] == ["this machine", *frames]
    for line, frame in zip(widget.lines[1:], frames.values(), strict=True):
        assert line["dial"] == "saving" and line["note"] == frame.attrs["origin"]
        assert [1 / d["kv_share"] for d in line["points"]] == pytest.approx(frame.kv_saving.tolist())
        for axis in line["qualities"]:
            assert [d[axis["key"]] for d in line["points"]] == frame[axis["key"]].tolist()
            assert line["references"][0][axis["key"]] == 0  # the dense model loses nothing against itself
    widget.line = 1  # its point is read, and no threshold of the model here
    assert "NVIDIA" not in widget._svg() and "KL to the dense model" in widget._svg()


def test_times_of_a_real_model_lie_between_those_measured() -> None:
    frame = pd.DataFrame({"kv_saving": [2.0, 4.0, 16.0], "kl": [0.01, 0.02, 0.1]})
    once = pd.DataFrame({"kv_saving": [4.0], "dense_ms": [10.0], "mod_ms": [4.0]})
    once.attrs["origin"] = "decode on a machine"
    whole = pd.DataFrame({"kv_saving": [1.0, 4.0], "dense_ms": [10.0, 10.0], "mod_ms": [12.0, 4.0]})
    (line,) = Frontier(real={"a model": frame}, real_times={"once": once, "whole": whole}).lines
    first, second = (axis["key"] for axis in line["costs"] if axis["unit"] == "ms")
    # at half the bytes a third of the way from a quarter to all; beyond what was measured, no guess
    assert [d[first] for d in line["points"]] == pytest.approx([6.0, 4.0, 4.0])
    assert [d[second] for d in line["points"]] == pytest.approx([4 + 8 / 3, 4.0, 4.0])
    assert (
        "decode on a machine" in line["costs"][1]["note"] and "measured at 4.0x" in line["costs"][1]["note"]
    )
    assert line["references"][0][first] == 10.0
    with pytest.raises(ModlabError, match="'once' have no column mod_ms.*kv_latencies"):
        Frontier(real={"a model": frame}, real_times={"once": once.drop(columns="mod_ms")})


def test_what_the_routers_were_trained_for_goes_to_the_browser(
    routed_model: Any, word_tokenizer: Any
) -> None:
    views = [
        lambda: modlab.widgets.explore(routed_model, word_tokenizer, TEXT),
        lambda: Thresholds(routed_model, word_tokenizer, TEXT),
        lambda: modlab.widgets.CacheView(routed_model, word_tokenizer, TEXT),
        lambda: Compare(routed_model, word_tokenizer, "the router"),
        lambda: Frontier(sweep(), routed_model),
    ]
    assert all(make().summary["trained"] == {} for make in views)  # nothing is known of these routers
    routed_model.mod.trained = known = Trained(savings={2.0: 0.5, 4.0: 0.75})
    for make in views:
        told = make().summary["trained"]
        assert told["largest"] == 0.75 and known.warning_for(0.8) == f"threshold 0.8 {told['beyond']}"
    assert not known.warning_for(0.75)
    # a threshold that is known, but that the training did not come to
    routed_model.mod.trained = known = Trained(savings={2.0: 0.5, 4.0: 0.75}, reached=2.0)
    for make in views:
        told = make().summary["trained"]
        assert told["largest"] == 0.5 and known.warning_for(0.75) == f"threshold 0.75 {told['beyond']}"
        assert "that of 2x" in told["beyond"]


def test_each_has_a_page_and_a_picture(routed_model: Any, word_tokenizer: Any) -> None:
    compare = Compare(routed_model, word_tokenizer, "the router", max_new_tokens=4)
    compare.run()
    aggregate = modlab.aggregate_routing(routed_model, word_tokenizer, [TEXT], progress=False)
    widgets = [
        CellFlip(routed_model, word_tokenizer, TEXT),
        Thresholds(routed_model, word_tokenizer, TEXT),
        Compare(routed_model, word_tokenizer, "nothing yet"),
        compare,
        Frontier(sweep(), routed_model, {"dense": {"kv_bytes": 1000, "loss": 1.9}}),
        ClassHeatmap(aggregate),
        TokenPath(make_trace()),
    ]
    for widget in widgets:
        data, _ = widget._repr_mimebundle_()
        assert data["image/svg+xml"].startswith("<svg"), widget
        html = widget.to_html()
        assert html.startswith("<!doctype html>") and f'const VIEW = "{widget.view}"' in html
        assert '"can_run": false' in html and "http://www.w3.org" in html and "https://" not in html
        assert len(html) < 200_000


def test_classes_are_the_aggregates(routed_model: Any, word_tokenizer: Any) -> None:
    aggregate = modlab.aggregate_routing(routed_model, word_tokenizer, [TEXT], progress=False)
    widget = aggregate.widget()
    frame = aggregate.by_class()
    for row in widget.classes:
        assert row["tokens"] == frame.tokens[row["name"]]
        assert row["kept"] == pytest.approx(
            frame.loc[row["name"], ["layer_1", "layer_3", "layer_5"]].tolist()
        )
    assert widget.summary["tokens"] == aggregate.tokens


def test_classes_of_gates_a_kv_head_are_shares_of_a_layer(word_tokenizer: Any) -> None:
    config = modlab.MoDConfig(skip="kv", layers="alternate", keep_recent=4, gates="kv_head")
    model = scatter_gates(modlab.convert(dense_llama(), config))
    trace = modlab.trace(model, word_tokenizer, TEXT)
    widget = modlab.aggregate_routing(model, word_tokenizer, [TEXT], progress=False).widget()
    heads = len(trace.layers) // len(set(trace.layers))
    assert heads > 1 and widget.layers == sorted(set(trace.layers))  # a column a layer
    by_layer = trace.keep.reshape(len(widget.layers), heads, -1).mean(axis=(1, 2))
    tokens = np.asarray([row["tokens"] for row in widget.classes])
    kept = np.asarray([row["kept"] for row in widget.classes])
    assert (tokens[:, None] * kept).sum(axis=0) / tokens.sum() == pytest.approx(by_layer)
    assert by_layer.min() > 0 and by_layer.max() < 1


def test_two_widgets_of_one_model_do_not_mix(routed_model: Any, word_tokenizer: Any) -> None:
    thresholds, compare = (
        Thresholds(routed_model, word_tokenizer, TEXT),
        Compare(routed_model, word_tokenizer, "the", max_new_tokens=8),
    )
    alone = {}
    for p in (0.4, 0.7):
        thresholds.apply(p)
        alone[p] = thresholds.trace.keep
    done = threading.Event()

    def generate() -> None:
        while not done.is_set():
            compare.run()

    thread = threading.Thread(target=generate)
    thread.start()
    try:
        for p in (0.4, 0.7, 0.4):
            thresholds.apply(p)
            assert np.array_equal(thresholds.trace.keep, alone[p])
    finally:
        done.set()
        thread.join(60)
