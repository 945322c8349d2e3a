"""Committed figures as tables: what the files say, with where it comes from."""

import json
from pathlib import Path

import pandas as pd
import pytest

import modlab
from modlab import published
from modlab.errors import ModlabError
from modlab.measure.reporting import Report, Setting
from modlab.widgets import Frontier

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
        "result == 'growth' and case == 'decode' and context == 32768 and batch == 1 and skip != 'kv'"
    )
    assert curve.keep_ratio.is_monotonic_increasing and len(curve) >= 3
    assert set(curve.mod_ms) == set(rows.mod_ms) and curve.dense_ms.nunique() == 1
    origin = curve.attrs["origin"]
    assert "NVIDIA H200" in origin and "modlab bench growth" in origin and "2026-" in origin
    with pytest.raises(ModlabError, match=r"no 'decode'.*context=7.*there is .*context=32768"):
        published.latencies("decode", context=7)
    with pytest.raises(ModlabError, match="there is nothing"):
        published.latencies("decode", device="an abacus")


def test_latencies_are_of_whole_layers_wherever_growth_was_measured_of_the_cache_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(published, "result_files", lambda: sorted(tmp_path.glob("*.json")))
    timed(tmp_path / "b.json", "growth", "2030-01-02", ("all", 4.0, 7.0))
    timed(tmp_path / "a.json", "growth", "2030-01-01", ("alternate", 2.0, 5.0))
    for name in ("a.json", "b.json"):
        result = json.loads((tmp_path / name).read_text())
        for row in result["rows"]:
            row |= {"keep_ratio": 0.5, "speedup": 1.5, "ideal": 2.0}
            if name == "a.json":  # as the earliest files have it
                row.pop("skip")
        (tmp_path / name).write_text(json.dumps(result))
    curve = published.latencies("decode", device="a GPU", context=512)
    assert list(curve.mod_ms) == [5.0] and "2030-01-01" in curve.attrs["origin"]


def gates_record(model: str) -> Path:
    """The committed file of the study's gates of a model."""
    files = (ROOT / "benchmarks" / "results").glob(f"real_{model}_2*.json")
    (path,) = (path for path in files if json.loads(path.read_text())["what"] == published.GATES)
    return path


def test_real_models_are_the_records_of_the_gates_that_ship() -> None:
    frames = published.real_models()
    assert set(published.SHIPPED) <= set(frames)
    for model in published.SHIPPED:
        frame = frames[model]
        record = json.loads(gates_record(model).read_text())
        run = [row for row in record["rows"] if row["run"] == published.SHIPPED[model]]
        assert frame.kv_saving.is_monotonic_increasing and len(frame) >= 3
        for _, told in frame.iterrows():
            (row,) = (row for row in run if row["ratio"] == told.kv_saving)
            assert ":" not in row["arm"] and told.kl == row["kl_far"]  # no control
            assert told.recall_gap_4000 == row["recall_gap"]["4000"]
            assert told.lost_4000 == pytest.approx(1 - row["retrieval_of_dense"]["4000"])
        assert record["command"] in frame.attrs["origin"] and "NVIDIA H200" in frame.attrs["origin"]


def reported(
    path: Path, model: str, date: str, *rows: tuple[float | None, float, float], **more: object
) -> None:
    """A file of `modlab report` with rows (saving asked, saving, KL)."""
    table = pd.DataFrame({"text": ["novel"], "keep_ratio": 0.4, "kl_near": 0.1, "top1_far": 0.9})
    far = pd.DataFrame({"distance": [256], "gap": 0.1, "stderr": 0.01, "dense": 0.5})
    asked = pd.DataFrame({"distance": [256], "routed": 0.6, "dense": 0.8, "dense_right": 8})
    tasks = pd.DataFrame({"task": ["needle", "words"], "length": 4096, "dense": [1.0, 0.5], "stderr": 0.1})
    settings = [
        Setting(
            wanted,
            table.assign(kl_far=kl, kv_saving=saving, dense_kv_bytes=saving, kv_bytes=1.0),
            far,
            asked.assign(of_dense=float("nan") if saving == 4 else 0.75),
            tasks.assign(routed=[0.8, 0.3]),
        )
        for wanted, saving, kl in rows
    ]
    source = {"device_name": "a GPU", "dtype": "bfloat16", "command": "modlab report x", "date": date}
    found = Report(model, settings, source | {"versions": {"torch": "2.13.0"}}).to_dict() | more
    path.write_text(json.dumps(found))


