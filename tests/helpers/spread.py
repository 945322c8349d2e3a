"""What a routed model computes, whether it is whole or spread over processes."""

from __future__ import annotations

from typing import Any

import torch

import modlab
from modlab.hf.names import cache_argument
from tests.helpers.models import scatter_gates

IDS = torch.randint(3, 90, (2, 24), generator=torch.Generator().manual_seed(0))
GATES: dict[str, dict[str, Any]] = {
    "a layer": {},
    "a KV head": {"gates": "kv_head"},
    "a KV head, hidden": {"gates": "kv_head", "router_hidden": 4},
}
"""Settings by what has a gate."""


def found_by(model: Any, gates: str) -> dict[str, Any]:
    """Converts the model (skip="kv", all layers) and returns logits (of one forward and of three with a
    cache), generated tokens, decisions, and tokens and bytes in the cache; the model is dense afterwards."""
    modlab.convert(model, modlab.MoDConfig(layers="all", keep_recent=4, keep_first=1, **GATES[gates]))
    scatter_gates(model)
    with torch.no_grad(), modlab.record_routing(model) as recording:
        logits = model(IDS, use_cache=False).logits
    with modlab.KVTracker(model) as kv:
        tokens = model.generate(IDS, max_new_tokens=6, do_sample=False, pad_token_id=0)
    cache, name = modlab.RaggedCache(model), cache_argument(model)
    with torch.no_grad():
        pieces = [model(piece, **{name: cache}).logits for piece in IDS.split(8, dim=1)]
    modlab.revert(model)
    return {
        "logits": logits,
        "in pieces": torch.cat(pieces, 1),
        "tokens": tokens,
        "keep": recording.steps[0].keep,
        "lengths": [layer.lengths for layer in cache.layers],
        "kv_bytes": sum(row["kv_bytes"] for row in kv.rows if row["step"] == kv.rows[-1]["step"]),
    }
