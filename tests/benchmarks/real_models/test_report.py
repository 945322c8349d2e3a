"""A result file tells runs apart and says how gates were made."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.real_models.__main__ import main


def test_rows_and_facts_of_every_run_are_in_it(tmp_path: Path) -> None:
    for name, rate in (("slow", 0.001), ("fast", 0.01)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "rows.jsonl").write_text(json.dumps({"arm": "head", "ratio": 2.0}) + "\n")
        (tmp_path / name / "facts_head.json").write_text(json.dumps({"arm": "head", "plan": {"rate": rate}}))
    out = tmp_path / "real_tiny.json"
    folders = [str(tmp_path / name) for name in ("slow", "fast")]
    main(["report", "--runs", *folders, "--origin", '{"date": "2026-01-01"}', "--out", str(out)])
    found = json.loads(out.read_text())
    assert found["what"] == "real_gates" and found["date"] == "2026-01-01"
    assert [row["run"] for row in found["rows"]] == ["slow", "fast"]
    assert {made["run"]: made["plan"]["rate"] for made in found["gates"]} == {"slow": 0.001, "fast": 0.01}
