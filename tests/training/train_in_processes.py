"""Run by `accelerate launch` in test_train.py: trains a tiny model, dense and then converted, in several
processes."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaForCausalLM

import modlab
from modlab.training import calibration as train_calibration
from modlab.training.loop import TrainConfig, train
from tests.helpers.models import narrow_config


def main(out: Path, batch_size: int) -> None:
    torch.manual_seed(0)
    config = narrow_config(
        vocab_size=32, num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=32
    )
    model = LlamaForCausalLM(config)
    rows = torch.randint(0, 32, (24, 16))
    settings = {"batch_size": batch_size, "log_every": 1, "lr": 1e-3, "grad_accum": 2, "save_every": 2}
    dense = train(model, rows, TrainConfig(out=out / "dense", steps=4, **settings), eval_data=rows[:7])
    modlab.convert(model, modlab.MoDConfig(skip="layer", layers="alternate", init_gate=0.55))
    settings |= {"keep_ratio": 0.5, "what_if": 0.5, "calibrate": False}
    first = train(model, rows, TrainConfig(out=out / "mod", steps=2, **settings))
    second = train(model, rows, TrainConfig(out=out / "mod", steps=4, resume="auto", **settings))
    weights = sums_of(model)  # before the calibration, which turns a rounding into another threshold
    settings |= {"calibrate": True, "save_every": 0}
    read = rows_calibrated_on()
    third = train(model, rows, TrainConfig(steps=1, **settings), eval_data=rows)
    report = {
        "dense": dense.history.to_dict("list"),
        "mod": second.history.to_dict("list"),
        "tokens": [dense.tokens, first.tokens, second.tokens],
        "weights": weights,
        "calibrated": sums_of(model),
        "calibrated_on": read,
        "keep_ratio": third.history["eval_keep_ratio"].iloc[-1],
    }
    (out / f"rank_{rank()}.json").write_text(json.dumps(report), encoding="utf-8")


def rows_calibrated_on() -> list[list[list[int]]]:
    """From now on, the rows that each run's final calibration is given."""
    real, seen = train_calibration.calibrate, []

    def noting(model: Any, batches: Any, **settings: Any) -> Any:
        seen.append(torch.cat([batch["input_ids"] for batch in batches]).tolist())
        return real(model, batches, **settings)

    train_calibration.calibrate = noting
    return seen


def sums_of(model: torch.nn.Module) -> dict[str, float]:
    return {name: p.double().sum().item() for name, p in model.named_parameters()}


def rank() -> int:
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
