"""A run that several numbers of processes take up: model, rows, settings."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaForCausalLM

import modlab
from tests.helpers.models import narrow_config, scatter_gates


def model_in_bf16() -> Any:
    """Converted, with tied embeddings; dense and routed layers differ in class."""
    torch.manual_seed(0)
    config = narrow_config(
        vocab_size=61,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    modlab.convert(model, modlab.MoDConfig(layers=[0, 2], keep_recent=4))
    scatter_gates(model)
    return model


def model_for(objective: str) -> Any:
    """The same, in fp32 where the base stays frozen: DeepSpeed takes models of one dtype."""
    return model_in_bf16().float() if objective == "distil" else model_in_bf16()


def rows() -> torch.Tensor:
    return torch.randint(0, 61, (10, 16), generator=torch.Generator().manual_seed(1))


GLOBAL_BATCH = 4


def streamed(batch_size: int, steps: int = 3) -> Iterator[torch.Tensor]:
    """Rows that come once, as ready-made batches: enough for `steps` steps, and one batch more."""
    ids = torch.randint(0, 61, (steps * GLOBAL_BATCH, 16), generator=torch.Generator().manual_seed(2))
    yield from (*ids.split(batch_size), ids[:batch_size])


OBJECTIVES: dict[str, dict[str, Any]] = {
    "target": {"what_if": 0.5},
    "distil": {"objective": "distil", "keep_range": (0.4, 0.9), "ramp": 0.5},
}


def began(out: Path, batch_size: int, objective: str = "target") -> modlab.TrainConfig:
    """The settings of all the runs here; ten rows, of which each step sees four."""
    return modlab.TrainConfig(
        out=out, steps=4, batch_size=batch_size, log_every=1, eval_every=1, save_every=1, keep_last=9,
        resume="auto", lr=3e-3, keep_ratio=0.5, calibrate=False, mixed_precision="no",
        **OBJECTIVES[objective],
    )  # fmt: skip


def from_step(step: int, of: Path, to: Path) -> Path:
    """A run's folder as it was after so many steps."""
    shutil.copytree(of / "checkpoints" / f"step_{step}", to / "checkpoints" / f"step_{step}")
    return to
