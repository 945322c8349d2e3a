"""The folder of a run: log, run.json, the final model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from modlab.saving.locks import try_lock, unlock
from modlab.training.folder import RunFolder
from modlab.training.loop import TrainConfig, train
from tests.helpers.training import settings


def test_log_is_jsonl_without_duplicates(
    make: Callable[..., Any], rows: torch.Tensor, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    train(make(), rows, TrainConfig(out=out, **settings(steps=6, save_every=3)))
    newest = out / "checkpoints" / "step_6"
    newest.rename(out / "checkpoints" / ".step_6.tmp")  # a machine that died while it wrote this one
    with open(out / "log.jsonl", "a", encoding="utf-8") as file:
        file.write('{"step": 7, "lo')
    train(make(), rows, TrainConfig(out=out, resume="auto", **settings(steps=8, save_every=3)))
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert {"tokens", "loss", "lr", "grad_norm", "tokens_per_s", "seconds"} <= set(lines[0])


def test_checkpoints_are_pruned_and_the_model_is_saved(
    make: Callable[..., Any], rows: torch.Tensor, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    result = train(make(), rows, TrainConfig(out=out, **settings(steps=9, save_every=2, keep_last=2)))
    assert sorted(p.name for p in (out / "checkpoints").iterdir()) == ["step_8", "step_9"]
    saved = AutoModelForCausalLM.from_pretrained(out / "model")
    with torch.no_grad():
        assert torch.equal(saved(rows[:2]).logits, result.model(rows[:2]).logits)
    assert json.loads((out / "run.json").read_text())["batch_size"] == 8


def test_what_is_saved_in_a_run_does_not_wait_for_the_run(tmp_path: Path) -> None:
    """Saving model/ locks the folder around it."""
    with RunFolder(tmp_path / "run", is_main=True).held():
        assert (lock := try_lock(tmp_path / "run")) is not None
        unlock(lock)
