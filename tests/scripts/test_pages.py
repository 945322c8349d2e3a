"""Generated pages: none is stale, every module can be listed, and a page shows what its result files say."""

import json
from pathlib import Path
from typing import Any

import pytest

from scripts.pages import architecture, costs, results
from scripts.pages.blocks import BLOCKS, PAGES, ROOT, fill, names, stale


@pytest.mark.parametrize("page", PAGES)
def test_no_page_is_stale(page: str) -> None:
    assert stale([page]) == [], f"{page} is stale: run python -m scripts.pages"


def test_every_block_is_on_a_page() -> None:
    shown = [name for page in PAGES for name in names((ROOT / page).read_text(encoding="utf-8"))]
    assert sorted(shown) == sorted(BLOCKS)


def test_what_is_written_by_hand_stays() -> None:
    page = "# A\n\n<!-- made: why -->\nold\n<!-- end: why -->\n\nby hand\n"
    filled = fill(page)
    assert filled.startswith("# A\n") and filled.endswith("\nby hand\n") and "old" not in filled
    assert fill(filled) == filled
    with pytest.raises(KeyError, match="nobody"):
        fill("<!-- made: nobody -->\n<!-- end: nobody -->")


def test_every_module_says_what_it_is() -> None:
    files = [p for p in (ROOT / "modlab").rglob("*.py") if not architecture.LEFT_OUT & set(p.parts)]
    silent = [str(path.relative_to(ROOT)) for path in files if not architecture.summary(path)]
    assert len(files) > 100 and silent == [], "the first line of a docstring is a module's line in the tree"


def test_tables_show_the_newest_result_of_each_device(tmp_path: Path) -> None:
    assert "No result files" in results.benchmarks(tmp_path)
    row = {"case": "prefill", "shape": "wide", "context": 2048, "batch": 1, "keep_ratio": 0.25}
    row |= {"routed": "alternate", "routed_layers": 4, "num_layers": 8}
    row |= {"dense_ms": 1234.5, "mod_ms": 800.0, "ideal": 1.6, "kv_saving": 1.59}
    folder = tmp_path / "benchmarks" / "results"
    folder.mkdir(parents=True)
    for date, speedup in (("2030-01-02", 1.25), ("2030-01-03", 1.5), ("2030-01-01", 1.125)):
        result = {"what": "prefill", "device_name": "a CPU", "dtype": "float32", "date": f"{date}T00:00:00"}
        result |= {"command": "modlab bench prefill", "versions": {"torch": "2.13.0"}}
        text = json.dumps(result | {"rows": [row | {"speedup": speedup}]})
        (folder / f"prefill_{date}.json").write_text(text)
    (folder / "real.json").write_text(json.dumps({"what": "real", "date": None, "rows": []}))
    table = results.benchmarks(tmp_path)
    assert "1.50x" in table and "1.25x" not in table and "1.12x" not in table
    assert "`modlab bench prefill`" in table and "1,234.5 ms" in table and "25%" in table


def test_times_in_eight_bits_have_a_table_of_their_own(tmp_path: Path) -> None:
    row: dict[str, Any] = {
        "case": "decode",
        "shape": "wide",
        "context": 32768,
        "batch": 1,
        "keep_ratio": 0.25,
    }
    row |= {"routed": "all", "routed_layers": 8, "num_layers": 8, "granularity": "layer", "dense_ms": 9.0}
    row |= {"skip": "kv", "speedup": 2.0, "ideal": 3.0}
    folder = tmp_path / "benchmarks" / "results"
    folder.mkdir(parents=True)
    for stored, ms in (("auto", 4.5), ("int8", 3.5)):
        result: dict[str, Any] = {"what": "speed_kv", "device_name": "a GPU", "dtype": "bfloat16"}
        result |= {"command": "modlab bench"}
        result |= {"versions": {"torch": "2.13.0"}, "settings": {"shape": "wide", "kv_cache_dtype": stored}}
        result |= {"date": "2030-01-01", "rows": [row | {"mod_ms": ms, "kv_saving": ms}]}
        (folder / f"{stored}.json").write_text(json.dumps(result))
    eight, own = results.benchmarks(tmp_path).split('With `skip="kv"`:')
    assert "keys and values in eight bits" in eight and "3.50 ms" in eight and "4.50 ms" not in eight
    assert "4.50 ms" in own and "3.50 ms" not in own


@pytest.mark.parametrize("what", results.SHAPED)
def test_a_newer_result_of_another_shape_hides_none(what: str) -> None:
    row = {"case": "decode", "batch": 1, "keep_ratio": 0.25, "mod_ms": 3.0}
    one: dict[str, Any] = {"what": what, "device_name": "a GPU", "date": "2030-01-01", "rows": [row]}
    one["settings"] = {"shape": "wide"}
    other = one | {"date": "2030-01-02", "settings": {"shape": "narrow"}}
    again = one | {"date": "2030-01-03", "rows": [row | {"mod_ms": 2.0}]}
    found = results.newest([again, one, other])
    assert [(result["date"], result["rows"][0]["mod_ms"]) for result in found] == [
        ("2030-01-02", 3.0), ("2030-01-03", 2.0),
    ]  # fmt: skip
    assert [result["of"] for result in found] == [[other], [again]]


