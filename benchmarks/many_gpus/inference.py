"""A long prompt on one GPU, or with the model shared by several: logits, decisions, tokens and bytes."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

import torch

import modlab
from benchmarks.many_gpus import worker
from benchmarks.many_gpus.compared import OF_INFERENCE
from benchmarks.many_gpus.parts import TENSOR_PARALLEL

NEW_TOKENS = 16
ALONE = "alone"
GRANULARITIES: dict[str, dict[str, Any]] = {"by layer": {}, "by KV head": worker.HEADS}


def inferred(options: argparse.Namespace) -> dict[str, Any]:
    """Bytes in the model's usual dtype and in fp32, gates by layer and by KV head.

    Each part leaves what it found, to be compared (`against_one`) by whom has called it: no part waits for
    another.
    """
    figures: dict[str, Any] = {"context": options.context}
    for kind in dict.fromkeys((worker.dtype(options), torch.float32)):
        model = worker.loaded(options.model[0], kind, **_place(options))
        if options.part == ALONE:
            model.to(worker.device())
        for granularity, settings in GRANULARITIES.items():
            modlab.convert(model.eval(), modlab.MoDConfig(layers="all", **settings))
            worker.scatter(model)
            worker.forget_peaks()
            name = f"{granularity}, {str(kind).removeprefix('torch.')}"
            found = _prompted(model, options.context)
            figures[name] = found.pop("bytes") | {"allocated": worker.allocated()}
            figures[name]["kept"] = float(found["keep"].float().mean())
            if worker.rank() == 0:
                _save(found, _file(options.work, options.part, name))
            worker.write(options, figures)
            modlab.revert(model)
        del model
        worker.tidy()
    planned = worker.planned(options, options.model[0], "inference", options.context)
    return figures | {"planned": planned}


def _place(options: argparse.Namespace) -> dict[str, Any]:
    if options.part == TENSOR_PARALLEL:
        return {"tp_plan": "auto"}
    if options.part == "device_map" and options.toy:
        folder = str(options.work / "offload")
        return {"device_map": "auto", "max_memory": {"cpu": "400KB"}, "offload_folder": folder}
    return {"device_map": "balanced"} if options.part == "device_map" else {}


@torch.no_grad()
def _prompted(model: Any, context: int) -> dict[str, Any]:
    """What the model says of a prompt and how it goes on."""
    ids = torch.randint(3, 250, (1, context), generator=torch.Generator().manual_seed(0)).to(model.device)
    with modlab.KVTracker(model) as kv, modlab.record_routing(model) as recording:
        output = model(ids, use_cache=True, logits_to_keep=8)
    of_kv: dict[str, int] = {}
    for row in kv.rows:
        of_kv[row["device"]] = of_kv.get(row["device"], 0) + row["kv_bytes"]
    logits = output.logits.float().cpu()
    keep = torch.cat([kept.flatten().cpu() for kept in recording.steps[0].keep.values()])
    tokens = []
    for _ in range(NEW_TOKENS):
        token = output.logits[:, -1:].argmax(-1).to(model.device)
        tokens.append(token.cpu())
        output = model(token, past_key_values=output.past_key_values, use_cache=True)
    return {
        "logits": logits,
        "keep": keep,
        "tokens": torch.cat(tokens, 1),
        "bytes": {"kv_bytes": of_kv, "weight_bytes": worker.weight_bytes(model)},
    }


def against_one(work: Path, part: str, name: str) -> dict[str, Any]:
    """What a part found of a kind against one GPU, if both have found it.

    Args:
        name: granularity and dtype, as the figures call them.
    """
    files = [_file(work, what, name) for what in (part, ALONE)]
    if part == ALONE or not all(file.exists() for file in files):
        return {}
    found, expected = (torch.load(file) for file in files)
    off = found["logits"] - expected["logits"]
    said = (
        float(off.abs().max()),
        float(expected["logits"].abs().max()),
        float((found["keep"] == expected["keep"]).float().mean()),
        int((found["tokens"] == expected["tokens"]).long().cumprod(1).sum()),
        NEW_TOKENS,
    )
    return dict(zip(OF_INFERENCE, said, strict=True))


def _save(found: dict[str, Any], file: Path) -> None:
    """Whole or not at all: the caller may look at any time."""
    temporary = file.with_suffix(".tmp")
    torch.save(found, temporary)
    os.replace(temporary, file)


def _file(work: Path, part: str, name: str) -> Path:
    return work / f"{part} {name}.pt"
