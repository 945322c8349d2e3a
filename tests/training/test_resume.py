"""Resuming: exact, or refused with what differs."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from datasets import Dataset
from torch.optim.optimizer import register_optimizer_step_pre_hook
from transformers import AutoModelForCausalLM

import modlab
from modlab.errors import ModlabError
from modlab.training.checkpoints import checkpoints
from modlab.training.folder import RunFolder
from modlab.training.loop import TrainConfig, train
from tests.helpers.launch import launch
from tests.helpers.models import alternate_layers, scatter_gates
from tests.helpers.runs import GLOBAL_BATCH, began, from_step, model_in_bf16, streamed
from tests.helpers.runs import rows as rows_of_runs
from tests.helpers.training import same_weights, settings

WORKER = Path(__file__).with_name("resumed_in_processes.py")


@pytest.mark.parametrize("kind", ["dense", "mod", "accumulated"])
def test_resume_is_exact(make: Callable[..., Any], rows: torch.Tensor, tmp_path: Path, kind: str) -> None:
    """10 steps = 5 + 5 from a checkpoint, bit for bit, with dropout and a log window across the
    checkpoint."""
    more = {
        "dense": {},
        "mod": {"keep_ratio": 0.4, "what_if": 0.5, "router_lr": 1e-2, "ramp": 0.5},
        "accumulated": {"grad_accum": 2, "batch_size": 4},
    }[kind]
    mod = alternate_layers(init_gate=0.6) if kind == "mod" else None
    config = settings(save_every=5, log_every=2, **more)
    whole = train(make(mod=mod, attention_dropout=0.2), rows, TrainConfig(out=tmp_path / "whole", **config))

    short = TrainConfig(out=tmp_path / "cut", **config | {"max_minutes": 1e-9})
    cut = train(make(mod=mod, attention_dropout=0.2), rows, short)
    assert (cut.stopped, cut.steps) == ("time", 1)
    middle = make(seed=7, mod=mod, attention_dropout=0.2)
    path = tmp_path / "whole" / "checkpoints" / "step_5"
    resumed = train(middle, rows, TrainConfig(out=tmp_path / "again", resume=path, **config))
    other = make(seed=8, mod=mod, attention_dropout=0.2)
    last = train(other, rows, TrainConfig(out=tmp_path / "cut", resume="auto", **config))

    assert same_weights(whole.model, resumed.model)
    assert same_weights(whole.model, last.model)
    keys = [c for c in whole.history if c not in ("tokens_per_s", "seconds")]
    assert last.history[keys].equals(whole.history[keys])
    assert resumed.history[keys].equals(whole.history[keys].iloc[2:].reset_index(drop=True))


def test_several_processes_take_a_run_up_as_one_does(tmp_path: Path) -> None:
    """By as many as before, dropout included: two bit for bit, four but for rounding, for DDP sums gradients
    in another order after the first step of a call. That of two by four, that of four by one. Rows that come
    once are seen once, by all together as by one."""
    wanted = train(model_in_bf16(), rows_of_runs(), began(tmp_path / "one", GLOBAL_BATCH)).history
    settings = dataclasses.replace(began(tmp_path / "stream", 1), grad_accum=GLOBAL_BATCH)
    of_stream = train(model_in_bf16(), streamed(1), settings)
    assert (of_stream.stopped, of_stream.steps) == ("data", 3)
    for processes, first in ((2, 1), (4, 3)):
        out = tmp_path / str(processes)
        if processes == 4:
            from_step(2, tmp_path / "2" / "run", out / "run")
        out.mkdir(exist_ok=True)
        launch(WORKER, processes, out)
        for rank in range(processes):
            found = json.loads((out / f"rank_{rank}.json").read_text())
            assert found["off by"] <= (0.0 if processes == 2 else 1e-6)  # a step is 3e-3
            assert_same_lines(found["run"], wanted[wanted["step"] >= first])
            assert_same_lines(found["stream"], of_stream.history)
    settings = began(from_step(3, tmp_path / "4" / "run", tmp_path / "again"), GLOBAL_BATCH)
    last = train(model_in_bf16(), rows_of_runs(), settings).history
    assert_same_lines(last.to_dict("list"), wanted[wanted["step"] > 3])


def assert_same_lines(found: dict[str, list[Any]], expected: pd.DataFrame) -> None:
    """But for rounding and times."""
    assert found["step"] == expected["step"].tolist()
    for name in ("loss", "keep_ratio", "objective", "grad_norm", "tokens", "lr"):
        assert found[name] == pytest.approx(expected[name].tolist(), rel=2e-3, abs=1e-5), name


def test_finished_run_resumes_to_itself_and_can_be_extended(
    make: Callable[..., Any], rows: torch.Tensor, tmp_path: Path
) -> None:
    config = settings(steps=4, save_every=2)
    first = train(make(), rows, TrainConfig(out=tmp_path / "run", **config))
    again = train(make(seed=3), rows, TrainConfig(out=tmp_path / "run", resume="auto", **config))
    assert same_weights(first.model, again.model)
    assert again.history.equals(first.history)
    longer = train(
        make(seed=4), rows, TrainConfig(out=tmp_path / "run", resume="auto", **config | {"steps": 6})
    )
    assert longer.history["step"].tolist() == [1, 2, 3, 4, 5, 6]


def test_a_finished_budget_run_resumes_to_itself(
    make: Callable[..., Any], rows: torch.Tensor, tmp_path: Path
) -> None:
    config = settings(steps=13, objective="budget", keep_ratio=0.4, ramp=0.0, log_every=10, save_every=13)
    found = []
    for _ in range(2):
        model = make(mod=modlab.MoDConfig(skip="layer", layers=[1, 2]))
        scatter_gates(model)
        train(model, rows, TrainConfig(out=tmp_path / "run", resume="auto", **config))
        saved = json.loads((tmp_path / "run" / "model" / "modlab_config.json").read_text())
        found.append((dict(model.mod.thresholds), saved))
    assert found[0] == found[1]
    assert set(found[0][0].values()) != {0.5}


def test_a_calibrated_run_resumes_to_itself_and_goes_on_from_what_was_trained(
    make: Callable[..., Any], rows: torch.Tensor, tmp_path: Path
) -> None:
    def run(out: str, steps: int, model: Any) -> Any:
        config = settings(steps=steps, keep_ratio=0.5, calibrate=True, save_every=3, ramp=0.0, warmup=0.0)
        config |= {"min_lr_ratio": 1.0, "out": tmp_path / out, "resume": "auto"}
        return train(model, rows, TrainConfig(**config)).model

    def fresh() -> Any:
        model = make(mod=alternate_layers())
        scatter_gates(model)
        return model

    first = run("a", 6, fresh())
    assert same_weights(run("a", 6, fresh()), first)  # nothing left to train: calibrated again
    assert same_weights(run("a", 9, fresh()), run("b", 9, fresh()))


def test_refuses_a_folder_that_is_taken(make: Callable[..., Any], rows: torch.Tensor, tmp_path: Path) -> None:
    out = tmp_path / "run"
    train(make(), rows, TrainConfig(out=out, **settings(steps=2, save_every=1)))
    log = (out / "log.jsonl").read_text()
    with pytest.raises(ModlabError, match="already holds a run.*resume='auto'"):
        train(make(), rows, TrainConfig(out=out, **settings(steps=2)))
    with pytest.raises(ModlabError, match=r"seed=1 \(was 0\)"):
        train(make(), rows, TrainConfig(out=out, resume="auto", **settings(steps=4, seed=1)))
    with pytest.raises(ModlabError, match="no folder"):
        train(make(), rows, TrainConfig(out=out, resume=out / "step_99", **settings(steps=4)))
    with pytest.raises(ModlabError, match="belongs to another model"):
        train(make(hidden_size=16), rows, TrainConfig(out=out, resume="auto", **settings(steps=4)))
    assert (out / "log.jsonl").read_text() == log
    (tmp_path / "file").write_text("")
    with pytest.raises(ModlabError, match="is a file"):
        train(make(), rows, TrainConfig(out=tmp_path / "file", **settings()))


def groups_of_steps(**expected: Any) -> Any:
    """A context in which each optimiser step must have these settings in its first parameter group."""
    seen = []

    def note(optimizer: Any, args: Any, kwargs: Any) -> None:
        seen.append({name: optimizer.param_groups[0][name] for name in expected})

    @contextlib.contextmanager
    def noting() -> Iterator[None]:
        handle = register_optimizer_step_pre_hook(note)
        try:
            yield
        finally:
            handle.remove()
        assert seen and all(found == expected for found in seen), seen

    return noting()


def test_settings_that_may_change_are_those_of_the_new_call(
    make: Callable[..., Any], rows: torch.Tensor, tmp_path: Path
) -> None:
    """The way out of a run that diverged: the same checkpoint, a lower rate."""
    out = tmp_path / "run"
    mod = alternate_layers()
    config = settings(save_every=2, min_lr_ratio=1.0, warmup=0.0, steps=2)
    train(make(mod=mod), rows, TrainConfig(out=out, **config))
    config |= {"steps": 4, "lr": 1e-4, "router_lr": 1e-3, "weight_decay": 0.5, "betas": (0.5, 0.6)}
    with groups_of_steps(lr=1e-4, weight_decay=0.5, betas=(0.5, 0.6), peak_lr=1e-4):
        result = train(make(mod=mod), rows, TrainConfig(out=out, resume="auto", **config))
    assert result.history["lr"].tolist() == [3e-3, 3e-3, 1e-4, 1e-4]
    record = json.loads((out / "run.json").read_text())
    assert (record["lr"], record["betas"], record["status"], record["model_step"]) == (
        1e-4,
        [0.5, 0.6],
        "finished",
        4,
    )
    (resumed,) = record["resumed"]
    assert resumed["step"] == 2
    assert resumed["changed"]["lr"] == [3e-3, 1e-4] and resumed["changed"]["weight_decay"] == [0.1, 0.5]


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"rows": "other"}, "data.digest="),
        ({"rows": "fewer"}, r"data.rows=80 \(was 160\)"),
        ({"rows": "shorter"}, r"data.row_length=16 \(was 32\)"),
        ({"rows": "blocks"}, r"data.kind=blocks \(was rows\)"),
        ({"mod": {"skip": "kv", "keep_recent": 4}}, r"mod.skip=kv \(was layer\)"),
        ({"mod": {"layers": "all"}}, r"mod.layers=all \(was alternate\)"),
        ({"mod": {"p": 0.3}}, r"mod.p=0.3 \(was 0.5\)"),
        ({"mod": None}, r"mod.skip=None \(was layer\)"),
        ({"config": {"objective": "budget"}}, r"objective=budget \(was target\)"),
        ({"config": {"freeze_base": True}}, r"freeze_base=True \(was False\)"),
        ({"config": {"grad_accum": 2}}, r"global_batch=16 \(was 8\)"),
        ({"config": {"batch_size": 4}}, r"global_batch=4 \(was 8\)"),
    ],
)
def test_what_breaks_the_runs_promise_is_refused(
    make: Callable[..., Any], rows: torch.Tensor, tmp_path: Path, change: dict[str, Any], what: str
) -> None:
    out = tmp_path / "run"
    config = settings(steps=2, save_every=2)
    train(make(mod=alternate_layers()), rows, TrainConfig(out=out, **config))
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    others = {"other": rows.flip(0), "fewer": rows[:80], "shorter": rows[:, :16]}
    others["blocks"] = list(rows.split(8))
    mod = change.get("mod", {})
    model = make(mod=alternate_layers(**mod) if mod is not None else None)
    again = TrainConfig(out=out, resume="auto", **config | {"steps": 4} | change.get("config", {}))
    with pytest.raises(ModlabError, match=what):
        train(model, others.get(change.get("rows", ""), rows), again)
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_other_labels_are_other_data(make: Callable[..., Any], rows: torch.Tensor, tmp_path: Path) -> None:
    def labelled(labels: torch.Tensor) -> Dataset:
        return Dataset.from_dict({"input_ids": rows.tolist(), "labels": labels.tolist()})

    config = TrainConfig(out=tmp_path / "run", resume="auto", **settings(steps=1, save_every=1))
    train(make(), labelled(rows), config)
    with pytest.raises(ModlabError, match="data.digest"):
        train(make(), labelled(rows.roll(1, 1)), config)
    assert train(make(), labelled(rows), config).steps == 1


class Killed(BaseException):
    """Nothing catches it, as nothing catches a kill."""


def test_a_longer_run_that_was_killed_leaves_no_finished_model(
    make: Callable[..., Any], rows: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed between its last checkpoint and its model: that of the shorter run is not taken for it."""
    out = tmp_path / "run"
    config = settings(save_every=2, warmup=0.0, min_lr_ratio=1.0)
    train(make(), rows, TrainConfig(out=out, **config | {"steps": 2}))

    def die(*args: Any) -> None:
        raise Killed

    longer = TrainConfig(out=out, resume="auto", **config | {"steps": 4})
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(RunFolder, "save_model", die)
        patch.setattr(RunFolder, "end", lambda *args: None)
        train(make(), rows, longer)
    assert [path.name for path in checkpoints(out)] == ["step_2", "step_4"]
    assert not (out / "model").exists()
    assert json.loads((out / "run.json").read_text())["status"] == "running"
    result = train(make(seed=3), rows, longer)
    whole = train(make(), rows, TrainConfig(**config | {"steps": 4, "save_every": 0}))
    assert same_weights(result.model, whole.model)
    assert same_weights(AutoModelForCausalLM.from_pretrained(out / "model"), whole.model)


