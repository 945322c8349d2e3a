"""Runs whose weights FSDP2 shards, taken up by more and by fewer processes, are one run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from accelerate.utils import DistributedType
from transformers import AutoModelForCausalLM

import modlab
from modlab.errors import ModlabError
from modlab.plan import sizes_of
from modlab.saving.files import ROUTER_FILE
from modlab.training import sharding
from modlab.training.processes import Processes
from tests.helpers.adapters import KINDS, adapting, kind_of
from tests.helpers.launch import launch
from tests.helpers.runs import OBJECTIVES, began, from_step, model_in_bf16, rows
from tests.helpers.steps import model_of
from tests.helpers.tokenizers import make_tokenizer

WORKER = Path(__file__).with_name("sharded_in_processes.py")
ADAPTERS = Path(__file__).with_name("adapters_in_processes.py")


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_sharded_run_is_one_run(tmp_path: Path, objective: str) -> None:
    """One process alone; its second step taken up by two that shard; their third one taken up by one."""
    settings = began(tmp_path / "one", 4, objective)
    whole = modlab.train(model_in_bf16(), rows(), settings, eval_data=rows()[:3])
    shards = from_step(2, tmp_path / "one", tmp_path / "two")
    printed = launch(WORKER, 2, shards, objective)
    assert not printed.strip()
    pair = [json.loads((shards / f"rank_{rank}.json").read_text()) for rank in range(2)]
    if objective == "distil":  # every process refuses a base of which it holds no part that differs
        for one in pair:
            assert "layers.1.mlp.up_proj.weight is bfloat16" in one["other base"]
            assert len(one["other weights"]) == 2
            assert all("--fsdp_cpu_ram_efficient_loading false" in said for said in one["other weights"])
        assert pair[0]["loaded"] == pair[1]["loaded"] > 0, "each of them has loaded the checkpoint"
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


def test_sharded_adapters_and_routers_come_back_whole(tmp_path: Path) -> None:
    """Trained by two processes that shard: what they save loads as one process's; their second step is taken
    up by one process alone."""
    model_of(None).save_pretrained(tmp_path / "base")
    make_tokenizer().save_pretrained(tmp_path / "base")
    launch(ADAPTERS, 2, tmp_path)
    for kind in KINDS:
        model, settings = kind_of(tmp_path, kind), adapting(tmp_path / "one" / kind)
        whole = modlab.train(model, rows(), settings).model
        expected = whole(rows()[:2]).logits
        folder = tmp_path / "two" / kind
        again, _ = modlab.load(folder / "model")
        assert modlab.is_converted(again) and hasattr(again, "get_base_model")
        torch.testing.assert_close(again(rows()[:2]).logits, expected, rtol=1e-3, atol=1e-4)
        saved = {path.name for path in (folder / "model").iterdir()}
        assert (ROUTER_FILE in saved) == (kind != "routers of PEFT's")
        by_hand = tmp_path / "by hand" / kind
        weights = [where / "adapter_model.safetensors" for where in (folder / "model", by_hand)]
        assert weights[0].read_bytes() == weights[1].read_bytes()
        assert torch.equal(modlab.load(by_hand)[0](rows()[:2]).logits, again(rows()[:2]).logits)
        resumed = from_step(1, folder, tmp_path / "again" / kind)
        taken_up = modlab.train(kind_of(tmp_path, kind), rows(), adapting(resumed)).model
        torch.testing.assert_close(taken_up(rows()[:2]).logits, expected, rtol=1e-3, atol=1e-4)
    refused = json.loads((tmp_path / "refused.json").read_text())
    assert len(refused) == 3  # PEFT saves its own routers whole, if it is given them
    assert all("state_dict=accelerator.get_state_dict(model)" in one for one in refused)


def test_other_ways_to_shard_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from accelerate import Accelerator

    kind = property(lambda self: DistributedType.MEGATRON_LM)
    monkeypatch.setattr(Accelerator, "distributed_type", kind)
    with pytest.raises(ModlabError, match=r"models of its own.*--fsdp_version 2"):
        Processes()


def test_weights_are_told_apart_however_they_lie_in_memory() -> None:
    weight = torch.arange(12.0).view(3, 4)
    beginnings = [sharding._beginning(w) for w in (weight, weight.t(), weight.t().contiguous(), weight[:0])]
    assert beginnings[0] != beginnings[1] == beginnings[2] and not beginnings[3]
