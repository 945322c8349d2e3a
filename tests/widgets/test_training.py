"""The training panel without a browser: pause, resume and stop, and the run is the one that `train` makes."""

import time
from typing import Any

import numpy as np
import pytest
import torch

import modlab
from modlab.errors import ModlabError
from modlab.measure import evaluate
from modlab.widgets import TrainingPanel
from modlab.widgets.model_access import lock_of
from modlab.widgets.training import ROWS, thinned


def batches(count: int = 400) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [{"input_ids": torch.randint(3, 500, (2, 32), generator=generator)} for _ in range(count)]


def config(**changes: Any) -> modlab.TrainConfig:
    return modlab.TrainConfig(**{"steps": 12, "log_every": 2, "lr": 1e-3, **changes})


def until(condition: Any, seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.01)


def weights(model: Any) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_a_paused_run_is_the_same_run(make_routed_model: Any) -> None:
    alone = make_routed_model()
    want = modlab.train(alone, batches(), config())
    model = make_routed_model()
    panel = TrainingPanel(model, batches(), config())
    assert panel.progress["state"] == "ready" and panel.progress["text"] == "A run of 12 steps."
    panel.start()
    panel.pause()
    until(lambda: panel.progress["state"] == "paused")
    steps = panel.history
    with lock_of(model):  # nothing trains now, and the model can be used
        before = weights(model)
        evaluate(model, batches(1))
        time.sleep(0.2)
        assert torch.equal(weights(model), before) and len(panel.history) == len(steps)
    assert panel.wait(0.1) is None and panel.running
    panel.resume()
    result = panel.wait(60)
    assert result.stopped == "finished" and not panel.running and panel.progress["state"] == "finished"
    assert panel.progress["text"].endswith('Not saved yet: model.save_pretrained("my-model").')
    assert torch.equal(weights(model), weights(alone))
    assert result.history.loss.tolist() == want.history.loss.tolist()
    assert panel.history.step.tolist() == [2, 4, 6, 8, 10, 12]


def test_stop_and_train_on(make_routed_model: Any, tmp_path: Any) -> None:
    alone = make_routed_model()
    modlab.train(alone, batches(), config(steps=40, out=tmp_path / "alone"))
    model = make_routed_model()
    panel = TrainingPanel(model, batches(), config(steps=40, out=tmp_path / "run"))
    panel.start()
    until(lambda: len(panel.history) >= 2)
    panel._handle_custom_msg({"type": "stop"}, [])
    result = panel.wait(60)
    assert result.interrupted and 4 <= result.steps < 40 and panel.progress["state"] == "stopped"
    panel.start()
    result = panel.wait(60)
    assert result.stopped == "finished" and torch.equal(weights(model), weights(alone))
    assert panel.history.step.tolist() == list(range(2, 41, 2))


def test_a_paused_run_can_be_stopped(make_routed_model: Any) -> None:
    panel = TrainingPanel(make_routed_model(), batches(), config(steps=300))
    panel.start()
    panel.pause()
    until(lambda: panel.progress["state"] == "paused")
    panel.stop()
    assert panel.wait(30).interrupted


def test_the_browser_gets_curves_and_few_messages(make_routed_model: Any) -> None:
    panel = TrainingPanel(make_routed_model(), batches(), config(steps=120, log_every=1))
    told: list[float] = []
    panel.observe(lambda change: told.append(time.monotonic()), "progress")
    start = time.monotonic()
    panel.start()
    panel.wait(120)
    seconds = time.monotonic() - start
    assert len(told) <= seconds / 0.25 + 5
    table = np.frombuffer(panel.series, "<f4").reshape(len(panel.columns), -1)
    data = dict(zip(panel.columns, table, strict=True))
    assert data["step"].tolist() == list(range(1, 121)) and {"loss", "keep_1", "keep_3", "keep_5"} <= set(
        data
    )
    assert data["loss"] == pytest.approx(panel.history.loss.to_numpy(), rel=1e-6)
    assert panel._svg().startswith("<svg") and 'const VIEW = "training"' in panel.to_html()


def test_a_run_that_fails_says_so(make_routed_model: Any) -> None:
    model = make_routed_model()
    panel = TrainingPanel(model, batches(), config(lr=1e9, warmup=0, max_grad_norm=1e9))
    panel.start()
    with pytest.raises(ModlabError, match="not finite"):
        panel.wait(60)
    assert panel.progress["state"] == "failed" and "not finite" in panel.progress["error"]


def test_misuse_is_explained(make_routed_model: Any) -> None:
    panel = TrainingPanel(make_routed_model(), batches(), config(steps=300))
    with pytest.raises(ModlabError, match=r"start\(\)"):
        panel.wait()
    panel.start()
    with pytest.raises(ModlabError, match="going on already"):
        panel.start()
    panel._handle_custom_msg({"type": "start"}, [])  # from the browser: shown, not raised
    assert "going on already" in panel.progress["error"]
    panel.stop()
    panel.wait(30)
    with pytest.raises(ModlabError, match="How long"):
        TrainingPanel(make_routed_model(), batches(), modlab.TrainConfig())


def test_thinned_keeps_means() -> None:
    table = np.arange(3000, dtype=float).reshape(2, 1500)
    table[1, :4] = np.nan
    small = thinned(table, ROWS)
    assert small.shape[1] <= ROWS and small[0, 0] == pytest.approx(1.5) and np.isnan(small[1, 0])
    assert not np.isnan(small[1, 1:]).any() and thinned(small, ROWS) is small
