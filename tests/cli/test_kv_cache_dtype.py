"""`--kv-cache-dtype`: of a conversion, and of a model that was converted before."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import modlab
from modlab.cli.program import main
from tests.helpers.models import dense_llama, scatter_gates
from tests.helpers.tokenizers import make_tokenizer


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A dense model, a converted one (fp32) and a text."""
    dense_llama(max_position_embeddings=256).save_pretrained(tmp_path / "dense")
    config = modlab.MoDConfig(layers="all", keep_recent=8)
    scatter_gates(modlab.convert(dense_llama(max_position_embeddings=256), config), 4.0).save_pretrained(
        tmp_path / "mod"
    )
    for name in ("dense", "mod"):
        make_tokenizer().save_pretrained(tmp_path / name)
    (tmp_path / "text.txt").write_text(" ".join(f"w{i * i % 90}" for i in range(3000)))
    return tmp_path


def measured(capsys: pytest.CaptureFixture[str], *words: str | Path) -> dict[str, Any]:
    assert main(["eval", *map(str, words), "--json", "--limit-tokens", "1024", "--device", "cpu"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_eval_stores_what_it_is_asked_to_store(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = folder / "mod", "--data", folder / "text.txt"
    plain, rounded = measured(capsys, *words), measured(capsys, *words, "--kv-cache-dtype", "int8")
    assert rounded["dense_kv_bytes"] == plain["dense_kv_bytes"]
    assert 2.5 < rounded["kv_saving"] / plain["kv_saving"] < 4  # of single precision, index included
    assert rounded["loss"] != plain["loss"]
    fewer = measured(capsys, *words, "--kv-cache-dtype", "k6v4")
    assert 1.2 < fewer["kv_saving"] / rounded["kv_saving"] < 16 / 10  # of the bits alone, without steps


def test_fit_converts_to_eight_bits_and_what_was_saved_can_be_switched(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = ("--data", str(folder / "text.txt"))
    fitted = ("fit", str(folder / "dense"), str(folder / "fitted"), *data, "--context", "64")
    sizes = ("--tokens", "960", "--device", "cpu")
    assert main([*fitted, *sizes, "--kv-cache-dtype", "int8", "--kv-saving", "8"]) == 0
    model, _ = modlab.load(folder / "fitted")
    assert model.mod.config.kv_cache_dtype == "int8" and model.mod.ranges
    model, _ = modlab.load(folder / "fitted", kv_cache_dtype="auto")
    assert model.mod.config.kv_cache_dtype == "auto" and not model.mod.ranges
    capsys.readouterr()
    words = folder / "fitted", *data
    assert (
        measured(capsys, *words)["kv_saving"]
        > measured(capsys, *words, "--kv-cache-dtype", "auto")["kv_saving"]
    )
    assert main([*fitted, "--overwrite", *sizes, "--kv-cache-dtype", "int8", "--kv-saving", "2"]) == 2
    assert "eight bits alone save 3.56x" in capsys.readouterr().err


def test_a_dense_model_has_nothing_to_set(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["eval", str(folder / "dense"), "--data", str(folder / "text.txt"), "--device", "cpu"]
    assert main([*words, "--kv-cache-dtype", "int8"]) == 2
    assert "is dense: call modlab.convert" in capsys.readouterr().err


@pytest.mark.parametrize(("dtype", "stored"), [("int8", 2 * (16 + 2)), ("k6v4", 12 + 8 + 2 * 2)])
def test_plan_counts_codes_and_steps(
    folder: Path, capsys: pytest.CaptureFixture[str], dtype: str, stored: int
) -> None:
    def planned(*more: str) -> dict[str, float]:
        words = ["plan", "--model", str(folder / "dense"), "--context", "100000", "--json", *more]
        assert main(words) == 0
        lines: list[dict[str, float]] = json.loads(capsys.readouterr().out)
        return next(line for line in lines if line["use"] == "inference")

    plain, rounded = planned(), planned("--kv-cache-dtype", dtype)
    factor = 2 * 16 * 2 / stored  # bf16, heads of 16
    assert plain["kv"] == rounded["kv"] == pytest.approx(4 * plain["kv_routed"])
    assert rounded["kv_routed"] == pytest.approx(plain["kv_routed"] / factor)
    asked = planned("--kv-cache-dtype", dtype, "--kv-saving", "8")
    assert asked["kv_routed"] == pytest.approx(plain["kv"] / 8), "fewer bits save a part of it"
    everything = planned("--kv-cache-dtype", dtype, "--kv-saving", "1")
    assert everything["kv_routed"] == pytest.approx(plain["kv"] / factor)
