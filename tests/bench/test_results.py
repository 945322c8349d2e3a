"""Result files that somebody else wrote: drawn, or refused in one sentence."""

import json

import pytest

from modlab import bench
from modlab.bench import results
from modlab.errors import ModlabError

ROW = {"case": "decode", "shape": "tiny", "context": 60, "batch": 1, "routed": "all"}
ROW |= {"keep_ratio": 0.5, "speedup": 1.2, "ideal": 1.5}
RESULT = {"what": "decode", "device_name": "a CPU", "dtype": "float32", "date": "2026-11-29", "rows": [ROW]}


def test_a_whole_result_is_read_and_drawn(tmp_path):
    (tmp_path / "r.json").write_text(json.dumps(RESULT))
    assert results.read(tmp_path / "r.json") == RESULT
    assert bench.main(["--plot", str(tmp_path / "r.json")]) == 0
    assert "1.2" in (tmp_path / "r.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[1, 2]",
        "NaN",
        "3",
        "[" * 100_000,
        "{",
        '{"rows": 3}',
        json.dumps({**RESULT, "rows": [3]}),
        json.dumps({**RESULT, "dtype": 5}),
        json.dumps({**RESULT, "rows": [{**ROW, "case": None}]}),
        json.dumps({**RESULT, "rows": [{**ROW, "speedup": "fast"}]}),
        *(json.dumps({k: v for k, v in RESULT.items() if k != name}) for name in RESULT),
        *(json.dumps({**RESULT, "rows": [{k: v for k, v in ROW.items() if k != name}]}) for name in ROW),
    ],
)
def test_anything_else_is_refused(text, tmp_path):
    path = tmp_path / "r.json"
    path.write_text(text)
    with pytest.raises(ModlabError, match=r"r\.json: not a"):
        bench.main(["--plot", str(path)])
    assert not path.with_suffix(".html").exists()
