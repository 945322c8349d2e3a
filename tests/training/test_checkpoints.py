"""Checkpoints: complete or absent, and nothing but numbers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from modlab.errors import ModlabError
from modlab.training.loop import TrainConfig, train
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