def test_what_modlab_report_measured_is_a_line_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(published, "result_files", lambda: sorted(tmp_path.glob("*.json")))
    reported(tmp_path / "real_a_2.json", "a", "2030-01-02", (4.0, 3.5, 0.2), (2.0, 1.8, 0.1))
    reported(tmp_path / "real_a_1.json", "a", "2030-01-01", (2.0, 1.7, 0.5), (3.0, 2.7, 0.6))
    reported(tmp_path / "real_b.json", "b", "2030-01-01", (2.0, 1.9, 0.3), (4.0, 4.0, 0.4), note="Few.")
    reported(tmp_path / "real_c.json", "c", "2030-01-01", (None, 1.9, 0.3))  # one setting is no curve
    frames = published.real_models()
    assert set(frames) == {"a, modlab report on a GPU", "b, modlab report on a GPU"}
    a, b = frames["a, modlab report on a GPU"], frames["b, modlab report on a GPU"]
    assert a.kv_saving.tolist() == [1.8, 3.5] and a.kl.tolist() == [0.1, 0.2]  # the newest, by saving
    assert a.recall_gap_256.tolist() == [0.1, 0.1] and a.lost_256.tolist() == [0.25, 0.25]
    assert a.task_gap_4096.tolist() == pytest.approx([0.2, 0.2])
    assert "lost_256" not in b and b.attrs["origin"].endswith("2030-01-01, by `modlab report x`. Few.")
    (line,) = Frontier(real={"b": b}).lines
    assert {axis["key"] for axis in line["qualities"]} == {"kl", "recall_gap_256", "task_gap_4096"}
    assert (
        "RULER-kind tasks of 4,096 tokens"
        in {a["key"]: a["title"] for a in line["qualities"]}["task_gap_4096"]
    )


def test_a_newer_record_of_other_gates_takes_nothing_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = gates_record("coder-0.5b")
    record = json.loads(old.read_text())
    (tmp_path / "old.json").write_text(old.read_text())
    rows = [{**row, "run": "another"} for row in record["rows"]]
    (tmp_path / "new.json").write_text(json.dumps({**record, "date": "2030-01-01", "rows": rows}))
    monkeypatch.setattr(published, "result_files", lambda: sorted(tmp_path.glob("*.json")))
    (frame,) = published.real_models().values()
    assert record["date"] in frame.attrs["origin"] and len(frame) >= 3


def test_times_by_saving_are_of_routed_keys_and_values() -> None:
    frames = published.kv_latencies()
    rows = published.benchmarks().query("skip == 'kv' and case in ['prefill', 'decode']")
    rows = rows[rows.kv_cache_dtype != "int8"]
    assert frames and sum(map(len, frames.values())) == len(rows)
    for name, frame in frames.items():
        assert frame.kv_saving.is_monotonic_increasing and list(frame) == ["kv_saving", "dense_ms", "mod_ms"]
        assert "on " in frame.attrs["origin"] and "2026-" in frame.attrs["origin"], name
        busy = "CPU time" in frame.attrs["origin"]
        assert set(frame.mod_ms) <= set(rows["mod_cpu_ms" if busy else "mod_ms"])


def timed(
    path: Path,
    what: str,
    date: str,
    *rows: tuple[str, float, float],
    dtype: str = "bfloat16",
    shape: str = "tiny",
) -> None:
    """A result file with rows (routed, kv_saving, mod_ms) of one shape and context."""
    same = {"skip": "kv", "case": "decode", "shape": shape, "context": 512, "batch": 1, "num_layers": 4}
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


def test_times_in_eight_bits_leave_those_in_the_models_own_type(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(published, "result_files", lambda: sorted(tmp_path.glob("*.json")))
    timed(tmp_path / "own.json", "speed_kv", "2030-01-01", ("all", 4.0, 3.0))
    timed(tmp_path / "eight.json", "speed_kv", "2030-01-02", ("all", 8.0, 2.0))
    eight = json.loads((tmp_path / "eight.json").read_text())
    eight["rows"] = [row | {"kv_cache_dtype": "int8"} for row in eight["rows"]]
    (tmp_path / "eight.json").write_text(json.dumps(eight))
    assert list(published.benchmarks().mod_ms) == [3.0, 2.0]
    (frame,) = published.kv_latencies().values()
    assert list(frame.mod_ms) == [3.0]


def test_a_second_run_for_another_shape_leaves_the_first_ones_curve(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`modlab bench speed_kv` of two models on one day: two files of one benchmark and device."""
    monkeypatch.setattr(published, "result_files", lambda: sorted(tmp_path.glob("*.json")))
    timed(tmp_path / "speed_kv_a_gpu.json", "speed_kv", "2030-01-01", ("all", 2.0, 5.0), shape="large")
    timed(tmp_path / "speed_kv_a_gpu-2.json", "speed_kv", "2030-01-02", ("all", 2.0, 3.0), shape="small")
    timed(tmp_path / "speed_kv_a_gpu-3.json", "speed_kv", "2030-01-03", ("all", 4.0, 2.0), shape="small")
    large, small = (frames := published.kv_latencies()).values()
    assert [name.split(" shape")[0].rpartition(" ")[2] for name in frames] == ["large", "small"]
    assert list(large.mod_ms) == [5.0] and "2030-01-01" in large.attrs["origin"]
    assert list(small.mod_ms) == [2.0] and "2030-01-03" in small.attrs["origin"]
