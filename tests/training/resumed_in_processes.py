"""Run by `accelerate launch` in test_resume.py: runs of as many processes as there are, cut off and taken up.

resumed_in_processes.py OUT
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from transformers import LlamaForCausalLM

import modlab
from tests.helpers.models import narrow_config, scatter_gates
from tests.helpers.runs import GLOBAL_BATCH, began, model_in_bf16, rows, streamed


def main(out: Path) -> None:
    accelerator = Accelerator()
    own = GLOBAL_BATCH // accelerator.num_processes
    report: dict[str, Any] = {"off by": off_by(out, own)}
    for name, data in (("run", rows()), ("stream", streamed(own))):
        report[name] = modlab.train(model_in_bf16(), data, began(out / name, own)).history.to_dict("list")
    (out / f"rank_{accelerator.process_index}.json").write_text(json.dumps(report), encoding="utf-8")


def off_by(out: Path, own: int) -> float:
    """By how much a weight is another where a run with dropout was cut off and taken up, at most."""
    whole = modlab.train(with_dropout(0), rows(), began(out / "whole", own)).model
    cut = modlab.train(with_dropout(0), rows(), began(out / "cut", own), monitor=StopsAfter(2))
    assert (cut.stopped, cut.steps) == ("interrupted", 2)
    again = modlab.train(with_dropout(7), rows(), began(out / "cut", own)).model
    pairs = zip(whole.parameters(), again.parameters(), strict=True)
    return max(float((a - b).abs().max()) for a, b in pairs)


class StopsAfter:
    """A monitor that ends a run."""

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def step(self, step: int, share: float) -> bool:
        """Whether to go on."""
        return step < self.steps

    def log(self, row: dict[str, Any]) -> None:
        """Nothing is shown."""


def with_dropout(seed: int) -> Any:
    torch.manual_seed(seed)
    config = narrow_config(
        vocab_size=61,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        attention_dropout=0.2,
    )
    model = modlab.convert(LlamaForCausalLM(config), modlab.MoDConfig(layers=[0, 2], keep_recent=4))
    scatter_gates(model)
    return model


if __name__ == "__main__":
    main(Path(sys.argv[1]))
