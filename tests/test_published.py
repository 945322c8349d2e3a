"""Committed figures as tables: what the files say, with where it comes from."""

import json
from pathlib import Path

import pytest

import modlab
from modlab import published
from modlab.errors import ModlabError

ROOT = Path(__file__).resolve().parents[1]


def test_benchmarks_are_the_rows_of_the_files() -> None:
    frame = published.benchmarks()
    columns = {"result", "case", "keep_ratio", "dense_ms", "mod_ms", "speedup", "ideal", "kv_saving"}
    assert columns <= set(frame)
    assert frame[[*published.PROVENANCE, "torch"]].notna().all(axis=None)
    files = [json.loads(path.read_text()) for path in (ROOT / "benchmarks" / "results").glob("*.json")]
    rows = [row for file in files if "case" in file["rows"][0] for row in file["rows"]]
    assert 0 < len(frame) <= len(rows)
    assert set(frame.mod_ms) <= {row["mod_ms"] for row in rows}


def test_the_newest_study_is_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(published, "result_files", lambda: sorted(tmp_path.glob("*.json")))
    facts = {"device_name": "a GPU", "dtype": "bfloat16", "command": "c", "versions": {"torch": "2.13.0"}}
    bench = {"what": "decode", **facts, "date": "2030-01-01", "rows": [{"case": "decode", "mod_ms": 1.0}]}
    (tmp_path / "decode.json").write_text(json.dumps(bench))
    assert len(published.quality()) == 0
    for date, gap in (("2030-01-02", 0.2), ("2030-01-01", 0.1)):
        study = {"what": "quality", **facts, "date": date, "rows": [{"arm": "attn-mid", "gap": gap}]}
        (tmp_path / f"quality_{date}.json").write_text(json.dumps(study))
    frame = published.quality()
    assert list(frame.gap) == [0.2] and frame.attrs["date"] == "2030-01-02"
    assert len(published.benchmarks()) == 1


def test_of_several_results_the_newest_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for date, ms in (("2030-01-02", 2.0), ("2030-01-03", 3.0), ("2030-01-01", 1.0)):
        result = {"what": "decode", "device_name": "a GPU", "dtype": "bfloat16", "command": "modlab bench"}
        result |= {"date": date, "versions": {"torch": "2.13.0"}, "rows": [{"case": "decode", "mod_ms": ms}]}
        (tmp_path / f"{date}.json").write_text(json.dumps(result))
    monkeypatch.setattr(published, "result_files", lambda: sorted(tmp_path.glob("*.json")))
    frame = published.benchmarks()
    assert (
        list(frame.mod_ms) == [3.0] and list(frame.date) == ["2030-01-03"] and list(frame.torch) == ["2.13.0"]
    )


def test_files_of_an_installed_package_come_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "modlab"
    (package / "_results").mkdir(parents=True)
    monkeypatch.setattr(published, "PACKAGE", package)
    with pytest.raises(modlab.ModlabError, match="Install modlab again"):
        published.result_files()
    (package / "_results" / "a.json").write_text("{}")
    assert published.result_files() == [package / "_results" / "a.json"]


def test_demo_has_the_cost_and_its_control() -> None:
    frame = published.demo()
    assert {"dense", "dense_continuation", "mod"} <= set(frame.index)
    assert frame.loss["dense_continuation"] < frame.loss["mod"], "it is lossy, and the table says so"
    assert 0 < frame.keep_ratio["mod"] < 1 and frame.kv_saving["mod"] > 1
    assert frame.attrs["date"] and frame.attrs["command"]


def test_latencies_are_one_curve_and_say_where_they_come_from() -> None:
    curve = published.latencies("decode")
    rows = published.benchmarks().query(
        "result == 'growth' and case == 'decode' and context == 32768 and batch == 1"
    )
    assert curve.keep_ratio.is_monotonic_increasing and len(curve) >= 3
    assert set(curve.mod_ms) == set(rows.mod_ms) and curve.dense_ms.nunique() == 1
    origin = curve.attrs["origin"]
    assert "NVIDIA H200" in origin and "modlab bench growth" in origin and "2026-" in origin
    with pytest.raises(ModlabError, match=r"no 'decode'.*context=7.*there is .*context=32768"):
        published.latencies("decode", context=7)
    with pytest.raises(ModlabError, match="there is nothing"):
        published.latencies("decode", device="an abacus")


