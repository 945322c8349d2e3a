"""Another text in a widget: what shows is what the model does with it, and linked views follow."""

from typing import Any

import numpy as np
import pytest

import modlab
from modlab.errors import ModlabError
from modlab.widgets import CellFlip, RoutingHeatmap, Thresholds, TokenText, explore, link
from modlab.widgets.measured import fitting
from modlab.widgets.pictures.page import group_of
from tests.helpers.tokenizers import make_tokenizer

TEXT = "the router decides which token runs and which token skips, and so on to the end of the line. " * 3
OWN = "My grandmother kept bees behind the house, 日本 🙂, and she asked me to hold the smoker."


def send(widget: Any, **content: Any) -> None:
    """A message as the browser sends it, and the end of what it asks for."""
    widget._handle_custom_msg(content, [])
    assert widget.wait(60)


@pytest.mark.parametrize("kind", [explore, Thresholds, CellFlip])
def test_another_text_is_run(kind: Any, routed_model: Any, word_tokenizer: Any) -> None:
    widget = kind(routed_model, word_tokenizer, TEXT)
    widget.cursor, widget.locked, runs = 9, True, widget.summary["run"]
    modlab.set_threshold(routed_model, 0.6)
    send(widget, type="text", text=OWN, id=1)
    want = modlab.trace(routed_model, word_tokenizer, OWN)
    assert widget.text == OWN and widget.tokens == want.tokens and widget.text_note == ""
    assert np.array_equal(widget.trace.keep, want.keep) and widget.summary["run"] > runs
    assert widget.summary["loss"] == pytest.approx(want.mean_loss)
    assert widget.threshold == pytest.approx(0.6) and widget.group == group_of(want)
    assert (widget.cursor, widget.locked, widget.job["state"]) == (-1, False, "idle")


def test_flips_belong_to_their_text(routed_model: Any, word_tokenizer: Any) -> None:
    widget = CellFlip(routed_model, word_tokenizer, TEXT)
    widget.flip(1, 30)
    widget.wait(60)
    widget.set_text(OWN)
    widget.wait(60)
    assert widget.flips == [] and widget.effect["others"] == 0
    assert widget.effect["at"] == len(widget.tokens) - 1
    assert widget.effect["loss"] == widget.effect["loss_before"] == pytest.approx(widget.trace.mean_loss)
    assert len(widget.deltas) == 4 * len(widget.tokens)


def test_a_text_that_cannot_be_run_changes_nothing(routed_model: Any, word_tokenizer: Any) -> None:
    widget = explore(routed_model, word_tokenizer, TEXT)
    before = widget.gates
    with pytest.raises(ModlabError, match="empty"):
        send(widget, type="text", text="", id=1)
    assert widget.job["state"] == "failed" and widget.job["error"].startswith("This text could not be run")
    assert widget.text == TEXT and widget.gates == before
    widget.set_text(OWN)
    assert widget.wait(60) and widget.job["error"] == "" and widget.text == OWN


def test_a_run_of_a_text_can_be_stopped(routed_model: Any, word_tokenizer: Any) -> None:
    widget = explore(routed_model, word_tokenizer, TEXT)
    layer = routed_model.get_decoder().layers[2]
    hook = layer.register_forward_pre_hook(lambda *_: widget.cancel())
    try:
        send(widget, type="text", text=OWN, id=1)
    finally:
        hook.remove()
    assert widget.job["state"] == "cancelled" and widget.text == TEXT and "".join(widget.tokens) == TEXT


def test_a_text_that_is_too_long_is_cut_and_says_so(make_llama: Any, word_tokenizer: Any) -> None:
    model = modlab.convert(make_llama(max_position_embeddings=64))
    widget = explore(model, word_tokenizer, TEXT[:40])
    widget.set_text(TEXT * 20)
    assert widget.wait(60)
    total = len(word_tokenizer(TEXT * 20, verbose=False)["input_ids"])
    assert len(widget.tokens) <= 64 and (TEXT * 20).startswith(widget.text) and len(widget.text) > 40
    assert widget.text_note == (
        f"These are the first {len(widget.tokens)} of {total:,} tokens: this model reads no more."
    )
    widget.set_text(OWN[:30])
    assert widget.wait(60) and widget.text_note == ""


