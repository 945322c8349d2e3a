"""Tensor parallelism by transformers' own plan: routed models compute what whole ones do."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from transformers import LlamaForCausalLM

import modlab
from modlab.plan import sizes_of
from tests.helpers.launch import launch
from tests.helpers.models import narrow_config
from tests.helpers.spread import GATES, found_by
from tests.helpers.tokenizers import make_tokenizer

WORKER = Path(__file__).with_name("spread_in_processes.py")
HEADS = 4
VOCABULARY = 97 if Version(transformers.__version__) >= Version("5.24") else 100
"""Odd, so that the processes hold unequal parts; transformers 5.17 refuses to cut such an output head."""


def llama(kv_heads: int) -> Any:
    torch.manual_seed(0)
    config = narrow_config(
        vocab_size=VOCABULARY,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=kv_heads,
        initializer_range=0.2,
    )
    return LlamaForCausalLM(config).eval()


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_with_some_of_the_heads_are_one_model(tmp_path: Path, processes: int) -> None:
    """With a gate a KV head, too: every process decides for all heads and stores what its own are to keep."""
    model = llama(HEADS)
    model.save_pretrained(tmp_path / "model")
    llama(1).save_pretrained(tmp_path / "few")
    rounded = copy.deepcopy(model)
    modlab.convert(rounded, modlab.MoDConfig(kv_cache_dtype="int8")).save_pretrained(tmp_path / "rounded")
    make_tokenizer().save_pretrained(tmp_path / "rounded")
    launch(WORKER, processes, *(tmp_path / name for name in ("model", "few", "rounded")), tmp_path)
    ranks = [torch.load(tmp_path / f"rank_{rank}.pt") for rank in range(processes)]
    for gates in GATES:
        alone = found_by(model, gates)
        for number, rank in enumerate(ranks):
            found = rank[gates]
            for name in ("logits", "in pieces"):
                torch.testing.assert_close(found[name], alone[name], rtol=1e-4, atol=1e-4)
            assert torch.equal(found["tokens"], alone["tokens"])
            assert all(torch.equal(found["keep"][i], keep) for i, keep in alone["keep"].items())
            assert found["lengths"] == [of_rank(lengths, number, processes) for lengths in alone["lengths"]]
            assert found["kv_bytes"] < 1.15 * alone["kv_bytes"] / processes, "its own heads' keys alone"
    for rank in ranks:
        for skip in ("prompt", "kv+prompt"):
            assert f"with skip={skip!r}" in rank["refused"][skip]
            assert "shared across ranks" in rank["refused"][skip]
            assert "skip='kv' runs there" in rank["refused"][skip]
        for kind in ("fast", "fast, dense"):
            assert "shared across ranks (tensor parallelism" in rank["refused"][kind]
            assert "model.generate works without it" in rank["refused"][kind]
        for kind in ("int8", "int8, live"):
            assert "kv_cache_dtype='int8'" in rank["refused"][kind]
            assert "shared across ranks (tensor parallelism)" in rank["refused"][kind]
        assert "its forward fails" in rank["refused"]["few"]
        for said, stored in rank["told"].values():
            assert "are shared across ranks (tensor parallelism)" in said and stored == "auto"
    assert abs(ranks[0]["part"] / sizes_of(model.config, processes).by_heads - 1) < 0.05


def of_rank(lengths: list[int], rank: int, processes: int) -> list[int]:
    """Stored tokens by row, or by row and KV head where heads differ: of those of one process."""
    if len(lengths) == 2:  # rows
        return lengths
    each = HEADS // processes
    return [n for row in range(2) for n in lengths[row * HEADS :][rank * each : (rank + 1) * each]]
