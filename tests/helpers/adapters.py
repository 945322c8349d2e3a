"""Adapters and routers on one base, the routers saved by modlab or by PEFT; and how they are trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

import modlab
from tests.helpers.models import scatter_gates
from tests.helpers.steps import adapted

KINDS = ("plain", "routers of PEFT's")


def kind_of(folder: Path, kind: str) -> Any:
    """The base of a folder, converted and with adapters."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(folder / "base")
    modlab.convert(model, modlab.MoDConfig(layers="all", keep_first=1, keep_recent=3))
    scatter_gates(model)
    return adapted(model, routers_of_peft=kind != "plain")


def adapting(out: Path) -> modlab.TrainConfig:
    """Two steps over four rows each, by however many processes."""
    world = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    return modlab.TrainConfig(
        out=out, steps=2, batch_size=4 // world, log_every=1, save_every=1, resume="auto", lr=3e-3,
        keep_ratio=0.5, ramp=0.0, calibrate=False, mixed_precision="no",
    )  # fmt: skip
