"""Models that are trained for a step, whole or sharded by FSDP2."""

from __future__ import annotations

from typing import Any

import torch
from torch.distributed.fsdp import fully_shard

import modlab
from modlab.routing.noise import Noise
from tests.helpers.steps import VOCABULARY, model_of

SKIPS = ("layer", "attention", "mlp", "kv", "kv int8")
IDS = torch.randint(2, VOCABULARY, (4, 12), generator=torch.Generator().manual_seed(0))


def routed(skip: str, dtype: torch.dtype) -> Any:
    settings: dict[str, Any] = {"layers": "all", "keep_first": 1, "keep_recent": 3}
    if skip == "kv int8":
        settings["kv_cache_dtype"] = "int8"
    return model_of({"skip": skip.split()[0], **settings}).to(dtype)


def shard(model: Any, **policy: Any) -> None:
    for layer in model.model.layers:
        fully_shard(layer, **policy)
    fully_shard(model, **policy)


def trained(model: Any, ids: torch.Tensor, rows: torch.Tensor) -> dict[str, Any]:
    """Gradients of the mean loss and of the gates, as the recording hands them out, and the logits before."""
    with torch.no_grad():
        logits = model.eval()(IDS, use_cache=False).logits.float()
    model.train().mod.noise = Noise(0, 0, rows)
    with modlab.record_routing(model, detach=False) as recording:
        loss = model(ids, labels=ids, use_cache=False).loss
    gates = recording.steps[-1].gate
    (loss + sum(gate.mean() for gate in gates.values())).backward()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1e9)
    found = {f"gradient of {name}": whole(p.grad).float() for name, p in model.named_parameters()}
    optimizer.step()
    dtypes = {name: p.dtype for name, p in model.named_parameters() if "mod_router" in name}
    return {"logits": logits, "gates": sorted(gates), "dtypes": dtypes, **found}


def whole(tensor: Any) -> torch.Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
