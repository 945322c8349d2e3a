"""A model from a folder, and its last states: what every arm is made of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from modlab.hf.anatomy import decoder_of


def load(folder: Path, device: str, dtype: torch.dtype | None = None) -> Any:
    """The causal LM of a folder, in bf16 on a GPU and fp32 on a CPU unless `dtype` says otherwise."""
    from transformers import AutoModelForCausalLM

    chosen = dtype or (torch.float32 if device == "cpu" else torch.bfloat16)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=chosen)
    return model.to(device).eval()


def states(model: Any, ids_BT: Tensor) -> Tensor:
    """Last states [B, T, D] of all tokens, without a cache."""
    output = decoder_of(model)(input_ids=ids_BT, use_cache=False)
    found: Tensor = output[0]
    return found


def head(model: Any) -> Tensor:
    """The output head's weight [V, D]."""
    weight: Tensor = model.get_output_embeddings().weight
    return weight
