"""`python -m benchmarks.decode_speed` at tiny sizes: that it runs and writes. Never a claim about time."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch

from benchmarks import decode_speed

KEYS = ("layer", "kv_head")
"""Gates that route the cache."""


def test_it_writes_what_steps_and_prompts_take(tmp_path: Path) -> None:
    out = tmp_path / "rows.json"
    decode_speed.main(["step", "prefill", "--toy", "--out", str(out)])
    rows = json.loads(out.read_text())
    steps = [row for row in rows if row["part"] == "step"]
    assert [(row["batch"], row["gates"]) for row in steps] == [
        (b, g or "dense") for b, g in decode_speed.STEPS
    ]
    assert all(row["ms"] > 0 for row in steps)
    prompts = [row for row in rows if row["part"] == "prefill"]
    assert [row["gates"] for row in prompts] == [
        way.gates or "dense" for way in decode_speed.prompt_ways(True, None)
    ]
    routed = {(row["gates"], row["kept"], row["defer_tokens"] > 0) for row in prompts if row["gates"] in KEYS}
    assert routed == set(itertools.product(KEYS, (0.25, 1.0), (False, True)))
    assert any(row["guessed"] for row in prompts)


def test_routers_of_a_prompt_alone_are_held_to_their_own_forward(tmp_path: Path) -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    out = tmp_path / "rows.json"
    decode_speed.main(["router", "prefill", "--toy", "--out", str(out)])
    written = json.loads(out.read_text())
    rows = [row for row in written if row["part"] == "router"]
    assert len(rows) >= len(decode_speed.TILES) and all(row["error"] < 1e-5 for row in rows)
    fastest = min(rows, key=lambda row: row["us"])
    tiles = [row["tile"] for row in written if row["part"] == "prefill" and row["tile"]]
    assert len(tiles) == len(KEYS) and all(tile.items() <= fastest.items() for tile in tiles)


def test_nothing_begins_after_the_limit(tmp_path: Path) -> None:
    decode_speed.main(["step", "--toy", "--seconds", "0", "--out", str(tmp_path / "rows.json")])
    assert [r["part"] for r in json.loads((tmp_path / "rows.json").read_text())] == ["models"]


def test_attention_alone_is_held_to_the_reference() -> None:
    case = decode_speed.Attention(decode_speed.Cache("kv_head", 1, 140, 0.25), 1, torch.device("cpu"))
    assert case.error() < 1e-3
    assert case.bytes == sum(case.lengths[0]) * 128 * 4


def test_attention_to_codes_alone_is_held_to_the_reference() -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    case = decode_speed.Attention(decode_speed.Cache("kv_head", 1, 140, 0.25, True), 1, torch.device("cpu"))
    assert case.error() < 2e-3
    assert case.bytes == sum(case.lengths[0]) * (2 * 128 + 2 * 2)


def test_a_linear_map_alone_is_held_to_the_reference() -> None:
    x, weights = torch.randn(3, 1, 256).half(), [torch.randn(64, 256).half()]
    assert decode_speed._linear_row(x, weights, "kernel", torch.device("cpu"))["error"] < 1e-3
