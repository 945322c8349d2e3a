"""What a routed model computes, whether it is whole or spread over processes."""

from __future__ import annotations

from typing import Any

import torch

import modlab
from tests.helpers.models import scatter_gates

IDS = torch.randint(3, 90, (2, 24), generator=torch.Generator().manual_seed(0))


def found_by(model: Any) -> dict[str, Any]:
    """Converts the model (skip="kv", all layers) and returns logits, generated tokens, decisions, bytes."""
    modlab.convert(model, modlab.MoDConfig(layers="all", keep_recent=4, keep_first=1))
    scatter_gates(model)
    with torch.no_grad(), modlab.record_routing(model) as recording:
        logits = model(IDS, use_cache=False).logits
    with modlab.KVTracker(model) as kv:
        tokens = model.generate(IDS, max_new_tokens=6, do_sample=False, pad_token_id=0)
    return {
        "logits": logits,
        "tokens": tokens,
        "keep": recording.steps[0].keep,
        "kv_bytes": sum(row["kv_bytes"] for row in kv.rows if row["step"] == kv.rows[-1]["step"]),
    }
