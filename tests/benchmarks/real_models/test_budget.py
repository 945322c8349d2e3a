"""KL over the tokens of a run, extrapolated."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from benchmarks.real_models.__main__ import main
from benchmarks.real_models.budget import fit
from modlab.errors import ModlabError


def log(folder: Path, power: float = 0.3, end: float = 0.02) -> Path:
    """A run of 40 M tokens whose rates fall from 28 M on; its first evaluation comes before the target does,
    far off the law."""
    rows = [{"step": 1, "tokens": 1e6, "lr": 0.001, "target": 0.9}]
    for millions in (2, 4, 8, 16, 24, 28):
        kl = 0.05 * millions**-power if millions > 2 else 7.0
        target = 0.4 if millions == 2 else 0.2
        rows.append({"tokens": millions * 1e6, "lr": 0.004, "target": target, "eval_kl": kl})
    rows.append({"tokens": 36e6, "lr": 0.001, "target": 0.04, "eval_kl": 0.001})
    rows.append({"tokens": 40e6, "lr": 1e-6, "target": 0.04, "eval_kl": end})
    path = folder / "log.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return path


def test_the_end_moves_along_the_law_of_the_peak_rate(tmp_path: Path) -> None:
    budget = fit(log(tmp_path), 0.25)
    assert budget.points == 5 and budget.at == 40e6
    assert budget.power == pytest.approx(0.3) and budget.stderr == pytest.approx(0.0, abs=1e-6)
    assert budget.kl_after(40e6) == 0.02
    assert budget.kl_after(80e6) == pytest.approx(0.02 * 2**-0.3)
    assert budget.tokens_for(0.01) == pytest.approx(40e6 * 2 ** (1 / 0.3))
    assert budget.tokens_for(0.05) == 40e6


def test_tokens_that_change_nothing(tmp_path: Path) -> None:
    budget = fit(log(tmp_path, power=-0.1), 0.25)
    assert budget.tokens_for(0.01) == math.inf


def test_too_few_evaluations_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModlabError, match="0 evaluation.*0.01.*eval_every"):
        fit(log(tmp_path), 0.01)
    with pytest.raises(ModlabError, match="0 evaluation"):
        (tmp_path / "log.jsonl").write_text("", encoding="utf-8")
        fit(tmp_path / "log.jsonl", 0.25)


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["budget", "--log", str(log(tmp_path)), "--tokens", "80"])
    assert "80.0 M tokens: 0.0162" in capsys.readouterr().out