def test_real_models_are_the_records_of_the_gates_that_ship() -> None:
    frames = published.real_models()
    assert set(frames) == set(published.SHIPPED)
    for model, frame in frames.items():
        (path,) = (ROOT / "benchmarks" / "results").glob(f"real_{model}_2*.json")
        record = json.loads(path.read_text())
        run = [row for row in record["rows"] if row["run"] == published.SHIPPED[model]]
        assert frame.kv_saving.is_monotonic_increasing and len(frame) >= 3
        for _, told in frame.iterrows():
            (row,) = (row for row in run if row["ratio"] == told.kv_saving)
            assert ":" not in row["arm"] and told.kl == row["kl_far"]  # no control
            assert told.recall_gap_4000 == row["recall_gap"]["4000"]
            assert told.lost_4000 == pytest.approx(1 - row["retrieval_of_dense"]["4000"])
        assert record["command"] in frame.attrs["origin"] and "NVIDIA H200" in frame.attrs["origin"]


def test_times_by_saving_are_of_routed_keys_and_values() -> None:
    frames = published.kv_latencies()
    rows = published.benchmarks().query("skip == 'kv' and case in ['prefill', 'decode']")
    assert frames and sum(map(len, frames.values())) == len(rows)
    for name, frame in frames.items():
        assert frame.kv_saving.is_monotonic_increasing and list(frame) == ["kv_saving", "dense_ms", "mod_ms"]
        assert "on " in frame.attrs["origin"] and "2026-" in frame.attrs["origin"], name
        busy = "CPU time" in frame.attrs["origin"]
        assert set(frame.mod_ms) <= set(rows["mod_cpu_ms" if busy else "mod_ms"])


def timed(path: Path, what: str, date: str, *rows: tuple[str, float, float], dtype: str = "bfloat16") -> None:
    """A result file with rows (routed, kv_saving, mod_ms) of one shape and context."""
    same = {"skip": "kv", "case": "decode", "shape": "tiny", "context": 512, "batch": 1, "num_layers": 4}
    same |= {"granularity": "layer", "routed_layers": 2, "dense_ms": 9.0}
    told = [{**same, "routed": routed, "kv_saving": saving, "mod_ms": ms} for routed, saving, ms in rows]
    result = {"what": what, "device_name": "a GPU", "dtype": dtype, "command": "c", "date": date}
    path.write_text(json.dumps(result | {"versions": {"torch": "2.13.0"}, "rows": told}))


def test_no_thing_timed_takes_the_name_of_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(published, "result_files", lambda: sorted(tmp_path.glob("*.json")))
    rows = [("most", 2.0, 5.0), ("most", 4.0, 3.0), ("all", 2.0, 4.0), ("all", 4.0, 2.0)]
    timed(tmp_path / "a.json", "generate", "2030-01-01", *rows)
    timed(tmp_path / "b.json", "speed_kv", "2030-01-01", *rows, dtype="float32")
    frames = published.kv_latencies()
    assert len(frames) == 4 and sum(map(len, frames.values())) == 8
    for routed in ("most layers routed", "all layers routed"):
        for dtype in ("bfloat16", "float32"):
            (name,) = (name for name in frames if routed in name and dtype in name)
            assert dtype in frames[name].attrs["origin"] and len(frames[name]) == 2


@pytest.mark.parametrize("newest", ["generate", "speed_kv"])
def test_of_two_files_that_timed_the_same_the_newest_is_the_curve(
    newest: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of both in one curve would go to and fro."""
    monkeypatch.setattr(published, "result_files", lambda: sorted(tmp_path.glob("*.json")))
    for what, first in (("generate", 5.0), ("speed_kv", 50.0)):
        date = "2030-01-02" if what == newest else "2030-01-01"
        timed(tmp_path / f"{what}.json", what, date, ("all", 2.0, first), ("all", 4.0, first - 1))
    (frame,) = published.kv_latencies().values()
    assert list(frame.mod_ms) == ([5.0, 4.0] if newest == "generate" else [50.0, 49.0])
    assert "2030-01-02" in frame.attrs["origin"]
