"""What lies in folders: a converted model, and a dense one that routers are put into."""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

import modlab
from tests.helpers.models import spread_gates


@pytest.fixture
def saved(tiny_llama, tmp_path) -> Path:
    spread_gates(tiny_llama)
    modlab.set_threshold(tiny_llama, {1: 0.3, 3: 0.6})
    folder = tmp_path / "saved"
    tiny_llama.save_pretrained(folder)
    vocab = {f"t{i}": i for i in range(512)}
    PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocab, unk_token="t0"))
    ).save_pretrained(folder)
    return folder


@pytest.fixture
def base(make_llama, tmp_path):
    """A folder with a dense model and a tokenizer."""
    _, tokenizer = modlab.load("demo-dense")
    make_llama().save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    return tmp_path / "base"
