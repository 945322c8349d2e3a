"""A random base of two layers and texts of random tokens, both tiny."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.real_models import base as bases
from benchmarks.real_models.base import Base
from benchmarks.real_models.probes import recall, retrieval
from benchmarks.real_models.texts import EVAL_ROWS, TEXTS, Data

VOCABULARY = 97


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen2 folder: biases of queries, keys and values, two query heads for a KV head."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=1024, tie_word_embeddings=False,
    )  # fmt: skip
    model = Qwen2ForCausalLM(config)
    for name, weight in model.named_parameters():
        weight.data = torch.randn_like(weight) * (0.3 if weight.dim() > 1 or "bias" in name else 0.0) + (
            1.0 if "norm" in name else 0.0
        )
    path = tmp_path_factory.mktemp("qwen2")
    model.save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def base(folder: Path) -> Base:
    return bases.load(folder, dtype=torch.float32)


@pytest.fixture(scope="session")
def data() -> Data:
    random = np.random.default_rng(0)

    def rows(count: int, T: int = 512) -> np.ndarray:
        return random.integers(VOCABULARY, size=(count, T), dtype=np.int32)

    def encode(text: str) -> list[int]:
        return [ord(letter) % VOCABULARY for letter in text]

    return Data(
        rows(1, 20_000)[0],
        rows(30, 8),
        {name: rows(EVAL_ROWS) for name in TEXTS},
        recall(rows(2), (256,), each=2, width=32),
        retrieval(rows(2), encode, (128, 256), each=2),
        np.array([1, 2, 3], dtype=np.int32),
    )
