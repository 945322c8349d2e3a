"""DeepSpeed's first stage is one process's training; what a run cannot follow is refused."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import modlab
from modlab.errors import ModlabError
from modlab.training.zero import check_dtypes, check_settings
from tests.helpers.launch import launch
from tests.helpers.runs import OBJECTIVES, began, from_step, model_for, model_in_bf16, rows
from tests.helpers.steps import ROWS, after_steps

WORKER = Path(__file__).with_name("zero_in_processes.py")
CASES = (
    "dense",
    "distilled",
    "target",
    "budget",
    "cache, with noise",
    "one row keeps",
    "one row keeps and frozen",
    "distil",
    "distil over a range",
    "distil with adapters",
    "distil with adapters and routers of PEFT's",
)


installed = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs deepspeed")


@installed
@pytest.mark.parametrize(("batch_size", "grad_accum"), [(2, 2), (4, 1)])
def test_its_first_stage_gives_the_weights_of_one_process(
    tmp_path: Path, batch_size: int, grad_accum: int
) -> None:
    """Rows have uneven labels and padding; in some cases one process alone has tokens that run."""
    launch(WORKER, 2, "steps", tmp_path, batch_size, grad_accum, *CASES)
    ranks = [torch.load(tmp_path / f"rank_{rank}.pt") for rank in range(2)]
    for case in CASES:
        expected = after_steps(case, ROWS, 1)
        for rank in ranks:
            assert rank[case].keys() == expected.keys()
            for name, value in expected.items():
                off = (rank[case][name] - value).norm() / value.norm().clamp(min=1e-9)
                assert off < 1e-3, f"{case}: {name} is off by {off:.2%}"


@installed
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_run_is_taken_up_by_it_and_by_one_process_after_it(tmp_path: Path, objective: str) -> None:
    """Trained weights are bf16 before and afterwards; frozen ones have to be fp32."""
    settings = began(tmp_path / "one", 4, objective)
    whole = modlab.train(model_for(objective), rows(), settings, eval_data=rows()[:3])
    pair = from_step(2, tmp_path / "one", tmp_path / "two")
    launch(WORKER, 2, "run", pair, objective)
    settings = began(from_step(3, pair, tmp_path / "again"), 4, objective)
    again = modlab.train(model_for(objective), rows(), settings, eval_data=rows()[:3])
    wanted = whole.history.set_index("step")
    of_pair = torch.load(pair / "history_0.pt")
    assert of_pair["step"] == [3, 4]
    for history in (of_pair, again.history.to_dict("list")):
        for column in ("loss", "keep_ratio", "objective", "grad_norm", "tokens", "lr", "eval_loss"):
            for step, value in zip(history["step"], history[column], strict=True):
                expected = pytest.approx(wanted.loc[step, column], rel=2e-3, abs=1e-5, nan_ok=True)
                assert value == expected, (column, step)
    for folder in (pair, tmp_path / "again"):
        loaded, expected = AutoModelForCausalLM.from_pretrained(folder / "model"), whole.model.state_dict()
        for name, value in loaded.state_dict().items():
            torch.testing.assert_close(value, expected[name], rtol=2e-2, atol=2e-3)


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"zero_optimization": {"stage": 2}}, "stage 2.*gradients come out wrong.*--fsdp_version 2"),
        ({"zero_optimization": {"stage": 3}}, "stage 3.*--zero_stage 1"),
        ({"zero_optimization": {"stage": 0}}, "stage 0, which shares nothing: launch with --multi_gpu"),
        ({}, "stage 0"),
        ({"optimizer": {"type": "Adam"}}, "name a optimizer.*rates of TrainConfig"),
        ({"scheduler": {"type": "WarmupLR"}}, "name a scheduler.*min_lr_ratio"),
        ({"bf16": {"enabled": True}}, "bf16 on.*mixed_precision"),
        ({"fp16": {"enabled": True}}, "fp16 on.*mixed_precision"),
        ({"zero_optimization": {"stage": 1, "offload_optimizer": {"device": "cpu"}}}, "offload_optimizer"),
    ],
)
def test_settings_that_a_run_cannot_follow_are_refused(settings: dict[str, Any], why: str) -> None:
    given = {"zero_optimization": {"stage": 1}} if settings and "zero_optimization" not in settings else {}
    with pytest.raises(ModlabError, match=why):
        check_settings(given | settings)


def test_what_accelerate_says_by_itself_is_taken() -> None:
    """Flags alone, no file."""
    check_settings(
        {
            "train_batch_size": "auto",
            "gradient_clipping": 1.0,
            "zero_optimization": {"stage": 1, "offload_optimizer": {"device": "none", "nvme_path": None}},
            "fp16": {"enabled": False},
            "bf16": {"enabled": False},
        }
    )


def test_frozen_weights_of_another_dtype_are_refused() -> None:
    model = model_in_bf16()
    with pytest.raises(ModlabError, match=r"embed_tokens.weight, which is frozen, is torch.bfloat16: launch"):
        check_dtypes(model)
    check_dtypes(model.float())