def test_a_longer_run_killed_before_a_checkpoint_of_its_own_goes_on(
    make: Callable[..., Any], rows: torch.Tensor, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    config = settings(warmup=0.0, min_lr_ratio=1.0)
    train(make(), rows, TrainConfig(out=out, **config | {"steps": 2, "save_every": 2}))

    class Kill:
        def step(self, step: int, share: float) -> bool:
            raise Killed

        def log(self, row: dict[str, Any]) -> None:
            pass

    longer = TrainConfig(out=out, resume="auto", **config | {"steps": 4, "save_every": 4})
    with pytest.raises(Killed):
        train(make(), rows, longer, monitor=Kill())
    assert json.loads((out / "run.json").read_text())["status"] == "failed"
    result = train(make(seed=3), rows, longer)
    assert result.history["step"].tolist() == [1, 2, 3, 4]
    assert same_weights(AutoModelForCausalLM.from_pretrained(out / "model"), result.model)


def test_a_run_that_died_before_its_first_checkpoint_starts_with_auto(
    make: Callable[..., Any], rows: torch.Tensor, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    config = TrainConfig(out=out, resume="auto", **settings(steps=3, save_every=3))

    class Kill:
        def step(self, step: int, share: float) -> bool:
            if step == 2:
                raise Killed
            return True

        def log(self, row: dict[str, Any]) -> None:
            pass

    with pytest.raises(Killed):
        train(make(), rows, config, monitor=Kill())
    (out / "checkpoints" / ".step_3.tmp").mkdir(parents=True)  # what a full disk leaves
    result = train(make(), rows, config)
    assert result.history["step"].tolist() == [1, 2, 3]
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["step_3"]
    assert same_weights(result.model, train(make(), rows, TrainConfig(**settings(steps=3))).model)


def test_a_finished_run_without_a_checkpoint_is_not_overwritten(
    make: Callable[..., Any], rows: torch.Tensor, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    train(make(), rows, TrainConfig(out=out, **settings(steps=1)))
    with pytest.raises(ModlabError, match="finished run but no complete checkpoint"):
        train(make(), rows, TrainConfig(out=out, resume="auto", **settings(steps=2)))


def test_an_earlier_checkpoint_takes_the_later_ones_place(
    make: Callable[..., Any], rows: torch.Tensor, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    config = settings(steps=6, save_every=2, keep_last=9)
    train(make(), rows, TrainConfig(out=out, **config))
    stop = Stop(after=3)
    again = TrainConfig(out=out, resume=out / "checkpoints" / "step_2", **config | {"lr": 1e-4})
    train(make(), rows, again, monitor=stop)
    assert [path.name for path in checkpoints(out)] == ["step_2", "step_3"]
    result = train(make(), rows, TrainConfig(out=out, resume="auto", **config | {"lr": 1e-4}))
    assert same_weights(AutoModelForCausalLM.from_pretrained(out / "model"), result.model)
    assert result.history["lr"].iloc[1] > 10 * result.history["lr"].iloc[2]


class Stop:
    """A monitor that ends the run."""

    def __init__(self, after: int) -> None:
        self.after = after

    def step(self, step: int, share: float) -> bool:
        return step < self.after

    def log(self, row: dict[str, Any]) -> None:
        pass


def test_two_runs_do_not_share_a_folder(make: Callable[..., Any], rows: torch.Tensor, tmp_path: Path) -> None:
    """One that is at work holds it; one that is over is resumed, or left alone."""
    out, refused = tmp_path / "run", []

    class Meanwhile(Stop):
        def step(self, step: int, share: float) -> bool:
            with pytest.raises(ModlabError, match="in use by a training run") as error:
                train(make(), rows, TrainConfig(out=out, resume="auto", **settings(steps=2)))
            refused.append(str(error.value))
            return True

    train(make(), rows, TrainConfig(out=out, **settings(steps=2, save_every=2)), monitor=Meanwhile(2))
    assert len(refused) == 2
    other = tmp_path / "other"
    train(make(), rows, TrainConfig(out=other, **settings(steps=2, save_every=2)))
    log = (out / "log.jsonl").read_bytes()
    with pytest.raises(ModlabError, match="is of another one"):
        path = other / "checkpoints" / "step_2"
        train(make(), rows, TrainConfig(out=out, resume=path, **settings(steps=4)))
    assert (out / "log.jsonl").read_bytes() == log
