"""What `modlab train` does between its flags and `modlab.train`."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

import pytest
import torch

import modlab
from modlab.cli.train import _distilled
from modlab.training.config import TrainConfig
from tests.helpers.models import dense_llama


@pytest.mark.parametrize(("skip", "why"), [("kv+prompt", "from layer 4 on"), ("prompt", "has no routers")])
def test_what_cannot_be_fitted_is_distilled_without(
    skip: str, why: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = modlab.convert(dense_llama(), modlab.MoDConfig(skip=skip))  # type: ignore[arg-type]
    rows = torch.randint(3, 48, (8, 32))
    options = Namespace(fit_tokens=None, out=tmp_path, repeats=False, lengths=None)
    config = TrainConfig(steps=1, objective="distil")
    assert _distilled(options, config, model, None, rows) is rows
    said = capsys.readouterr().out
    assert "Nothing is fitted first" in said and why in said
    assert model.mod.trained is None
