"""Routers that are only fitted: how long it took, and what they lose, in one record."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import modlab
from benchmarks.real_models import evaluate, quick
from benchmarks.real_models.__main__ import main
from benchmarks.real_models.texts import Data
from modlab.errors import ModlabError
from modlab.training.contexts import prompt_ids
from tests.helpers.models import dense_llama
from tests.helpers.tokenizers import make_tokenizer


@pytest.fixture
def dense(tmp_path: Path) -> Path:
    path = tmp_path / "tiny"
    dense_llama(vocab_size=320, max_position_embeddings=1024, num_hidden_layers=2).save_pretrained(path)
    make_tokenizer(320).save_pretrained(path)
    return path


def test_a_fit_is_timed_and_its_routers_are_measured(
    dense: Path, data: Data, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(evaluate, "FAR", 256)
    text, out = tmp_path / "text.txt", tmp_path / "run"
    text.write_text(" ".join(f"w{i * i % 90}" for i in range(9000)))
    words = ["quick", "--model", str(dense), "--texts", str(text), "--out", str(out), "--device", "cpu"]
    words += ["--fit-tokens", "1024", "--context", "128", "--repeats", "2"]
    main(words)
    row = json.loads(capsys.readouterr().out)
    assert len(row["seconds"]) == 2 and min(row["seconds"]) > 0 and row["tokens"] == 7 * 128
    assert row["context"] == 128 and row["arm"] == "quick" and row["peak_mib"] is None
    model: Any = modlab.load(out / "routers", base=dense)[0]
    known = model.mod.trained
    assert known.savings and "nothing trained" in known.method
    before = (out / "fit.json").read_text()
    main(words)
    assert (out / "fit.json").read_text() == before, "not once more"
    data.save(tmp_path / "data")
    main(
        ["measure", "--model", str(dense), "--routers", str(out / "routers"),
         "--data", str(tmp_path / "data"), "--arm", "quick", "--savings", "2", "--recent", "16",
         "--only", "far", "--device", "cpu", "--slow",
         "--sizes", '{"rows": 1, "held": 1}', "--out", str(out), "--dense", str(tmp_path / "dense.pt")]
    )  # fmt: skip
    main(["join", "--run", str(out), "--out", str(tmp_path / "quick_tiny.json")])
    found = json.loads((tmp_path / "quick_tiny.json").read_text())
    assert found["fit"]["seconds"] == json.loads(before)["rows"][0]["seconds"]
    (measured,) = [one for one in found["rows"] if one["ratio_asked"] == 2]
    assert measured["arm"] == "quick" and measured["kl_far"] > 0 and (tmp_path / "dense.pt").exists()


def test_random_weights_are_timed_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quick.training_speed, "load", lambda folder, device: dense_llama(num_hidden_layers=2))
    record = quick.run(None, None, tmp_path, "cpu", repeats=1, tokens=640, context=64)
    (row,) = record["rows"]
    assert row["model"] == "llama-3-8b" and len(row["seconds"]) == 1 and record["granularity"] == "head"
    assert not (tmp_path / "routers").exists()


def test_rows_are_as_long_as_those_of_the_fit() -> None:
    """Two copies and what stands between them fill a context that is short."""
    model: Any = dense_llama(vocab_size=320, max_position_embeddings=512)
    tokenizer = make_tokenizer(320)
    prompt = len(prompt_ids(model, tokenizer))
    config = modlab.FitConfig(tokens=2048)
    assert prompt and quick._rows(model, tokenizer, None, config).shape[1] == (512 - prompt) // 2
    assert quick._rows(model, None, None, config).shape[1] == 256


def test_a_model_without_texts_is_refused_before_it_is_loaded(tmp_path: Path) -> None:
    with pytest.raises(ModlabError, match="--texts"):
        quick.run(tmp_path / "nothing", None, tmp_path / "out", "cpu")