@pytest.mark.parametrize("cut", [5, 64, 10_000])
def test_what_is_cut_fits(make_llama: Any, word_tokenizer: Any, cut: int) -> None:
    model = make_llama(max_position_embeddings=cut)
    shown, note = fitting(model, word_tokenizer, OWN * 40)
    assert len(word_tokenizer(shown, verbose=False)["input_ids"]) <= cut
    assert (OWN * 40).startswith(shown) and bool(note) == (shown != OWN * 40)


def test_the_loss_is_told_against_nothing_skipped(routed_model: Any, word_tokenizer: Any) -> None:
    widget = explore(routed_model, word_tokenizer, TEXT)
    for text in (TEXT, OWN):
        widget.set_text(text)
        widget.wait(60)
        with modlab.routing_override(routed_model, lambda layer, gate, at: gate > -1):
            want = modlab.trace(routed_model, word_tokenizer, text).mean_loss
        assert widget.summary["open_loss"] == pytest.approx(want) != widget.summary["loss"]


def test_the_curve_is_measured_anew_for_another_text(routed_model: Any, word_tokenizer: Any) -> None:
    def sweep(text: str) -> Any:
        thresholds = [0.0, 0.4, 0.6]
        return modlab.sweep(
            routed_model, word_tokenizer, [text], thresholds=thresholds, repeats=0, progress=False
        )

    widget = explore(routed_model, word_tokenizer, TEXT, sweep(TEXT))
    widget.set_text(OWN)
    assert widget.wait(60)
    want = sweep(OWN)
    assert [point["p"] for point in widget.points] == [0.0, 0.4, 0.6]
    assert [point["loss"] for point in widget.points] == pytest.approx(want.loss.tolist())
    assert [point["kv_bytes"] for point in widget.points] == want.kv_bytes.tolist()
    assert set(routed_model.mod.thresholds.values()) == {0.5}


def test_a_curve_can_be_asked_for(routed_model: Any, word_tokenizer: Any) -> None:
    widget = explore(routed_model, word_tokenizer, TEXT)
    assert widget.points == []
    send(widget, type="curve", id=1)
    assert [point["p"] for point in widget.points] == pytest.approx([i / 10 for i in range(10)])
    assert widget.points[0]["loss"] == pytest.approx(widget.summary["open_loss"])
    widget.measure_curve([0.3, 0.5])
    assert [point["p"] for point in widget.points] == [0.3, 0.5]
    assert widget.points[1]["loss"] == pytest.approx(widget.summary["loss"])


def test_the_explorer_finds_a_threshold_for_a_budget(routed_model: Any, word_tokenizer: Any) -> None:
    widget = explore(routed_model, word_tokenizer, TEXT)
    length = len(widget.tokens)
    wanted = 0.8 * widget.summary["dense_bytes"]
    send(widget, type="calibrate", kv_mib=wanted / 2**20, context=length, id=2)
    assert widget.summary["kv_bytes"] == pytest.approx(wanted, rel=0.02)
    assert widget.runs[-1]["p"] == widget.threshold != 0.5


def test_linked_views_follow_the_text(routed_model: Any, word_tokenizer: Any) -> None:
    explorer = explore(routed_model, word_tokenizer, TEXT)
    flip, words = CellFlip(routed_model, word_tokenizer, TEXT), TokenText(explorer.trace)
    alone = RoutingHeatmap(explorer.trace)
    links = link(explorer, flip, words, thresholds=False)
    explorer.set_text(OWN)
    assert explorer.wait(60) and flip.wait(60)
    assert explorer.tokens == flip.tokens == words.tokens != alone.tokens
    assert explorer.group == flip.group == words.group != alone.group
    assert flip.trace.keep.tolist() == words.trace.keep.tolist() == explorer.trace.keep.tolist()
    flip.set_text(TEXT)  # the other way round
    assert flip.wait(60) and explorer.wait(60) and explorer.text == TEXT and "".join(words.tokens) == TEXT
    for made in links:
        made.unlink()
    explorer.set_text(OWN)
    assert explorer.wait(60) and flip.text == TEXT


def test_models_with_other_tokens_follow_too(make_routed_model: Any, word_tokenizer: Any) -> None:
    explorer = explore(make_routed_model(), word_tokenizer, TEXT)
    other = explore(make_routed_model(), make_tokenizer(270), TEXT)
    link(explorer, other)
    explorer.set_text(OWN)
    assert explorer.wait(60) and other.wait(60)
    assert other.text == OWN and other.tokens != explorer.tokens and other.group == explorer.group
