"""What autograd keeps on the meta device is what kernels keep, weights trained or frozen."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    FalconConfig,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    MixtralConfig,
    PreTrainedConfig,
    Qwen2Config,
)

from modlab.activations import NAME, kept_bytes
from modlab.hf.attention_names import attention_named

D, F, N, G, H, L = 64, 160, 4, 2, 16, 3
SHAPE = {
    "vocab_size": 50, "hidden_size": D, "intermediate_size": F, "num_hidden_layers": L,
    "num_attention_heads": N, "num_key_value_heads": G, "head_dim": H,
}  # fmt: skip
OF_FALCON = {
    "vocab_size": 50, "hidden_size": D, "num_hidden_layers": L, "num_attention_heads": N,
    "bos_token_id": 0, "eos_token_id": 1,
}  # fmt: skip
OF_GPT2 = {"n_embd": D, "n_layer": L, "n_head": N, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}


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


def kept_on_a_cpu(model: Any) -> float:
    """As `kept_bytes`, of a real forward inside `torch.autocast`."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    lengths, found = (32, 64, 128), []
    for length in lengths:
        seen: dict[int, Tensor] = {}

        def note(tensor: Tensor, seen: dict[int, Tensor] = seen) -> Tensor:
            if tensor.untyped_storage().data_ptr() not in weights:
                seen[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        ids, mask = torch.zeros(1, length, dtype=torch.long), torch.zeros(1, 1, length, length)
        hooks = torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor)
        with attention_named([model.config], NAME), torch.autocast("cpu", torch.bfloat16), hooks:
            model.get_decoder()(ids, attention_mask=mask, use_cache=False)
        found.append(sum(tensor.untyped_storage().nbytes() for tensor in seen.values()))
    # copies of the weights, bytes a token, what grows with the square
    powers = np.array([[length**power for power in range(3)] for length in lengths])
    return float(np.linalg.solve(powers, np.array(found))[1])


@pytest.mark.parametrize(
    "config",
    [
        LlamaConfig(**SHAPE),
        Qwen2Config(**SHAPE),
        GPT2Config(**OF_GPT2),
        FalconConfig(**OF_FALCON),
        MixtralConfig(**SHAPE, num_local_experts=4),
    ],
    ids=lambda config: config.model_type,
)
def test_autocast_keeps_what_it_keeps_on_a_cpu(config: PreTrainedConfig) -> None:
    """States in fp32, and for each map that reads one a copy of its own: of Falcon's weights, which it
    transposes, too, but these do not grow with the text. Mixtral's experts are read as they are."""
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).train()
    with torch.device("meta"):
        meta = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    found = kept_bytes(meta, frozen=False, autocast=torch.bfloat16)
    assert found == pytest.approx(kept_on_a_cpu(model), rel=1e-6)
    assert found > planned(config, frozen=False)


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
