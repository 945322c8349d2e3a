"""FSDP2: sharded models give the logits and the gradients of whole ones, in bf16 too; routers stay fp32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.launch import launch
from tests.helpers.sharding import IDS, SKIPS, routed, trained

WORKER = Path(__file__).with_name("shard_in_processes.py")


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> dict[Any, Any]:
    """What two processes found."""
    out = tmp_path_factory.mktemp("sharded")
    launch(WORKER, 2, out)
    return torch.load(out / "rank_0.pt", weights_only=False)


@pytest.mark.parametrize("skip", SKIPS)
@pytest.mark.parametrize("kind", ["fp32", "bf16", "mixed"])
def test_a_sharded_model_is_the_whole_one(sharded: dict[Any, Any], skip: str, kind: str) -> None:
    dtype = torch.bfloat16 if kind == "bf16" else torch.float32
    model = routed(skip, dtype)
    rows = torch.arange(len(IDS))
    expected, found = trained(model, IDS, rows), sharded[skip, kind]
    assert found["gates"] == expected["gates"] == list(range(2)), "a recording holds all layers' gates"
    assert set(found["dtypes"].values()) == {torch.float32}
    assert found["dtypes"].keys() == expected["dtypes"].keys()
    off = (found["logits"] - expected["logits"]).abs()
    most = 0.015 if skip == "kv int8" else 0.01  # what bf16 moves may be rounded to another whole number
    assert off.mean() < most if kind == "mixed" else off.max() < 1e-4
    if kind == "fp32":
        for name in (name for name in expected if name.startswith("gradient")):
            off = (found[name] - expected[name]).norm() / expected[name].norm().clamp(min=1e-9)
            assert off < 1e-3, f"{name} is off by {off:.1%}"
    routers = [found[name].norm() for name in found if "mod_router" in name]
    assert routers and all(0 < norm < float("inf") for norm in routers)
