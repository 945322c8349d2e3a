"""What autograd keeps on the meta device is what kernels keep, weights trained or frozen."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma2Config, GPT2Config, LlamaConfig, PreTrainedConfig

from modlab.activations import kept_bytes

D, F, N, G, H, L = 64, 160, 4, 2, 16, 3
SHAPE = {
    "vocab_size": 50, "hidden_size": D, "intermediate_size": F, "num_hidden_layers": L,
    "num_attention_heads": N, "num_key_value_heads": G, "head_dim": H,
}  # fmt: skip


def planned(config: PreTrainedConfig, frozen: bool) -> float:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    return kept_bytes(model, frozen)


def test_the_bytes_of_a_llama_by_hand() -> None:
    """Norms keep their input in fp32 and a number a token, attention four tensors and the log-sum-exps, the
    MLP three wide ones, all layers sines and cosines. Trained maps and norms keep their inputs on top."""
    norm = 4 * D + 4
    layer = 2 * norm + 2 * (2 * N + 2 * G) * H + 4 * N + 3 * 2 * F
    frozen = L * layer + norm + 2 * 2 * H
    assert planned(LlamaConfig(**SHAPE), frozen=True) == frozen
    inputs = L * (2 * 2 * 2 * D + 2 * F) + 2 * D + 8  # the last norm's; ids
    assert planned(LlamaConfig(**SHAPE), frozen=False) == frozen + inputs


@pytest.mark.parametrize("config", [Gemma2Config(**SHAPE), GPT2Config(n_embd=D, n_layer=L, n_head=N)])
def test_other_families_are_planned_too(config: PreTrainedConfig) -> None:
    """Of a soft cap on the scores nothing is kept, as attention is a kernel's."""
    assert 0 < planned(config, frozen=True) < planned(config, frozen=False) < 60 * 2 * D * L * F / D


def test_the_models_own_attention_comes_back() -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(LlamaConfig(**SHAPE), attn_implementation="eager")
    kept_bytes(model, frozen=True)
    assert model.config._attn_implementation == "eager"
    assert not model.get_input_embeddings()._forward_hooks
