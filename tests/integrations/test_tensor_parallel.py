"""Tensor parallelism by transformers' own plan: routed models compute what whole ones do."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers
from packaging.version import Version
from transformers import LlamaForCausalLM

from modlab.plan import sizes_of
from tests.helpers.launch import launch
from tests.helpers.models import tiny_config
from tests.helpers.spread import found_by

WORKER = Path(__file__).with_name("spread_in_processes.py")
VOCABULARY = 97 if Version(transformers.__version__) >= Version("5.24") else 98
"""Odd, so that the processes hold unequal parts; transformers 5.17 refuses to cut such an output head."""


def test_two_processes_with_half_of_the_heads_are_one_model(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = tiny_config(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        initializer_range=0.2,
        pad_token_id=None,
    )
    model = LlamaForCausalLM(config).eval()
    model.save_pretrained(tmp_path / "model")
    launch(WORKER, 2, tmp_path / "model", tmp_path)
    alone = found_by(model)
    ranks = [torch.load(tmp_path / f"rank_{rank}.pt") for rank in range(2)]
    for rank in ranks:
        torch.testing.assert_close(rank["logits"], alone["logits"], rtol=1e-4, atol=1e-4)
        assert torch.equal(rank["tokens"], alone["tokens"])
        assert all(torch.equal(rank["keep"][i], keep) for i, keep in alone["keep"].items())
        assert "shared across ranks" in rank["refused"]
        assert rank["kv_bytes"] < 0.55 * alone["kv_bytes"], "each process holds its heads' keys alone"
    assert abs(ranks[0]["part"] / sizes_of(config, 2).by_heads - 1) < 0.05
