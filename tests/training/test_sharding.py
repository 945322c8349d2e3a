"""Runs whose weights FSDP2 shards, taken up by more and by fewer processes, are one run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from accelerate.utils import DistributedType
from transformers import AutoModelForCausalLM

import modlab
from modlab.errors import ModlabError
from modlab.plan import sizes_of
from modlab.training.processes import Processes
from modlab.training.sharding import shard
from tests.helpers.launch import launch
from tests.helpers.runs import OBJECTIVES, began, model_in_bf16, rows
from tests.helpers.steps import KEYS, adapted, model_of

WORKER = Path(__file__).with_name("sharded_in_processes.py")


def from_step(step: int, of: Path, to: Path) -> Path:
    """A run's folder as it was after so many steps."""
    shutil.copytree(of / "checkpoints" / f"step_{step}", to / "checkpoints" / f"step_{step}")
    return to


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_sharded_run_is_one_run(tmp_path: Path, objective: str) -> None:
    """One process alone; its second step taken up by two that shard; their third one taken up by one."""
    settings = began(tmp_path / "one", 4, objective)
    whole = modlab.train(model_in_bf16(), rows(), settings, eval_data=rows()[:3])
    shards = from_step(2, tmp_path / "one", tmp_path / "two")
    printed = launch(WORKER, 2, shards, objective)
    assert not printed.strip()
    pair = [json.loads((shards / f"rank_{rank}.json").read_text()) for rank in range(2)]
    planned = sizes_of(whole.model.config, 2)
    assert sum(one["part"] for one in pair) == planned.parameters
    assert max(one["part"] for one in pair) == planned.by_rows
    found = modlab.calibrate(whole.model, rows(), keep_ratio=0.5)
    for one in pair:
        assert dict(one["calibrated"]) == pytest.approx(found, abs=0.02)
        assert "load it whole" in one["refused"][0] and len(one["refused"]) == 2
    settings = began(from_step(3, shards, tmp_path / "again"), 4, objective)
    again = modlab.train(model_in_bf16(), rows(), settings, eval_data=rows()[:3])
    wanted = whole.history.set_index("step")
    for frame in (pair[0]["history"], again.history.to_dict("list")):
        for column in ("loss", "keep_ratio", "objective", "grad_norm", "tokens", "lr", "eval_loss"):
            for step, value in zip(frame["step"], frame[column], strict=True):
                expected = pytest.approx(wanted.loc[step, column], rel=2e-3, abs=1e-5, nan_ok=True)
                assert value == expected, (column, step)
    assert pair[0]["history"]["step"] == [3, 4]
    expected = whole.model.state_dict()
    for folder in (shards, tmp_path / "again"):
        loaded = AutoModelForCausalLM.from_pretrained(folder / "model")
        assert modlab.is_converted(loaded)
        assert loaded.dtype == torch.bfloat16
        for name, value in loaded.state_dict().items():
            torch.testing.assert_close(value, expected[name], rtol=2e-2, atol=2e-3)


def test_checkpoints_of_other_global_batches_are_refused(tmp_path: Path) -> None:
    modlab.train(model_in_bf16(), rows(), began(tmp_path / "one", 4))
    with pytest.raises(ModlabError, match=r"global_batch=2 \(was 4\)"):
        modlab.train(model_in_bf16(), rows(), began(tmp_path / "one", 2))


def test_adapters_are_not_sharded() -> None:
    with pytest.raises(ModlabError, match=r"parts of the adapters: launch with --multi_gpu"):
        shard(adapted(model_of(KEYS)), None, bf16=False)


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        (DistributedType.DEEPSPEED, "its engine clips gradients"),
        (DistributedType.MEGATRON_LM, "models of its own"),
    ],
)
def test_other_ways_to_shard_are_refused(
    monkeypatch: pytest.MonkeyPatch, kind: DistributedType, why: str
) -> None:
    from accelerate import Accelerator

    monkeypatch.setattr(Accelerator, "distributed_type", property(lambda self: kind))
    with pytest.raises(ModlabError, match=f"{why}.*--fsdp_version 2"):
        Processes()
