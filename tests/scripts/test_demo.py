"""The scripts that make the demo pair, all stages for real on a small text, and what ships."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import modlab

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts" / "demo"
STAGES = sorted(p.stem for p in SCRIPTS.glob("0*.py"))


def run(*arguments: object, check: bool = True) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert not check or done.returncode == 0, done.stderr[-3000:]
    return done


def write_corpus(folder: Path) -> Path:
    folder.mkdir()
    rng = np.random.default_rng(0)
    words = ["def", "return", "class", "self", "import", "value", "index", "(", ")", ":", "=", "\n    "]
    for i in range(60):
        (folder / f"{i}.txt").write_text(" ".join(rng.choice(words, 2500)), encoding="utf-8")
    return folder


@pytest.mark.long
def test_all_stages(tmp_path: Path) -> None:
    corpus, out, package = write_corpus(tmp_path / "corpus"), tmp_path / "out", tmp_path / "package"
    small = "--steps 3 --batch-size 2 --log-every 1 --eval-batches 1"
    driver = [SCRIPTS / "run.py", "--out", out, "--stage-args"]
    driver += [f"01_tokenizer:--source {corpus} --vocab-size 400 --sample-mb 0.1 --num-proc 2"]
    driver += [f"02_dense:--layers 2 --hidden 32 {small}", f"03_twin:{small} --keep-ratio 0.5 --kl 0.5"]
    driver += [f"05_card:--package {package} --rows 3"]
    run(*driver)

    pair = ("01_tokenizer", "02_dense", "03_twin", "04_dense_continuation", "05_card")
    logs = {stage: json.loads((out / "logs" / f"{stage}.json").read_text()) for stage in pair}
    assert logs["03_twin"]["tokens"] == logs["04_dense_continuation"]["tokens"] == 3 * 2 * 2048
    assert all(log["command"].startswith("python scripts/demo/") and log["torch"] for log in logs.values())
    assert logs["01_tokenizer"]["documents"]["train"] + logs["01_tokenizer"]["documents"]["heldout"] <= 60

    results = json.loads((package / "results.json").read_text())["results"]
    card = (package / "README.md").read_text()
    for name in ("dense", "dense_continuation", "mod"):
        assert f"{results[name]['loss']:.4f}" in card
    assert f"{results['mod']['kv_saving']:.2f}x" in card
    model, tokenizer = modlab.load(package / "mod")
    dense, _ = modlab.load(package / "dense")
    assert model.mod.layers == [1] and not modlab.is_converted(dense)
    assert {p.dtype for n, p in model.named_parameters() if "router" not in n} == {torch.bfloat16}
    ids = tokenizer("def f(self): return 1", return_tensors="pt")["input_ids"]
    assert ids[0, 0] == tokenizer.bos_token_id == model.config.eos_token_id
    assert tokenizer.decode(ids[0], skip_special_tokens=True) == "def f(self): return 1"
    assert model.generate(ids, max_new_tokens=3, do_sample=False).shape[1] <= ids.shape[1] + 3

    again = run(*driver)
    assert again.stdout.count("done before") == 5, "a second run finds everything done"


@pytest.mark.long
def test_routers_of_the_cache_are_held_against_controls(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "corpus")
    words = ["--out", tmp_path / "out", "--card", tmp_path / "card", "--source", corpus, "--rows", 2]
    run(SCRIPTS / "06_kept_keys.py", *words)
    record = json.loads((tmp_path / "card" / "results.json").read_text())
    found = record["results"]
    assert found["by chance"]["keep_ratio"] == pytest.approx(found["demo-kv"]["keep_ratio"], abs=0.03)
    assert found["by hand, low"]["loss"] != found["by hand, high"]["loss"] != found["demo-dense"]["loss"]
    savings = [record["settings"][f"keep_recent={n}"]["kv_saving"] for n in (16, 32, 64, 256, 512)]
    assert savings == sorted(savings, reverse=True)
    card = (tmp_path / "card" / "README.md").read_text()
    assert all(f"{result['loss']:.4f}" in card for result in (*found.values(), *record["settings"].values()))


@pytest.mark.parametrize("stage", [*STAGES, "run"])
def test_help(stage: str) -> None:
    assert "--out" in run(SCRIPTS / f"{stage}.py", "--help").stdout


def test_stages_name_what_is_missing(tmp_path: Path) -> None:
    done = run(SCRIPTS / "04_dense_continuation.py", "--out", tmp_path, check=False)
    assert done.returncode != 0
    assert "run the stage 03_twin first" in done.stderr
