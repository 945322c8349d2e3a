"""Classes of tokens in docs/quality.md: from committed results alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from modlab import published
from scripts.pages import classes


def result(date: str) -> dict[str, Any]:
    row = {
        "text": "novels",
        "token_class": "word",
        "tokens": 90,
        "kept": 0.25,
        "dense_loss": 4.0,
        "loss": 4.1,
    }
    row |= {"loss_excess": 0.1, "loss_excess_stderr": 0.02, "kl": 0.05}
    return {
        "what": "classes", "date": date, "device_name": "cpu", "dtype": "float32", "command": "the command",
        "versions": {"torch": "2.13"}, "model": "toy", "routers": "toy-kv", "saving": 4.0, "skip": "kv",
        "rows": [row, {**row, "token_class": "blank", "tokens": 3}],
    }  # fmt: skip


def test_the_newest_record_has_a_row_a_class(tmp_path: Path) -> None:
    folder = tmp_path / "benchmarks" / "results"
    folder.mkdir(parents=True)
    assert classes.block(tmp_path) == classes.NONE
    for date in ("2026-12-02", "2026-12-01"):
        (folder / f"classes_{date}.json").write_text(json.dumps(result(date)))
    text = classes.block(tmp_path)
    assert "| novels | word | 90 | 0.25 | 4.000 | +0.1000 ± 0.0200 | 0.0500 |" in text
    assert "2026-12-02" in text and "2026-12-01" not in text and "blank" not in text
    assert "](classes_toy-kv.png)" in text


def test_a_bar_has_its_error() -> None:
    kept, lost = classes.figure(result("2026-12-02")).data
    assert list(kept.y) == [0.25] and list(lost.y) == [0.1] and list(lost.error_y.array) == [0.02]


def test_what_is_committed_is_a_table_too() -> None:
    frame = published.token_classes()
    assert {"routers", "text", "token_class", "tokens", "kept", "loss_excess"} <= set(frame.columns)
    assert len(frame) and frame["kept"].between(0, 1).all()
