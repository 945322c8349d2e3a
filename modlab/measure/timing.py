"""Time to the first token and per further token of `model.generate`, as its user sees them.

Shape letters: B rows, T tokens.
"""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING, Any

import torch
from transformers.generation.streamers import BaseStreamer

from modlab.errors import ModlabError, check_count
from modlab.hf.model import device_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class _Clock(BaseStreamer):
    """Notes when tokens arrive on the host: the prompt first, then one call a step."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
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
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    decode_tokens: int = 32,
    attention_mask: torch.Tensor | None = None,
    **settings: Any,
) -> tuple[float, float]:
    """One greedy `model.generate` call, timed as its user sees it.

    No token ends the text, so that all calls make the same number of tokens.

    Args:
        model: causal LM, dense or converted.
        input_ids: long [B, T].
        decode_tokens: tokens to generate after the first, in each row.
        attention_mask: long [B, T]; without it there is no padding.
        settings: more keywords of `generate`.

    Returns:
        (prefill_ms, decode_ms): milliseconds from the call to the first token, and mean milliseconds for each
        later token.

    Raises:
        ModlabError: something ended the text early (a stopping criterion, a time limit): no fair time.
    """
    check_count("decode_tokens", decode_tokens, 0)
    generate: Any = model.generate
    device = device_of(model)
    pad = getattr(getattr(model, "generation_config", None), "pad_token_id", None)
    clock = _Clock()
    input_ids = input_ids.to(device)
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask.to(device)
    synchronize(device)
    start = time.perf_counter()
    generate(
        input_ids,
        attention_mask=mask,
        max_new_tokens=decode_tokens + 1,
        do_sample=False,
        num_beams=1,
        eos_token_id=None,
        pad_token_id=0 if pad is None else pad,
        streamer=clock,
        **settings,
    )
    _prompt, first, *rest = clock.times
    if len(rest) != decode_tokens:
        raise ModlabError(
            f"generate made {len(rest) + 1} tokens of {decode_tokens + 1}: something ends the text early; "
            "remove stopping criteria and time limits from the model's generation config."
        )
    return (first - start) * 1e3, (rest[-1] - first) * 1e3 / len(rest) if rest else math.nan
