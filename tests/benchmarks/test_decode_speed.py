"""`python -m benchmarks.decode_speed` at tiny sizes: that it runs and writes. Never a claim about time."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from benchmarks import decode_speed
from modlab.kernels import decode_attention, decode_linear


def test_it_writes_what_each_way_takes(tmp_path: Path) -> None:
    out = tmp_path / "rows.json"
    decode_speed.main(["step", "prefill", "early", "--toy", "--out", str(out)])
    rows = json.loads(out.read_text())
    steps = [row for row in rows if row["part"] == "step"]
    asked = sum(len(ways) for _, _, ways in decode_speed.STEPS + decode_speed.EARLY)
    assert len(steps) == asked and all(row["ms"] > 0 for row in steps)
    assert {row["gates"] for row in rows if row["part"] == "prefill"} > {"dense", "layer", "kv_head"}


def test_nothing_begins_after_the_limit(tmp_path: Path) -> None:
    decode_speed.main(["step", "--toy", "--seconds", "0", "--out", str(tmp_path / "rows.json")])
    assert [r["part"] for r in json.loads((tmp_path / "rows.json").read_text())] == ["models", "kernels"]


def test_attention_alone_is_held_to_the_reference() -> None:
    case = decode_speed.Attention(decode_speed.Cache("kv_head", 1, 140, 0.25), 1, torch.device("cpu"))
    with decode_speed.chosen(shares=decode_attention.Shares()):
        assert case.error() < 1e-3
    assert decode_attention.SHARES is None
    assert case.bytes == sum(case.lengths[0]) * 128 * 4


def test_a_linear_map_alone_is_held_to_the_reference() -> None:
    x, weights = torch.randn(3, 1, 256).half(), [torch.randn(64, 256).half()]
    with decode_speed.chosen(narrow=decode_linear.Tile(32, 128)):
        assert decode_speed._linear_row(x, weights, "tile", torch.device("cpu"))["error"] < 1e-3


def test_steps_are_timed_with_what_was_fastest_alone() -> None:
    tiles, cuts = decode_speed.TILES, decode_speed.CUTS
    rows = [
        {"part": "linear", "E": E, "batch": 8, "way": decode_speed._tile_name(tiles[i]), "us": us}
        for E, i, us in ((4096, 0, 5.0), (4096, 1, 6.0), (1024, 0, 4.0), (1024, 1, 1.0), (14336, 3, 9.0))
    ]
    rows += [
        {"part": "attention", "gates": gates, "cut": cut, "us": us}
        for gates, cut, us in (("kv_head", "parts", 1), ("kv_head", "4x32", 2), ("kv_head", "1x128", 3))
    ]
    asked = {"rows": 16, "shares": cuts["2x64"], "aside": True}
    found = decode_speed.with_best(asked, rows)
    assert found == asked | {"narrow": tiles[1], "wide": tiles[3], "shares": cuts["4x32"]}
    assert decode_speed.with_best(asked, []) == asked
