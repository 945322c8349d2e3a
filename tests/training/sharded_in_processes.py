"""Run by `accelerate launch` in test_sharding.py: takes up a run that one process began, sharded by FSDP2.

sharded_in_processes.py OUT OBJECTIVE
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
from accelerate import Accelerator

import modlab
from modlab.errors import ModlabError
from modlab.integrations.fsdp import FIRST_LOADS
from modlab.routing.router import is_router
from modlab.training.sharding import reshard
from tests.helpers.fsdp_on_cpu import launched_with_fsdp
from tests.helpers.runs import began, model_in_bf16, rows


def main(out: Path, objective: str) -> None:
    launched_with_fsdp(reshard_after_forward=objective != "distil")  # both are tried
    other_base = refusal_of_another_base(out, objective) if objective == "distil" else ""
    loaded = loaded_in_each() if objective == "distil" else 0.0
    other_weights = [
        refusal_where_the_first_has_weights(on) for on in ("cpu", "meta") if objective == "distil"
    ]
    model = model_in_bf16()
    result = modlab.train(model, rows(), began(out, 2, objective), eval_data=rows()[:3])
    found = modlab.calibrate(model, rows(), keep_ratio=0.5, accelerator=Accelerator(mixed_precision="no"))
    refused = []
    for action in (modlab.revert, modlab.convert):
        try:
            action(model)
        except ModlabError as error:
            refused.append(str(error))
    reshard(model)  # after a forward the ends are whole
    report = {
        "history": result.history.to_dict("list"),
        "refused": refused,
        "other base": other_base,
        "loaded": loaded,
        "other weights": other_weights,
        "calibrated": list(found.items()),
        "part": sum(p.to_local().numel() for n, p in model.named_parameters() if not is_router(n)),
    }
    rank = torch.distributed.get_rank()
    (out / f"rank_{rank}.json").write_text(json.dumps(report), encoding="utf-8")


def refusal_of_another_base(out: Path, objective: str) -> str:
    """What is said where one number of the frozen base differs."""
    model = model_in_bf16()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[-1, -1] += 1
    try:
        modlab.train(model, rows(), began(out, 2, objective))
    except ModlabError as error:
        return str(error)
    return ""


def loaded_in_each() -> float:
    """The sum of a model's weights, as accelerate's launcher leaves its settings on GPUs."""
    settings = {"ACCELERATE_USE_FSDP": "true", FIRST_LOADS: "true"}
    os.environ |= settings
    try:
        model, _ = modlab.load("demo-dense")
        assert os.environ[FIRST_LOADS] == "true", "accelerate looks at it too"
    finally:
        for name in settings:
            del os.environ[name]
    return sum(float(weight.abs().sum()) for weight in model.parameters())


def refusal_where_the_first_has_weights(others: str) -> str:
    """What is said where all other processes hold zeros, or nothing (on the meta device)."""
    model = model_in_bf16()
    if torch.distributed.get_rank() > 0:
        with torch.no_grad():
            for weight in model.parameters():
                weight.zero_()
        model.to(others)
    try:
        modlab.train(model, rows(), modlab.TrainConfig(steps=1, batch_size=2))
    except ModlabError as error:
        return str(error)
    return ""


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
