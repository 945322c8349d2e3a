"""What `modlab train` does between its flags and `modlab.train`."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import modlab
from modlab.cli.program import main
from modlab.cli.train import _check_lengths, _checked, _distilled
from modlab.errors import ModlabError
from modlab.training.config import TrainConfig
from tests.helpers.models import dense_llama, scatter_gates
from tests.helpers.tokenizers import make_tokenizer


@pytest.mark.parametrize("skip", ["kv+prompt", "prompt"])
def test_projections_are_fitted_where_prompts_leave(
    skip: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = modlab.convert(dense_llama(), modlab.MoDConfig(skip=skip))  # type: ignore[arg-type]
    rows = torch.randint(3, 48, (8, 32))
    options = Namespace(fit_tokens=None, out=tmp_path, repeats=False, lengths=None, seq_len=32)
    config = TrainConfig(steps=1, objective="distil")
    for tokens, taken, fitted in ((None, [], 1), (0, [], 0), (64, ["x.mod_projections.k_proj.weight"], 0)):
        options.fit_tokens = tokens
        assert _distilled(options, config, model, None, rows, taken) is rows
        assert capsys.readouterr().out.count("Projections above layer 4 are fitted") == fitted
    assert model.mod.trained is None


def test_what_has_no_fit_is_distilled_without(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = modlab.convert(dense_llama(), modlab.MoDConfig(skip="mlp"))
    options = Namespace(fit_tokens=None, out=tmp_path, repeats=False, lengths=None)
    rows = torch.randint(3, 48, (8, 32))
    assert _distilled(options, TrainConfig(steps=1, objective="distil"), model, None, rows, []) is rows
    assert "Nothing is fitted first" in capsys.readouterr().out


def test_leaving_is_trained_on_top_of_trained_routers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`--recipe speed --start` routers of K/V, as a user types it; and once more, to go on."""
    dense_llama().save_pretrained(tmp_path / "tiny")
    make_tokenizer().save_pretrained(tmp_path / "tiny")
    (tmp_path / "text.txt").write_text(" ".join(f"w{i * i % 90}" for i in range(4000)))
    config = modlab.MoDConfig(layers="all", gates="kv_head", router_hidden=16)
    trained = scatter_gates(modlab.convert(dense_llama(), config))
    modlab.save_routers(trained, tmp_path / "kv", str(tmp_path / "tiny"))
    words = ["train", str(tmp_path / "tiny"), "--recipe", "speed", "--start", str(tmp_path / "kv")]
    words += ["--data", str(tmp_path / "text.txt"), "--seq-len", "300", "--batch-size", "2"]
    words += [
        "--device",
        "cpu",
        "--heldout-tokens",
        "0",
        "--no-repeats",
        "--no-calibrate",
        "--out",
        str(tmp_path / "run"),
    ]
    words += ["--kv-saving", "1.5", "--keep-range", "0.1,0.9", "--lr", "1e-5", "--router-lr", "1e-6"]
    assert main([*words, "--steps", "2", "--save-every", "1"]) == 0
    said = capsys.readouterr().out
    assert "are the start" in said and "Projections above layer 4 are fitted" in said
    both = load_file(tmp_path / "run" / "model" / "modlab_router.safetensors")
    source = load_file(tmp_path / "kv" / "modlab_router.safetensors")
    assert any("mod_projections" in name for name in both)
    for name in source:
        below = int(name.split(".")[2]) < 4  # above, routers are fitted to the state that they read there
        if not name.endswith("bias") and (below or not name.endswith("weight")):
            torch.testing.assert_close(both[name], source[name], atol=1e-4, rtol=0)
    assert main([*words, "--steps", "3", "--resume", "auto"]) == 0
    assert "are the start" not in capsys.readouterr().out


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