def suite(date: str, part: str, *rows: dict[str, Any]) -> dict[str, Any]:
    """A run of some parts of `speed_kv`."""
    return {
        "what": "speed_kv", "device_name": "a GPU", "dtype": "bfloat16", "date": date, "commit": "abc",
        "settings": {"shape": "llama-3-8b"}, "versions": {"torch": "2.13.0"},
        "command": f"modlab bench speed_kv --only {part}", "rows": list(rows),
    }  # fmt: skip


def row_of(case: str, ms: float, context: int = 32768, keep: float = 0.25, **more: Any) -> dict[str, Any]:
    row = {"case": case, "shape": "llama-3-8b", "context": context, "batch": 1, "skip": "kv"}
    row |= {"routed": "all", "granularity": "layer", "routed_layers": 32, "num_layers": 32}
    return row | {
        "keep_ratio": keep, "dense_ms": 10.0, "mod_ms": ms, "speedup": 10 / ms, "ideal": 2.0,
        "kv_saving": 3.0,
    } | more  # fmt: skip


def test_a_newer_run_of_one_part_hides_no_row_of_the_others(tmp_path: Path) -> None:
    """Each row is the newest of its kind and says of which run it is; a run of which nothing is left is not
    told of."""
    whole = suite(
        "2030-01-01", "all", row_of("prefill", 8.0), row_of("decode", 7.0), row_of("decode", 6.0, keep=0.125)
    )
    again = suite("2030-01-02", "first", row_of("decode", 5.5))
    last = suite(
        "2030-01-02T01", "decode", row_of("decode", 5.0), row_of("decode", 4.0, batch=8),
        row_of("decode", 3.0, prompt="synthetic keys and values"),
    )  # fmt: skip
    (found,) = results.newest([last, whole, again])
    assert [(row["case"], row["mod_ms"], row["run"]) for row in found["rows"]] == [
        ("prefill", 8.0, 0), ("decode", 5.0, 1), ("decode", 6.0, 0), ("decode", 4.0, 1), ("decode", 3.0, 1),
    ]  # fmt: skip
    folder = tmp_path / "benchmarks" / "results"
    folder.mkdir(parents=True)
    for number, result in enumerate((last, whole, again)):
        (folder / f"speed_kv_a-gpu-{number}.json").write_text(json.dumps(result))
    page = results.benchmarks(tmp_path)
    assert (
        "(1) `modlab bench speed_kv --only all`" in page
        and "(2) `modlab bench speed_kv --only decode`" in page
    )
    assert "--only first" not in page and "commit abc" in page
    assert "| 5.00 ms | 2.00x | 2.00x | 3.00x |  | 2 |" in page
    assert "| 8.00 ms | 1.25x | 2.00x | 3.00x |  | 1 |" in page
    assert results.newest_headline(tmp_path, "speed_kv") == found


def test_conditions_of_a_run_stand_with_its_command() -> None:
    noted = suite("2030-01-01", "all", row_of("prefill", 8.0)) | {"note": "Alone on its card."}
    assert "2030-01-01 (alone on its card):" in results.runs([noted])
    told = results.runs([noted, suite("2030-01-02", "decode", row_of("decode", 5.0))])
    assert "commit abc (alone on its card); (2) `modlab bench speed_kv --only decode`" in told


def test_the_largest_batch_replaces_the_one_before() -> None:
    """Its rows are what was measured."""
    one, other = (row_of("throughput", 1.0, batch=batch) for batch in (90, 96))
    (found,) = results.newest([suite("2030-01-01", "a", one), suite("2030-01-02", "b", other)])
    assert [row["batch"] for row in found["rows"]] == [96] and len(found["of"]) == 1


@pytest.mark.parametrize("newest", ["A", "Z"])
def test_the_headline_is_the_newest_of_all_devices(tmp_path: Path, newest: str) -> None:
    with pytest.raises(SystemExit, match=r"modlab bench speed_kv --shape llama-3-8b.*commit its file"):
        results.headline_speed(tmp_path)
    folder = tmp_path / "benchmarks" / "results"
    folder.mkdir(parents=True)
    dates = {"A": "2030-01-01", "Z": "2030-01-01", newest: "2030-01-02", "other": "2030-01-03"}
    for device, date in dates.items():
        shape = "wide" if device == "other" else "llama-3-8b"
        result = {"what": "speed_kv", "device_name": device, "date": date, "settings": {"shape": shape}}
        result["rows"] = []
        (folder / f"{device}.json").write_text(json.dumps(result))
    assert results.newest_headline(tmp_path, "speed_kv")["device_name"] == newest


@pytest.mark.parametrize("part, said", [(0.125, "12.5%"), (0.25, "25%"), (1.0, "100%"), (0.0998, "10%")])
def test_a_share_of_an_eighth_is_not_rounded(part: float, said: str) -> None:
    assert results.share(part) == said


def test_the_front_page_says_what_a_real_model_loses() -> None:
    said = " ".join(costs.real_sentence(ROOT).split())
    assert "loses verbatim recall at 1.8x" in said
    assert "0.46/0.54/0.58/0.66 to 1.21/1.73/2.47/2.75 nats" in said
    assert said in " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())


def test_real_rows_have_every_figure_that_is_shown(tmp_path: Path) -> None:
    with pytest.raises(ValueError):  # no such file: an error, not an empty sentence
        costs.real_sentence(tmp_path)
