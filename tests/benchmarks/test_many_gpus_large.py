"""The shape that fits on no GPU: nobody holds it whole, and each of its parts runs by one command."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.many_gpus import large_distilled, large_shape, worker
from benchmarks.many_gpus.parts import LARGE_BY_HEADS, LARGE_DISTILLED, LARGE_SPREAD
from tests.helpers.launch import finished, launch

CPU = torch.device("cpu")
IDS = torch.randint(3, 250, (1, 9), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("number", [1, 2])
def test_a_large_shape_is_made_where_its_layers_lie(number: int) -> None:
    """Its weights are those of the shape, none of them left out, and a forward runs."""
    model = large_shape.spread(large_shape.TOY, 64, [CPU] * number, torch.float32)
    assert all(not weight.is_meta and weight.isfinite().all() for weight in model.parameters())
    assert model(IDS).logits.isfinite().all()


def test_before_it_is_sharded_all_layers_lie_in_the_memory_of_one() -> None:
    """As weights of their own, each of which is sharded by itself."""
    model = large_distilled.alike(large_shape.TOY, 64, CPU, torch.float32)
    whole = large_shape.spread(large_shape.TOY, 64, [CPU], torch.float32)
    shapes = {name: weight.shape for name, weight in whole.named_parameters()}
    assert {name: weight.shape for name, weight in model.named_parameters()} == shapes
    held = {weight.data_ptr(): weight.numel() for weight in model.parameters()}
    of_layers = sum(weight.numel() for weight in model.model.layers.parameters())
    ends = sum(weight.numel() for weight in model.parameters()) - of_layers
    assert sum(held.values()) == ends + of_layers // large_shape.TOY.layers
    assert model(IDS).logits.isfinite().all()


def test_peaks_stand_next_to_the_plan_after_every_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The largest of all GPUs; what is written is there when a limit ends the part."""
    options = argparse.Namespace(work=tmp_path, file="own", model=["llama-3-70b"], toy=True)
    found: dict[str, Any] = {"lines": []}
    told = large_distilled.Measured(options, torch.nn.Linear(2, 3), found, planned=32.0)
    for step, most in ((1, 24), (2, 40)):
        peaks = {"cuda:0": 2**30, "cuda:1": most * 2**30}
        monkeypatch.setattr(worker, "allocated", lambda peaks=peaks: peaks)
        told.log({"step": step, "kl": 0.5, "tokens_per_s": 100.0 * step, "of no account": 1})
        (scene,) = json.loads((tmp_path / "own.json").read_text())["scenes"].values()
        assert scene["lines"][-1] == {"step": step, "kl": 0.5, "tokens_per_s": 100.0 * step}
        assert scene["allocated"] == peaks and scene["weight_bytes"] == {"cpu": 36}
        assert scene[large_distilled.TIMES_PLAN] == most / 32 and "not measured" not in scene
    assert len(scene["lines"]) == 2 and "tokens_per_s" not in scene, "both may have compiled"


def record_of(folder: Path, gpus: int, part: str) -> dict[str, Any]:
    """What a call on the CPU writes of a part."""
    command = [sys.executable, "-m", "benchmarks.many_gpus", "--toy", "--seconds", "220"]
    command += ["--gpus", str(gpus), "--out", str(folder), "--work", str(folder / "work"), "--only", part]
    finished(command)
    (file,) = folder.glob("*.json")
    found: dict[str, Any] = json.loads(file.read_text())["parts"][part]
    assert found["ended with"] == 0, found.get("end of its log")
    return found


def test_two_processes_distil_a_shape_of_which_each_holds_half(tmp_path: Path) -> None:
    """Ten steps with a line each, the plan next to what was measured; on a CPU nothing passes for a peak."""
    options = ["--gpus", 2, "--out", tmp_path, "--work", tmp_path, "--model", "llama-3-70b"]
    launch("-m benchmarks.many_gpus", 2, "--toy", "--part", LARGE_DISTILLED, "--file", "own", *options)
    (scene,) = json.loads((tmp_path / "own.json").read_text())["scenes"].values()
    assert [line["step"] for line in scene["lines"]] == list(range(1, 11))
    assert all(line["kl"] >= 0 and 0 < line["keep_ratio"] <= 1 for line in scene["lines"])
    assert scene["lines"][-1]["keep_ratio"] < scene["lines"][0]["keep_ratio"], "its routers learn"
    whole = large_distilled.alike(large_shape.TOY, 64, CPU, torch.float32)
    bytes_of_all = sum(weight.nbytes for weight in whole.parameters())
    assert len(scene["weight_bytes"]) == 2
    for held in scene["weight_bytes"].values():  # half of them, and the routers
        assert bytes_of_all / 2 <= held < 0.6 * bytes_of_all
    assert {line["way"] for line in scene["planned"]} == {"DDP", "FSDP2"}
    assert scene["allocated"] == {} and scene["not measured"] == large_distilled.NO_GPU
    assert large_distilled.TIMES_PLAN not in scene and len(scene["host_bytes"]) == 2


@pytest.mark.long
def test_four_processes_distil_it_by_one_command(tmp_path: Path) -> None:
    (scene,) = record_of(tmp_path, 4, LARGE_DISTILLED)["scenes"].values()
    assert len(scene["lines"]) == large_distilled.STEPS and len(scene["weight_bytes"]) == 4


@pytest.mark.long
@pytest.mark.parametrize(("part", "places"), [(LARGE_SPREAD, 1), (LARGE_BY_HEADS, 4)])
def test_every_kind_of_prompt_has_a_row(tmp_path: Path, part: str, places: int) -> None:
    """At both lengths, with bytes of each process; tensor parallelism says why prompts do not leave."""
    found = record_of(tmp_path, 4, part)
    assert len(found["weight_bytes"]) == places and len(found["by length"]) == 2
    for length, kinds in found["by length"].items():
        assert kinds.keys() == large_shape.FIRST.keys() | large_shape.THEN.keys()
        assert found["planned"][length]
        refused = {name for name, row in kinds.items() if "refused" in row}
        assert refused == ({name for name in kinds if "leaving" in name} if places > 1 else set())
        for name in kinds.keys() - refused:
            assert kinds[name]["finite"] and len(kinds[name]["kv_bytes"]) == places
