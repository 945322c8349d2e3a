"""What all parts share in their own processes: the model, the device, the file of figures."""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import os
from pathlib import Path
from typing import Any

import torch

from benchmarks.many_gpus.turns import wait_for_turn
from modlab.bench.results import circumstances

HEADS: dict[str, Any] = {"gates": "kv_head", "router_hidden": 16}
"""Routers by KV head, which are those that are distilled."""


def begin() -> None:
    """Imports what takes long, then waits for this part's turn."""
    for name in ("accelerate", "transformers.models.llama.modeling_llama"):  # and what all models import
        importlib.import_module(name)
    wait_for_turn()


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


def loaded(model: str, kind: torch.dtype, **more: Any) -> Any:
    """The dense model of a folder."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(model, dtype=kind, **more)


def rows_of(options: argparse.Namespace, model: str) -> torch.Tensor:
    """The rows that were written for a model, int64 [rows, T]."""
    rows: torch.Tensor = torch.load(options.work / f"rows_{Path(model).name}.pt")
    return rows


def tidy() -> None:
    """Gives back the memory of what nobody holds any longer."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


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
    if torch.cuda.is_available():
        torch.cuda.init()  # a GPU that is asked for by number is not there before
    for number in _own_gpus():
        torch.cuda.reset_peak_memory_stats(number)


def wait() -> None:
    """Until this process's GPUs have done what they were told."""
    for number in _own_gpus():
        torch.cuda.synchronize(number)


def allocated() -> dict[str, int]:
    """Most bytes allocated on each GPU, by whichever process uses it; of a CPU nothing is known."""
    return of_all({f"cuda:{number}": torch.cuda.max_memory_allocated(number) for number in _own_gpus()})


def weight_bytes(model: Any) -> dict[str, int]:
    """Bytes of the model's weights on each device, of all processes; parts are what is held of them."""
    found: dict[str, int] = {}
    for weight in model.parameters():
        own = weight.to_local() if hasattr(weight, "to_local") else weight
        name = place_of(own.device)
        found[name] = found.get(name, 0) + own.nbytes
    return of_all(found)


def place_of(where: torch.device) -> str:
    """A device as figures call it; the CPU that processes share is one place of each of them."""
    return f"cpu of process {rank()}" if where.type == "cpu" and world() > 1 else str(where)


def of_all(own: dict[str, int]) -> dict[str, int]:
    """What each process says of its own devices, together; all of them have to ask."""
    if not torch.distributed.is_initialized():
        return own
    found: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(found, own)
    return {name: value for one in found for name, value in one.items()}


def planned(
    options: argparse.Namespace,
    model: Any,
    use: str,
    context: int,
    rows: int = 1,
    checkpointing: bool = False,
) -> list[dict[str, Any]]:
    """What `modlab plan` says of a use, GiB a GPU: as many as there are processes, in one as the call has.

    Args:
        model: a folder, or a config.
        context: tokens of a row.
        rows: a GPU.
        checkpointing: whether activations are computed again.
    """
    from modlab.plan import plan

    gpus = world() if world() > 1 else options.gpus
    table = plan(
        model, gpus=gpus, memory=options.memory, context=context, batch=rows, kv_saving=1.0,
        checkpointing=checkpointing,
    )  # fmt: skip
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
