"""The tables on several GPUs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from scripts.pages import many_gpus


def run(date: str, **more: Any) -> dict[str, Any]:
    """What `python -m benchmarks.many_gpus` writes."""
    here = {"date": date, "device_name": "A GPU", "versions": {"torch": "2.11.0"}, "ended with": 0}
    lines = [{"step": 4, "loss": 1.0}]
    planned = [{"way": "DDP", "total": 70.5}, {"way": "FSDP2", "total": 36.0}]

    def scene(speed: float) -> dict[str, Any]:
        allocated = {"cuda:0": 2**30, "cuda:1": 3 * 2**30}
        return {"tokens_per_s": speed, "rows": 16, "lines": lines, "allocated": allocated, "planned": planned}

    kind = {"weight_bytes": {"cuda:0": 2**31}, "kv_bytes": {"cuda:0": 2**29}, "allocated": {"cuda:0": 2**32}}
    same = {"largest difference of logits": 0.01, "decided alike": 0.999, "same tokens": 16, "of tokens": 16}
    kinds = {
        "by layer, bfloat16": kind | same,
        "by layer, float32": kind | same | {"largest difference of logits": 5e-5},
    }
    prompt = {"prefill, s": 9.5, "decode, ms": 50.0, "finite": True, "kv_bytes": {}, "allocated": {}}
    length = {"32768": {"dense": prompt, "leaving": {"refused": "whole copies", "allocated": {}}}}
    large = {"by length": length, "weight_bytes": {"cuda:0": 2**36, "cuda:1": 2**35}} | here
    large["planned"] = {"32768": [{"way": "tensor parallel", "total": 67.5}]}
    told = {"rows": 8, "processes": [{"ms a step": ms, "kernels": 9.0} for ms in (300.0, 301.0)]}
    times = {"tokens a second, times one GPU, the same global batch": 1.9, "log lines compared": 4}
    return {
        "toy": False, "command": "python -m benchmarks.many_gpus", "not begun": ["notebook"],
        "compared": {
            "ddp, m, 16 rows": times | {"largest difference of loss": 0.004},
            "resumed, killed, against several": {"log lines compared": 8},
        },
        "parts": {
            "one": {"scenes": {"m, 16 rows": scene(100.0)}} | here,
            "ddp": {"scenes": {"m, 16 rows": scene(190.0), "where the time goes": told}} | here,
            "fsdp2": here | {"ended with": "its limit"},
            "tensor parallel": kinds | {"planned": [{"way": "tensor parallel", "total": 4.5}]} | here,
            "llama-3-70b tensor parallel": large,
            "llama-3-70b distilled": {"scenes": {"70b, base frozen, 16 rows": scene(9.0)}} | here,
        },
    } | more  # fmt: skip


def write(root: Path, name: str, result: dict[str, Any]) -> None:
    folder = root / many_gpus.FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(result))


def test_all_that_was_measured_is_told(tmp_path: Path) -> None:
    write(tmp_path, "new", run("2026-12-02"))
    text = many_gpus.block(tmp_path)
    assert "| m | 16 | DDP | 190 | 1.90x |  | 3.0 | 70.5 |" in text
    assert "| m | 16 | one GPU | 100 |  |  | 3.0 | 70.5 |" in text
    assert "| ddp, m, 16 rows | 4 | 0.0040 |  |  |" in text
    assert "| resumed, against several | 8 |  |  |  |" in text
    assert "| process 1 | 301.0 | 9.0 |" in text
    row = "| tensor parallel | by layer, bfloat16 | 2.00 | 0.50 | 4.00 | 4.5 | 0.01 | 99.90% | 16 of 16 |"
    assert row in text
    assert "| by layer, float32 | 2.00 | 0.50 | 4.00 |  | 5e-05 | 99.90% | 16 of 16 |" in text
    assert "| 32,768 | tensor parallel | dense | 9.50 | 50.0 | 64.00 | 0.00 | 0.00 | 67.5 |" in text
    assert "| 32,768 | tensor parallel | leaving | refused |" in text
    assert "| 70b, base frozen | 16 | FSDP2 | 9 |  |  | 3.0 | 36.0 |" in text
    assert "Ended by a limit: fsdp2 (its limit); not begun: notebook." in text


def test_more_than_two_are_told_with_their_efficiency(tmp_path: Path) -> None:
    more = run("2026-12-02")
    of = {"scaling efficiency, of one GPU": 0.91, "scaling efficiency, of two GPUs": 0.955}
    more["compared"]["ddp, m, 16 rows"] |= of
    write(tmp_path, "new", more)
    text = many_gpus.block(tmp_path)
    assert "planned | scaling efficiency, of one GPU | scaling efficiency, of two GPUs |" in text
    assert "| m | 16 | DDP | 190 | 1.90x |  | 3.0 | 70.5 | 91% | 96% |" in text
    assert "| m | 16 | one GPU | 100 |  |  | 3.0 | 70.5 |  |  |" in text


def test_parts_of_several_calls_are_told_with_their_note(tmp_path: Path) -> None:
    write(tmp_path, "new", run("2026-12-02", command=["a", "b"], note="Two calls."))
    assert "`a`, then `b` on A GPU, torch 2.11.0, 2026-12-02. Two calls." in many_gpus.block(tmp_path)


def test_an_executed_notebook_is_shown_by_its_figures(tmp_path: Path) -> None:
    write(tmp_path, "new", run("2026-12-02"))
    assert many_gpus.executed(tmp_path) is None and many_gpus.draw(tmp_path / "docs") == []
    figure = {"data": [{"y": [1.0, 2.0], "type": "scatter"}], "layout": {"title": {"text": "Loss"}}}
    text: dict[str, Any] = {"output_type": "stream", "name": "stdout", "text": "2 GPU(s)"}
    shown = {"output_type": "execute_result", "data": {many_gpus.PLOTLY: figure}}
    cells = [{"cell_type": "markdown"}, {"cell_type": "code", "outputs": [text, shown]}]
    file = tmp_path / many_gpus.FOLDER / "a_gpu_6_many_gpus.ipynb"
    file.write_text(json.dumps({"cells": cells}))
    page = many_gpus.block(tmp_path)
    assert page.endswith("![A figure of notebook 6](many_gpus_notebook_1.png)")
    assert "`benchmarks/results/many_gpus/a_gpu_6_many_gpus.ipynb`" in page
    assert many_gpus.pictures(file) == {"many_gpus_notebook_1.png": figure}


def test_the_newest_run_comes_first_and_trials_do_not_count(tmp_path: Path) -> None:
    assert many_gpus.block(tmp_path) == many_gpus.NOTHING
    write(tmp_path, "trial", run("2026-12-09", toy=True))
    write(tmp_path, "before", {"toy": False, "parts": {"m ddp distilled": {"steps": []}}})
    assert many_gpus.block(tmp_path) == many_gpus.NOTHING
    write(tmp_path, "a", run("2026-12-03"))
    write(tmp_path, "b", run("2026-12-02"))
    text = many_gpus.block(tmp_path)
    assert text.index("2026-12-03") < text.index("2026-12-02") and "2026-12-09" not in text
