"""A widget computes in its thread while a cell computes in another, on the same model: neither notices."""

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch

import modlab
from modlab.widgets import CellFlip, Compare, Thresholds, explore
from modlab.widgets.jobs import Cancelled, Job
from modlab.widgets.model_access import using

TEXT = "the router decides which token runs and which token skips, and so on to the end of the line. " * 3


def prompt(tokenizer: Any) -> torch.Tensor:
    return torch.tensor([tokenizer(TEXT)["input_ids"][:40]])


def written(model: Any, tokenizer: Any) -> list[int]:
    """What a cell generates."""
    ids = prompt(tokenizer)
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)
    return out[0].tolist()


class InTheMiddle:
    """Runs `work` in another thread, and waits for its end, in the middle of the calling thread's forward:
    the worst moment for whatever the two share."""

    def __init__(self, model: Any, work: Callable[[], Any]) -> None:
        self.model, self.work, self.here = model, work, threading.get_ident()
        self.ran, self.error = 0, None

    def __enter__(self) -> "InTheMiddle":
        self.hook = self.model.get_decoder().layers[2].register_forward_pre_hook(self.meet)
        return self

    def __exit__(self, *_: Any) -> None:
        self.hook.remove()

    def meet(self, *_: Any) -> None:
        if threading.get_ident() != self.here or self.ran >= 3:
            return
        self.ran += 1
        thread = threading.Thread(target=self.run)
        thread.start()
        thread.join(120)

    def run(self) -> None:
        try:
            self.work()
        except BaseException as error:
            self.error = error


def curve(model: Any, tokenizer: Any) -> Callable[[], Any]:
    widget = explore(model, tokenizer, TEXT)
    return lambda: widget.measure_curve([0.0, 0.2, 0.8])


def flips(model: Any, tokenizer: Any) -> Callable[[], Any]:
    widget = CellFlip(model, tokenizer, TEXT)

    def work() -> None:
        widget.set_flips({(1, 5): True, (3, 20): False})
        widget.wait(60)

    return work


def sides(model: Any, tokenizer: Any) -> Callable[[], Any]:
    widget = Compare(model, tokenizer, "the router decides", p=(0.2, 0.8), max_new_tokens=4)
    return widget.run


def another_text(model: Any, tokenizer: Any) -> Callable[[], Any]:
    widget = explore(model, tokenizer, TEXT)

    def work() -> None:
        widget.set_text("another text, " * 8)
        widget.wait(60)

    return work


def impossible(model: Any, tokenizer: Any) -> Callable[[], Any]:
    """A search that fails half-way."""
    widget = Thresholds(model, tokenizer, TEXT)

    def work() -> None:
        with pytest.raises(modlab.ModlabError):
            widget.calibrate(keep_ratio=0.0001)

    return work


@pytest.mark.parametrize("make", [curve, flips, sides, another_text, impossible])
def test_a_cell_writes_the_same_tokens_while_a_widget_computes(
    routed_model: Any, word_tokenizer: Any, make: Callable[..., Callable[[], Any]]
) -> None:
    alone = written(routed_model, word_tokenizer)
    with InTheMiddle(routed_model, make(routed_model, word_tokenizer)) as meeting:
        together = written(routed_model, word_tokenizer)
    assert meeting.ran == 3 and meeting.error is None
    assert together == alone
    assert written(routed_model, word_tokenizer) == alone  # nothing stayed installed


def test_a_widget_measures_the_same_while_a_cell_generates(routed_model: Any, word_tokenizer: Any) -> None:
    widget = explore(routed_model, word_tokenizer, TEXT)
    widget.measure_curve([0.0, 0.3, 0.7])
    alone = widget.points

    def cell() -> None:
        written(routed_model, word_tokenizer)

    with InTheMiddle(routed_model, cell) as meeting:
        widget.measure_curve([0.0, 0.3, 0.7])
    assert meeting.ran == 3 and meeting.error is None and widget.points == alone


def test_a_stopped_job_does_not_stop_a_cell(routed_model: Any, word_tokenizer: Any) -> None:
    told: list[dict[str, Any]] = []
    job, entered, leave = Job(1, told.append), threading.Event(), threading.Event()
    ended: list[str] = []

    def work() -> None:
        try:
            with using(routed_model, job, "Running the text"):
                entered.set()
                leave.wait(60)
                routed_model(prompt(word_tokenizer))
        except Cancelled:
            ended.append("cancelled")

    thread = threading.Thread(target=work)
    thread.start()
    assert entered.wait(60)
    before = len(told)
    written(routed_model, word_tokenizer)
    assert len(told) == before  # a cell's layers are no progress of the job
    job.cancel()
    written(routed_model, word_tokenizer)  # and nobody asked to stop the cell
    leave.set()
    thread.join(60)
    assert ended == ["cancelled"]
    assert not any(layer._forward_pre_hooks for layer in routed_model.get_decoder().layers)


class Interrupted:
    """Raises KeyboardInterrupt, as Ctrl-C does, when this thread's forwards come to a layer the nth time."""

    def __init__(self, model: Any, after: int) -> None:
        self.left = after
        self.hook = model.get_decoder().layers[4].register_forward_pre_hook(self.meet)

    def meet(self, *_: Any) -> None:
        self.left -= 1
        if self.left < 0:
            self.hook.remove()
            raise KeyboardInterrupt


@pytest.mark.parametrize("after", [0, 1, 2])
@pytest.mark.parametrize(
    "name", ["run", "measure_curve", "calibrate", "compare", "flip", "layers"], ids=lambda name: name
)
def test_ctrl_c_leaves_thresholds_and_overrides_as_they_were(
    routed_model: Any, word_tokenizer: Any, name: str, after: int
) -> None:
    explorer = explore(routed_model, word_tokenizer, TEXT)
    layers = Thresholds(routed_model, word_tokenizer, TEXT)
    flip = CellFlip(routed_model, word_tokenizer, TEXT)
    work: dict[str, Callable[[], Any]] = {
        "run": lambda: explorer.run(0.8),
        "measure_curve": lambda: explorer.measure_curve([0.0, 0.2, 0.8]),
        "calibrate": lambda: layers.calibrate(keep_ratio=0.3),
        "compare": Compare(routed_model, word_tokenizer, TEXT, p=(0.2, 0.8), max_new_tokens=4).run,
        "flip": lambda: flip._run({(1, 5): True}, -1, None),
        "layers": lambda: layers.apply({1: 0.2, 3: 0.8, 5: 0.9}),
    }
    thresholds, alone = dict(routed_model.mod.thresholds), written(routed_model, word_tokenizer)
    if name in ("run", "flip", "layers"):
        after = 0  # one forward
    with pytest.raises(KeyboardInterrupt):
        Interrupted(routed_model, after)
        work[name]()
    assert routed_model.mod.thresholds == thresholds
    assert written(routed_model, word_tokenizer) == alone
    assert explorer.wait(1) and layers.wait(1) and flip.wait(1)
