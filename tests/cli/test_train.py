"""What `modlab train` does between its flags and `modlab.train`."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

import pytest
import torch

import modlab
from modlab.cli.train import _check_lengths, _checked, _distilled
from modlab.errors import ModlabError
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


def test_rows_are_as_long_as_the_longest_of_the_lengths_that_are_cut_from_them() -> None:
    options = Namespace(lengths=[4096, 8192], seq_len=None)
    _check_lengths(options)
    assert options.seq_len == 8192
    with pytest.raises(ModlabError, match="--seq-len 4096 tokens.*at least 8192"):
        _check_lengths(Namespace(lengths=[4096, 8192], seq_len=4096))


def test_flags_given_with_a_recipe_are_checked_with_what_the_recipe_says() -> None:
    distil = Namespace(recipe="distil")
    _checked(distil, {"tokens": 9, "keep_range": (0.04, 0.2)})  # of an objective that the recipe names
    for given, said in (
        ({"keep_range": (0.5, 0.2)}, "keep_range"),
        ({"objective": "none"}, "keep_range needs"),
    ):
        with pytest.raises(ModlabError, match=said):
            _checked(distil, {"tokens": 9, **given})
    with pytest.raises(ModlabError, match="keep_range needs"):
        _checked(Namespace(recipe=None), {"tokens": 9, "keep_range": (0.04, 0.67)})
