"""A small model and rows that the tests of training share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import modlab
from tests.helpers.training import T, V


@pytest.fixture
def make(make_llama: Callable[..., Any]) -> Callable[..., Any]:
    """A very small dense model; `mod` converts it."""

    def make(seed: int = 0, mod: modlab.MoDConfig | None = None, **changes: Any) -> Any:
        sizes = {
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
        }
        sizes |= {
            "num_hidden_layers": 4,
            "vocab_size": V,
            "max_position_embeddings": T,
            "tie_word_embeddings": True,
        }
        model = make_llama(seed=seed, **(sizes | changes))
        return model if mod is None else modlab.convert(model, mod)

    return make


@pytest.fixture(scope="module")
def rows() -> torch.Tensor:
    """Sequences that count in steps of 1, 2 or 3: easy to learn, different enough to tell batches apart."""
    g = torch.Generator().manual_seed(0)
    stride, start = (torch.randint(low, high, (160, 1), generator=g) for low, high in ((1, 4), (0, V)))
    return (torch.arange(T)[None] * stride + start) % V
