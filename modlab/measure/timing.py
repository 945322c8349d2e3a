"""Time to the first token and per further token of `model.generate`, as its user sees them.

Shape letters: B rows, T tokens.
"""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING, Any

import torch
from transformers.generation.streamers import BaseStreamer

from modlab.hf.model import device_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class _Clock(BaseStreamer):
    """Notes when `generate` hands out each token."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        synchronize(self.device)
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


def synchronize(device: torch.device) -> None:
    """Waits until the device has done all queued work, so that a host clock tells the truth."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def time_generate(
    model: PreTrainedModel, input_ids: torch.Tensor, decode_tokens: int = 32
) -> tuple[float, float]:
    """One greedy `model.generate` call, timed as its user sees it.

    Args:
        model: causal LM, dense or converted.
        input_ids: long [B, T], no padding.
        decode_tokens: tokens to generate after the first.

    Returns:
        (prefill_ms, decode_ms): milliseconds from the call to the first token, and mean milliseconds for each
        later token.
    """
    generate: Any = model.generate
    device = device_of(model)
    pad = getattr(getattr(model, "generation_config", None), "pad_token_id", None)
    clock = _Clock(device)
    input_ids = input_ids.to(device)
    mask = torch.ones_like(input_ids)
    synchronize(device)
    start = time.perf_counter()
    generate(
        input_ids,
        attention_mask=mask,
        min_new_tokens=decode_tokens + 1,
        max_new_tokens=decode_tokens + 1,
        do_sample=False,
        pad_token_id=0 if pad is None else pad,
        streamer=clock,
    )
    _, first, *rest = clock.times  # the first mark is the prompt's
    return (first - start) * 1e3, (rest[-1] - first) * 1e3 / len(rest) if rest else math.nan
