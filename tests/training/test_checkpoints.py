"""Checkpoints: complete or absent, and nothing but numbers."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import LlamaForCausalLM

import modlab
from modlab.errors import ModlabError
from modlab.training.checkpoints import checkpoints
from modlab.training.loop import TrainConfig, train
from tests.helpers.models import alternate_layers, tiny_config
from tests.helpers.training import settings


def test_full_disk_during_a_checkpoint(
    make: Callable[..., Any], rows: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def save_full(tensors: Any, path: Path) -> None:
        calls.append(path)
        if len(calls) == 3:  # the second checkpoint's first file
            path.write_bytes(b"half")
            raise OSError(28, "No space left on device")
        save_file(tensors, path)

    monkeypatch.setattr("modlab.training.checkpoints.save_file", save_full)
    with pytest.raises(ModlabError, match="No space left.*Earlier ones are intact"):
        train(make(), rows, TrainConfig(out=tmp_path / "run", **settings(save_every=2)))
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["step_2"]
    rest = train(make(), rows, TrainConfig(out=tmp_path / "run", resume="auto", **settings(save_every=2)))
    assert rest.steps == 10


@pytest.fixture(scope="module")
def run_of_two_steps(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a budget run, whose checkpoint has every kind of file."""
    out = tmp_path_factory.mktemp("runs") / "run"
    train(small_model(), small_rows(), TrainConfig(out=out, **SETTINGS))
    return out


SETTINGS = settings(steps=2, save_every=2, objective="budget", keep_ratio=0.5)


def small_rows() -> torch.Tensor:
    return torch.randint(3, 60, (32, 16), generator=torch.Generator().manual_seed(0))


def small_model() -> Any:
    config = tiny_config(hidden_size=16, intermediate_size=16, num_hidden_layers=2, vocab_size=64)
    torch.manual_seed(0)
    return modlab.convert(LlamaForCausalLM(config), alternate_layers())


def resumed(out: Path) -> Any:
    return train(small_model(), small_rows(), TrainConfig(out=out, resume="auto", **SETTINGS | {"steps": 3}))


def test_a_checkpoint_holds_numbers_only(run_of_two_steps: Path, tmp_path: Path) -> None:
    """No pickle is written, and none that somebody puts there is read."""
    (checkpoint,) = checkpoints(run_of_two_steps)
    assert sorted(path.name for path in checkpoint.iterdir()) == [
        "model.safetensors",
        "optimizer.safetensors",
        "random_0.json",
        "routing.safetensors",
        "state.json",
    ]
    out = shutil.copytree(run_of_two_steps, tmp_path / "run")

    class Harm:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "harm"),)

    for name in ("custom_checkpoint_0.pkl", "random_states_0.pkl", "optimizer.bin", "scheduler.bin"):
        (checkpoints(out)[0] / name).write_bytes(pickle.dumps(Harm()))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "load", lambda *args, **kwargs: pytest.fail("torch.load was called"))
        assert resumed(out).steps == 3
    assert not (tmp_path / "harm").exists()


FILES = ("state.json", "random_0.json", "model.safetensors", "optimizer.safetensors", "routing.safetensors")
DAMAGES: dict[str, Callable[[bytes], bytes | None]] = {
    "gone": lambda data: None,
    "empty": lambda data: b"",
    "cut": lambda data: data[: len(data) // 2],
    "a bit flipped": lambda data: data[:-9] + bytes([data[-9] ^ 1]) + data[-8:],
    "another kind": lambda data: b"[]" + data,
    "nested": lambda data: b'{"a":' + b"[" * 200_000,
}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_said_to_be_so(
    run_of_two_steps: Path, tmp_path: Path, name: str, damage: str
) -> None:
    out = shutil.copytree(run_of_two_steps, tmp_path / "run")
    path = checkpoints(out)[0] / name
    data = DAMAGES[damage](path.read_bytes())
    path.unlink() if data is None else path.write_bytes(data)
    with pytest.raises(ModlabError, match="Could not load the checkpoint .*step_2.*damaged"):
        resumed(out)


@pytest.mark.parametrize(
    "change",
    [
        {"format": 3},
        {"format": 1},
        {"format": True},
        {"format": None},
        {"step": "2"},
        {"step": -1},
        {"step": True},
        {"step": 2.0},
        {"tokens": None},
        {"seconds": "long"},
        {"share": True},
        {"seconds": 1e400},
        {"window": []},
        {"window": {"loss": "much"}},
        {"window": {"loss": 1.0}},
        {"window_steps": -3},
        {"run": None},
        {"files": []},
        {"files": {}},
        {"files": {"../../model.safetensors": "0"}},
        {"unchanged": None},
        {"unchanged": {"lm_head.weight": 1}},
        {"unchanged": {"more": "float32 [3] 0"}},
        {"more": 1},
    ],
    ids=str,
)
def test_a_state_with_wrong_values_is_refused(
    run_of_two_steps: Path, tmp_path: Path, change: dict[str, Any]
) -> None:
    out = shutil.copytree(run_of_two_steps, tmp_path / "run")
    path = checkpoints(out)[0] / "state.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ModlabError):
        resumed(out)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"model_step": "2"}', '{"resumed": 3}', "[" * 100_000])
def test_a_damaged_record_is_said_to_be_so(run_of_two_steps: Path, tmp_path: Path, text: str) -> None:
    out = shutil.copytree(run_of_two_steps, tmp_path / "run")
    (out / "run.json").write_text(text)
    with pytest.raises(ModlabError, match=r"run.json is damaged .*delete it"):
        resumed(out)
    (out / "run.json").unlink()
    assert resumed(out).steps == 3


def test_a_damaged_log_loses_its_damaged_lines(run_of_two_steps: Path, tmp_path: Path) -> None:
    out = shutil.copytree(run_of_two_steps, tmp_path / "run")
    with open(out / "log.jsonl", "ab") as file:
        file.write(b'\xff\xfe\n[]\n{"step": "3"}\n{"step": true}\n' + b"[" * 100_000 + b'\n{"step": 3, "lo')
    assert resumed(out).history["step"].tolist() == [1, 2, 3]
