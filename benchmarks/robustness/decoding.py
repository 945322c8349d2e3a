"""Decodes very long texts with `model.generate` and looks at what the cache and the process hold meanwhile.

In each case the cache has a bound: all but the latest tokens are dropped, or a sliding window forgets them.
Bytes that go on growing all the same are a leak.
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM, StoppingCriteria

import modlab
from modlab.hf.names import cache_argument

CASES = ("keys and values, recent ones alone", "whole layers, sliding window")
SAMPLES = 20
"""How many times a decoding is looked at."""
MOST_GROWTH = 48 * 2**20
"""Bytes by which the process may grow after the first quarter: ids and masks of 100,000 tokens are a few MB,
and an allocator holds some back."""


@dataclasses.dataclass
class Decoded:
    """One long decoding.

    Attributes:
        case: what was routed, one of `CASES`.
        tokens: how many were decoded.
        bound: tokens that a layer may store at most, slack included.
        samples: of [tokens decoded, bytes of the cache, most tokens stored in a layer, bytes of the process].
        grew: what grew beyond its bound; "" if nothing did.
    """

    case: str
    tokens: int
    bound: int
    samples: list[tuple[int, int, int, int]]
    grew: str = ""


def decode(case: str, tokens: int) -> Decoded:
    """Decodes so many tokens from a prompt of 16, one row, on a CPU."""
    model, bound = _model(case, tokens)
    cache = modlab.RaggedCache(model)
    watch = _Watch(cache, max(tokens // SAMPLES, 1))
    prompt = torch.arange(3, 19)[None]
    model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        **{cache_argument(model): cache},
        max_new_tokens=tokens,
        do_sample=False,
        stopping_criteria=[watch],
    )
    result = Decoded(case, tokens, bound, watch.samples)
    result.grew = growth(result)
    return result


def _model(case: str, tokens: int) -> tuple[Any, int]:
    """A tiny converted model, and the most tokens that one of its layers may store."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": tokens + 64,
        "bos_token_id": 1,
        "eos_token_id": None,
        "pad_token_id": 0,
    }
    if case == CASES[0]:
        config = modlab.MoDConfig(skip="kv", layers="all", keep_first=4, keep_recent=64)
        model: Any = modlab.convert(LlamaForCausalLM(LlamaConfig(**sizes)).eval(), config)
        modlab.set_threshold(model, 0.999)  # above every gate: what is not recent is dropped
        return model, 4 + 2 * 64 + 16
    dense = MistralForCausalLM(MistralConfig(**sizes, sliding_window=64)).eval()
    model = modlab.convert(dense, modlab.MoDConfig(skip="layer", layers=[1], keep_first=4))
    with torch.no_grad():
        router = model.model.layers[1].mod_router
        router.weight.copy_(torch.randn(router.weight.shape))
        router.bias.zero_()
    return model, 2 * 64 + 16


class _Watch(StoppingCriteria):
    """Notes what is held every so many tokens; stops nothing."""

    def __init__(self, cache: Any, every: int) -> None:
        self.cache, self.every = cache, every
        self.samples: list[tuple[int, int, int, int]] = []

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> Any:
        decoded = input_ids.shape[1] - 16
        if decoded % self.every == 0:
            stored = int(self.cache.kept_tokens.max())
            self.samples.append((decoded, self.cache.nbytes, stored, _resident()))
        return torch.zeros(len(input_ids), dtype=torch.bool)


def _resident() -> int:
    """Bytes of this process in memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def growth(result: Decoded) -> str:
    """What grew beyond its bound in the last three quarters of a decoding, once it has reached four times its
    bound; "" if nothing did."""
    settled = [s for s in result.samples[len(result.samples) // 4 :] if s[0] >= 4 * result.bound]
    if not settled:
        return ""
    _, first_bytes, _, first_resident = settled[0]
    most_bytes = max(size for _, size, _, _ in settled)
    if (stored := max(stored for _, _, stored, _ in settled)) > result.bound:
        return f"a layer stored {stored} tokens, the bound is {result.bound}"
    if most_bytes > 2 * first_bytes:
        return f"the cache grew from {first_bytes} to {most_bytes} bytes"
    if (grown := settled[-1][3] - first_resident) > MOST_GROWTH:
        return f"the process grew by {grown} bytes"
    return ""
