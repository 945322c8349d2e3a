"""A what-if pass both ways: through sdpa with its mask as a tensor, and through flex attention."""

from __future__ import annotations

import pytest
import torch

from modlab.execution import masked_keys, reference


def sdpa_and_flex(
    model, ids: torch.Tensor, mask: torch.Tensor, monkeypatch: pytest.MonkeyPatch, autocast: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits through sdpa and through flex attention."""
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        torch.manual_seed(1)  # a what-if pass for kept keys draws noise
        want = model(ids, attention_mask=mask).logits
        used = []
        for taking in (reference, masked_keys):
            monkeypatch.setattr(taking, "takes_flex", lambda *_: used.append(True) or True)
        torch.manual_seed(1)
        with torch.compiler.set_stance("force_eager"):
            got = model(ids, attention_mask=mask).logits
    assert used and model.config._attn_implementation == "sdpa"
    return want, got
