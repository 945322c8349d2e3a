"""A converted random model with a tokenizer, the texts of the study in tiny, and three questions a task."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import modlab
from benchmarks.real_models import evaluate
from benchmarks.real_models.measured.product import Product
from tests.helpers.models import scatter_gates
from tests.helpers.tokenizers import make_tokenizer

WINDOW = 16


@pytest.fixture(autouse=True)
def short_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluate, "FAR", 256)


@pytest.fixture(scope="session")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model with gates a KV head, in a folder of its own."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=320, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=2048, initializer_range=0.3,
    )  # fmt: skip
    settings = modlab.MoDConfig(layers="all", gates="kv_head", keep_recent=WINDOW)
    model = scatter_gates(modlab.convert(LlamaForCausalLM(config), settings))
    path = tmp_path_factory.mktemp("measured") / "tiny"
    model.save_pretrained(path)
    make_tokenizer(320).save_pretrained(path)
    return path


@pytest.fixture
def product(converted: Path) -> Product:
    return Product.load(converted, None, "cpu", fast=False)


@pytest.fixture(scope="session")
def questions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files as of the evaluation sets."""
    folder = tmp_path_factory.mktemp("questions")
    plain = [
        {"id": str(i), "query": f"question {i}:", "choices": [" yes", " no no", " it is"], "gold": i % 3}
        for i in range(26)
    ]
    for name in ("arc_challenge", "hellaswag_1000"):
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, plain)))
    prefixes = dict.fromkeys(("arc_challenge", "hellaswag_1000"), "question 99: yes\n\nquestion 98: no no")
    (folder / "fewshot_prefixes.json").write_text(json.dumps(prefixes))
    for name in ("mmlu_dev", "mmlu_test"):
        rows = [
            {"subject": subject, "query": f"{name} {i}", "choices": list("wxyz"), "gold": i % 4}
            for subject in ("some_law", "some_art")
            for i in range(5)
        ]
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    problem = {
        "task_id": "0", "prompt": 'def same(x):\n    """x"""\n', "entry_point": "same",
        "canonical_solution": "    return x\n", "test": "def check(f):\n    assert f(3) == 3\n",
    }  # fmt: skip
    with gzip.open(folder / "HumanEval.jsonl.gz", "wt") as file:
        file.write("\n".join([json.dumps(problem)] * 3))
    return folder
