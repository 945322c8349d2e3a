"""What is asked of less compute a token against what results have: nothing is met that was not run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from scripts.pages import depth, depth_goals, depth_times

ORIGIN = {"date": "2026-12-02", "device_name": "card", "dtype": "bfloat16", "command": "the command"}
ORIGIN |= {"versions": {"torch": "2.13"}}  # type: ignore[dict-item]


def arm(name: str, **fields: Any) -> dict[str, Any]:
    row = {
        "model": "coder-0.5b", "arm": name, "tokens": 8_000_000, "compute": 0.67, "ratio": 4.05,
        "length": 8192, "kl_far": 0.05, "kl_far_by_text": {"novels": 0.05, "wikitext": 0.06, "headers": 0.04},
        "recall_gap": {"256": 0.0, "7000": 0.015}, "tasks": {}, "compute_asked": None,
        "compute_by_text": {"novels": 0.65, "wikitext": 0.69},
    }  # fmt: skip
    return row | fields


def leaving(after: float, **fields: Any) -> dict[str, Any]:
    mod = {"skip": "kv+prompt", "leave_after": round(after, 4)}
    return arm("kv+leave-4x", arm_fields={"mod": mod}, **fields)


def table(root: Path, **results: dict[str, Any]) -> list[list[str]]:
    folder = root / "benchmarks" / "results"
    folder.mkdir(parents=True, exist_ok=True)
    for name, one in results.items():
        (folder / f"{name}.json").write_text(json.dumps(one))
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in depth_goals.block(root).splitlines()]


def study(*rows: dict[str, Any], prefill: tuple[dict[str, Any], ...] = ()) -> dict[str, Any]:
    return {"what": "depth", **ORIGIN, "rows": list(rows), "prefill": list(prefill)}


def tasks(score: float, *more: str) -> dict[str, Any]:
    mean = {"score": score, "dense": 0.5, "gap_stderr": 0.005}
    return {"piqa": {}, **dict.fromkeys(more, {}), "mean": mean}


def test_without_a_result_all_is_said_to_be_not_run(tmp_path: Path) -> None:
    found = table(tmp_path)[2:]
    assert len(found) == 14 and all(row[2] == "not run" and row[3] == "" for row in found)
    assert depth_times.block(tmp_path) == depth_times.NONE


def test_the_arm_nearest_to_dense_counts_and_each_goal_by_itself(tmp_path: Path) -> None:
    worse, smaller = leaving(2 / 3, kl_far=0.2), leaving(2 / 3, kl_far=0.01, ratio=3.0)
    untrained = leaving(2 / 3, kl_far=0.01, tokens=0)
    best = leaving(2 / 3, kl_far=0.061, tasks=tasks(0.496, "humaneval"))
    found = table(tmp_path, depth_a=study(worse, smaller, untrained, best))
    assert found[2][1:] == ["tasks 99% of dense", "99.2% ± 1.0%, mean of 2", "met"]
    assert found[3][2:] == ["+0.015, 7,000 tokens away", "met"] and found[4][2:] == ["0.061", "missed"]
    best["tasks"] = tasks(0.494)
    found = table(tmp_path, depth_a=study(best, leaving(0.5, tasks=tasks(0.486, "humaneval"))))
    assert found[2][3] == "missed; HumanEval not run"
    (half,) = (row for row in found if row[0] == "coder-0.5b: leaving after a half, K/V at 4x")
    assert half[2].startswith("tasks 97.2% ± 1.0%, mean of 2; KL 0.050") and half[3] == "met"


def test_token_level_skipping_has_to_win_on_texts_and_tasks(tmp_path: Path) -> None:
    got = {"novels": 0.915, "wikitext": 0.95, "headers": 0.93}
    token = arm("written-0.9-scored", compute_asked=0.9, compute_by_text=got, tasks=tasks(0.49))
    texts = {"novels": 0.04, "wikitext": 0.07, "headers": 0.05}
    static = arm("static-layer-0.9", compute_asked=0.9, kl_far=0.06, kl_far_by_text=texts, tasks=tasks(0.47))
    found = table(tmp_path, depth_a=study(token, static))
    at = next(number for number, row in enumerate(found) if "token by token at 0.9" in row[0])
    assert "better on 2 of 3; tasks +0.020 ± 0.007" in found[at][2] and found[at][3] == "met"
    assert found[at + 1][3] == "met"
    token["tasks"], got["novels"] = tasks(0.476), 0.87
    found = table(tmp_path, depth_a=study(token, static))
    assert found[at][3] == "missed" and found[at + 1][3] == "missed"


def prompt(model: str, **fields: Any) -> dict[str, Any]:
    row = {
        "case": "prompt",
        "skip": "kv+prompt",
        "context": 32768,
        "batch": 1,
        "ideal": 2.4,
        "dense_ms": 330.0,
    }
    return row | {"model": model, "mod_ms": 150.0} | fields


@pytest.mark.parametrize("drawn", [1.5, 1.9])
def test_own_weights_count_more_than_a_shape(tmp_path: Path, drawn: float) -> None:
    shape = prompt(
        "", shape="coder-1.5b", case="prefill", keep_ratio=0.25, speedup=drawn, granularity="kv_head"
    )
    eighth = shape | {"keep_ratio": 0.125, "speedup": 3.0}
    layer = shape | {"granularity": "layer", "speedup": 3.0}
    long = shape | {"shape": "llama-3-8b", "context": 131_072, "rounds": 1}
    speed = {"what": "speed_leave", **ORIGIN, "rows": [shape, eighth, layer, long]}
    found = table(tmp_path, speed_leave_x=speed)
    (line,) = (row for row in found if row[0].startswith("llama-3-8b: a prompt of 131,072"))
    assert "drawn decisions, one round; by" in line[2] and line[3] == "missed"
    found = table(tmp_path, speed_leave_x=speed | {"note": "Compiling was in it: no speeds."})
    (line,) = (row for row in found if row[0].startswith("llama-3-8b: a prompt of 131,072"))
    assert line[2].endswith("by operations 2.40x). Compiling was in it: no speeds."), "what is wrong with it"
    assert line[3] == "not settled"
    (line,) = (row for row in found if row[0].startswith("coder-1.5b: a prompt"))
    assert line[2].startswith(f"{drawn:.2f}x (random weights") and "not run with its own weights" in line[3]
    fields = {
        "routing": "trained",
        "routers": "coder-1.5b-kv",
        "text": "wikitext",
        "keep_ratio": 0.2,
        "speedup": 1.85,
    }
    real = prompt("coder-1.5b", ratio=4.4, dense_token_ms=2.2, mod_token_ms=2.0, token_speedup=1.1, **fields)
    found = table(tmp_path, depth_b=study(prefill=(real,)) | {"note": "Of its training."})
    (line,) = (row for row in found if row[0].startswith("coder-1.5b: a prompt"))
    assert line[2].startswith("1.85x (4.4x by trained routers, its own weights; by") and line[3] == "met"
    assert "training" not in line[2]
    times = depth_times.block(tmp_path)
    assert (
        "`coder-1.5b-kv` on wikitext | 4.40x | 330.0 to 150.0 (1.85x) | 2.40x | 2.20 to 2.00 (1.10x)" in times
    )
    assert depth.block(tmp_path) == depth.NONE, "times alone are no arm"


def test_the_papers_recipe_is_said_with_losses_and_time(tmp_path: Path) -> None:
    losses = {"novels": 3.5, "wikitext": 2.75, "headers": 2.0}
    took = {"context": 8192, "speedup": 1.3, "token_speedup": 1.1}
    full = arm("paper-alpha-0.01", model="smollm2", ratio=1.9, tokens=40_000_000, latency=took)
    full |= {"loss_by_text": losses, "dense_loss_by_text": losses | {"novels": 3.25}}
    old = arm("paper-alpha-0.1", ratio=1.9)
    found = [row for row in table(tmp_path, depth_a=study(full, old)) if "paper's recipe" in row[0]]
    assert [row[0] for row in found] == ["smollm2: the paper's recipe", "coder-0.5b: the paper's recipe"]
    assert "0.67 of the operations (novels 0.65, wikitext 0.69), K/V" in found[0][2]
    assert "40M tokens" in found[0][2] and "novels 3.50 (dense 3.25)" in found[0][2]
    assert "1.30x of dense for a prompt of 8,192 tokens, 1.10x for a token" in found[0][2]
    assert "loss not run; time not run" in found[1][2]
