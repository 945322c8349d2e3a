"""How times grow: what is drawn of which runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from scripts.pages import speed


def row(case: str, context: int, keep: float, batch: int = 1, **more: Any) -> dict[str, Any]:
    said = {"case": case, "shape": "wide", "context": context, "batch": batch, "keep_ratio": keep}
    said |= {"routed": "all", "routed_layers": 4, "num_layers": 4, "speedup": 1.5, "ideal": 2.0}
    return said | more


def write(
    root: Path, name: str, date: str, *rows: dict[str, Any], skip: str | None = "kv", **more: Any
) -> None:
    result = {
        "what": "growth", "device_name": "a GPU", "dtype": "bfloat16", "date": date, "command": f"run {name}",
        "versions": {"torch": "2.13.0"}, "settings": {} if skip is None else {"skip": skip},
        "rows": list(rows),
    } | more  # fmt: skip
    folder = root / "benchmarks" / "results"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"growth_{name}.json").write_text(json.dumps(result))


def test_parts_of_a_day_are_one_picture(tmp_path: Path) -> None:
    """Whatever the names of their files; the newest row counts, and whole layers are another picture."""
    assert speed.grown(tmp_path, "kv") is None and "not been measured yet" in speed.block(tmp_path)
    with pytest.raises(SystemExit, match="modlab bench growth"):
        speed.draw(tmp_path / "docs")
    steps = [row("decode", n, keep) for n in (4096, 32768) for keep in (0.1, 0.5, 1.0)]
    prompts = [row("prefill", n, keep) for n in (4096, 32768) for keep in (0.1, 0.5, 1.0)]
    again = row("decode", 32768, 0.1, speedup=1.75)
    write(tmp_path, "a-2", "2030-01-02", *prompts)
    write(tmp_path, "a", "2030-01-01", *steps)
    write(tmp_path, "b", "2030-01-03", again)
    write(tmp_path, "layers", "2030-01-04", row("decode", 32768, 0.1, speedup=9.0), skip=None)
    found = speed.grown(tmp_path, "kv")
    assert found is not None and len(found["rows"]) == 12 and len(found["of"]) == 3
    curves = speed.figure(found)
    decode = next(trace for trace in curves.data if trace.name == "decode" and trace.xaxis == "x")
    assert tuple(decode.x) == (0.1, 0.5, 1.0) and tuple(decode.y) == (1.75, 1.5, 1.5)
    assert "keys and values alone" in curves.layout.title.text
    page = speed.block(tmp_path)
    assert "`run a`" in page and "`run a-2`" in page and "speed_kv.png" in page and "Fitted" not in page


def test_batches_have_a_panel_where_there_are_any(tmp_path: Path) -> None:
    rows = [row("decode", n, 0.1, kept_us=4.0, skipped_us=1.0) for n in (8192, 32768)]
    rows.append(row("decode", 32768, 1.0, kept_us=4.0, skipped_us=1.0))
    several = [row("decode", 8192, 0.1, batch=batch) for batch in (4, 32)]
    write(tmp_path, "a", "2030-01-01", *rows, *several)
    found = speed.grown(tmp_path, "kv")
    assert found is not None
    batch = [trace for trace in speed.figure(found).data if trace.xaxis == "x3" and trace.name == "decode"]
    assert [tuple(trace.x) for trace in batch] == [(1, 4, 32)]
    assert len(speed.panels(found | {"rows": rows})) == 2
    said = "decode at 32,768 tokens: a token takes a layer 4.00 us where all are kept, 1.00 us where none is."
    assert said in speed.block(tmp_path)
