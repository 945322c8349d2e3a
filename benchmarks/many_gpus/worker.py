"""What all parts share in their own processes: the model, the device, the file of figures."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

import torch

from modlab.bench.results import circumstances

HEADS: dict[str, Any] = {"gates": "kv_head", "router_hidden": 16}
"""Routers by KV head, which are those that are distilled."""


def rank() -> int:
    """Number of this process."""
    return int(os.environ.get("RANK", "0"))


def world() -> int:
    """Number of processes."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def device() -> torch.device:
    """Of this process; `accelerate` and `transformers` have made it the current one."""
    cuda = torch.cuda.is_available()
    return torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")


def dtype(options: argparse.Namespace) -> torch.dtype:
    """That models are loaded in."""
    return torch.float32 if options.toy else torch.bfloat16


def has_weights(model: str) -> bool:
    """Whether a folder holds more than a config."""
    return any(Path(model).glob("*.safetensors"))


def loaded(options: argparse.Namespace, kind: torch.dtype, **more: Any) -> Any:
    """The dense model of the options' folder."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(options.model[0], dtype=kind, **more)


@torch.no_grad()
def scatter(model: Any) -> None:
    """Untrained gates all say the same; these keep some tokens of each layer or head and drop others."""
    generator = torch.Generator().manual_seed(0)
    for name, weight in model.named_parameters():
        if ".mod_router." in name and not name.endswith("into"):
            drawn = torch.randn(weight.shape, generator=generator)
            weight.copy_(drawn * (0.0 if name.endswith("bias") else weight.shape[-1] ** -0.5))


def _own_gpus() -> list[int]:
    if not torch.cuda.is_available():
        return []
    return [torch.cuda.current_device()] if world() > 1 else list(range(torch.cuda.device_count()))


def forget_peaks() -> None:
    """What `allocated` says is counted from here on."""
    for number in _own_gpus():
        torch.cuda.reset_peak_memory_stats(number)


def allocated() -> dict[str, int]:
    """Most bytes allocated on each GPU, by whichever process uses it."""
    own = {f"cuda:{number}": torch.cuda.max_memory_allocated(number) for number in _own_gpus()}
    if not torch.distributed.is_initialized():
        return own
    found: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(found, own)
    return {name: most for one in found for name, most in one.items()}


def planned(options: argparse.Namespace, use: str) -> list[dict[str, Any]]:
    """What `modlab plan` says of a use, GiB a GPU."""
    from modlab.plan import plan

    trains = use != "inference"
    table = plan(
        options.model[0],
        gpus=options.gpus,
        memory=options.memory,
        context=options.length if trains else options.context,
        batch=options.rows // world() if trains else 1,
        kv_saving=1.0,
        checkpointing=False,
    )
    lines: list[dict[str, Any]] = table[table["use"] == use].to_dict("records")
    return lines


def write(options: argparse.Namespace, figures: dict[str, Any]) -> None:
    """What is known so far, by the first process."""
    if rank() == 0:
        where = circumstances(device(), dtype(options))
        file: Path = options.work / f"{options.file}.json"
        temporary = file.with_suffix(".tmp")
        temporary.write_text(json.dumps({**figures, "processes": world(), **where}), encoding="utf-8")
        os.replace(temporary, file)
