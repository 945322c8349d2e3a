"""Fast generation where each KV head keeps tokens of its own, and routers with a hidden layer.

The same tokens as the ordinary path, and no byte for what no head keeps.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import modlab
from modlab.engine import attention as attention_module
from modlab.engine.attention import KeptKeys, LayerPrefill, LineBlocks, attend_by_head
from modlab.engine.deferred import keep_everything
from modlab.engine.prefill import prefill
from modlab.engine.ring import RingBuffer
from modlab.errors import ModlabError
from modlab.families.tiny_models import tiny_model
from modlab.kernels.kept_attention import reference_kept_attention, reference_store_kept
from tests.helpers.fast_generation import (
    DEVICE,
    NEW,
    both_ways,
    generated,
    llama_on_device,
    prompts,
    stored_at_thresholds,
    use_engine,
)
from tests.helpers.models import alternate_layers, scatter_gates

RECENT, G = 4, 2
"""`keep_recent` and KV heads of these models."""


def masks_by_head(model: Any, shares: tuple[float, ...], length: int) -> dict[int, Tensor]:
    """Forced routing of two rows, bool [2, length, G]: each head keeps its share."""
    generator = torch.Generator().manual_seed(2)
    chance = torch.tensor(shares)
    return {i: torch.rand(2, length, len(shares), generator=generator) < chance for i in model.mod.layers}


@pytest.mark.parametrize("gates", ["layer", "kv_head"])
def test_recent_tokens_are_live(gates: str) -> None:
    """An engine that has steps for one number of them makes new ones for another."""
    model, ordinary = (llama_on_device(skip="kv", gates=gates) for _ in range(2))
    modlab.enable_fast_generation(model, compile=False)
    inputs, stored = prompts(30, 9), []
    for tokens in (RECENT, 9, 1, RECENT):
        modlab.set_keep_recent(model, tokens)
        modlab.set_keep_recent(ordinary, tokens)
        want = generated(ordinary, inputs, eos_token_id=None)
        assert generated(model, inputs, eos_token_id=None) == want
        stored.append(modlab.fast_generation_report(model)["last"]["kept_tokens"])
    assert stored[0] == stored[3] != stored[1] != stored[2]


def test_more_recent_tokens_than_a_bound_allows_are_refused() -> None:
    model = llama_on_device(skip="kv", gates="kv_head")
    modlab.enable_fast_generation(model, compile=False, kv_tokens=8)
    modlab.set_keep_recent(model, 9)
    with pytest.raises(ModlabError, match="kv_tokens=8 is less than the latest 9 tokens"):
        model.generate(**prompts(14), max_new_tokens=2)
    modlab.set_keep_recent(model, 8)
    model.generate(**prompts(14), max_new_tokens=2)


@pytest.mark.parametrize("shares", [(0.0, 1.0), (1.0, 1.0), (0.0, 0.0), (0.1, 0.9)], ids=str)
def test_a_table_decides_by_head_and_each_head_stores_what_it_keeps(shares: tuple[float, ...]) -> None:
    model, inputs = llama_on_device(skip="kv", gates="kv_head"), prompts(14, 6)
    masks = masks_by_head(model, shares, 14 + NEW)
    with modlab.routing_override(model, modlab.RoutingTable(masks)):
        last = both_ways(model, inputs, eos_token_id=None)
    for layer, mask in masks.items():
        for row, seen in enumerate((14 + NEW - 1, 6 + NEW - 1)):
            heads = RECENT + mask[row, : seen - RECENT].sum(0)
            assert last["kept_tokens"][layer][row] == -(-int(heads.sum()) // G)


def test_a_table_for_all_heads_serves_each_of_them() -> None:
    model, inputs = llama_on_device(skip="kv", gates="kv_head"), prompts(14, 6)
    mask = torch.rand(2, 60, generator=torch.Generator().manual_seed(1)) < 0.5
    with modlab.routing_override(model, modlab.RoutingTable(dict.fromkeys(model.mod.layers, mask))):
        both_ways(model, inputs, eos_token_id=None)


@pytest.mark.parametrize(
    "settings", [{"do_sample": True, "top_k": 20}, {"num_return_sequences": 2, "do_sample": True}]
)
@pytest.mark.parametrize("hidden", [0, 5])
def test_same_tokens_under_settings_of_generate(hidden: int, settings: dict[str, Any]) -> None:
    model = llama_on_device(skip="kv", gates="kv_head", router_hidden=hidden)
    both_ways(model, prompts(11, 6), max_new_tokens=20, **settings)


@pytest.mark.parametrize("model_type", ["mistral", "qwen2", "qwen3", "phi3", "gpt_neox", "olmo2", "mixtral"])
def test_other_families_generate_the_same_tokens(model_type: str) -> None:
    model: Any = tiny_model(model_type)
    if getattr(model.config, "sliding_window", None):
        model.config.sliding_window = None
        model = type(model)(model.config).eval()
    config = alternate_layers(skip="kv", keep_recent=5, gates="kv_head", router_hidden=3)
    model = scatter_gates(modlab.convert(model, config), 2.4).to(DEVICE)
    vocabulary = model.get_input_embeddings().weight.shape[0]
    both_ways(model, prompts(13, 5, vocabulary=vocabulary), eos_token_id=None, max_new_tokens=12)


def test_thresholds_are_live() -> None:
    model, inputs = llama_on_device(skip="kv", gates="kv_head"), prompts(30, 9)
    modlab.enable_fast_generation(model, compile=False)
    totals = stored_at_thresholds(model, inputs, (0.001, 0.5, 0.999))
    assert totals[0] > totals[1] > totals[2]


def test_lines_of_rows_are_joined_head_by_head() -> None:
    """Rows that run one line each, as if they had run in one."""
    model, inputs = llama_on_device(skip="kv", gates="kv_head"), prompts(30, 12, 21)
    caches = []
    for tokens in (1, 1000):
        engine = use_engine(model, line_tokens=tokens)
        with torch.no_grad():
            caches.append(prefill(engine, inputs["input_ids"], inputs["attention_mask"])[1])
        modlab.disable_fast_generation(model)
    for apart, together in zip(*caches, strict=True):
        assert apart.lengths == together.lengths
        if isinstance(apart, RingBuffer) and isinstance(together, RingBuffer):
            assert apart.heads == together.heads == G and apart.row_lengths == together.row_lengths
            assert torch.equal(apart.ring_kept, together.ring_kept)
        assert apart.keys is not None and together.keys is not None
        for n, here, there in zip(apart.lengths, apart.starts, together.starts, strict=True):
            torch.testing.assert_close(apart.keys[:, here : here + n], together.keys[:, there : there + n])


def test_what_is_allocated_follows_what_each_head_keeps() -> None:
    """One head of a layer keeps everything, the other nothing: half of the bytes, and little more."""
    model, inputs = llama_on_device(skip="kv", gates="kv_head"), prompts(900)
    masks = {i: torch.tensor([True, False]).expand(1, 1000, G) for i in model.mod.layers}
    modlab.enable_fast_generation(model, compile=False)
    with modlab.routing_override(model, modlab.RoutingTable(masks)), torch.no_grad():
        caches = prefill(model.__dict__["mod_engine"], inputs["input_ids"], None)[1]
    for layer in model.mod.layers:
        cache = caches[layer]
        assert cache.lengths == [900, RECENT]
        assert cache.keys is not None and cache.values is not None
        allocated = cache.keys.nbytes + cache.values.nbytes
        assert allocated <= 1.05 * (900 + RECENT) * 2 * 16 * 4


def ring_buffer(lengths: list[int], heads: int, seed: int = 0) -> RingBuffer:
    generator = torch.Generator().manual_seed(seed)
    buffer = RingBuffer()
    buffer.heads = heads
    like = torch.empty(1, 0, 8, device=DEVICE)
    buffer.reserve([n + buffer.slack(n) for n in lengths], like, like)
    assert buffer.keys is not None and buffer.values is not None
    for tensor in (buffer.keys, buffer.values):
        tensor.copy_(torch.randn(tensor.shape, generator=generator))
    buffer.lengths = list(lengths)
    return buffer


def test_growth_moves_every_segment_and_nothing_else() -> None:
    lengths = [20, 1, 0, 700, 33, 16]
    buffer, before = ring_buffer(lengths, 3), ring_buffer(lengths, 3)
    buffer.lengths = [n + buffer.slack(n) for n in lengths]  # all full
    full = list(buffer.lengths)
    buffer.grow()
    assert buffer.lengths == full and buffer.room >= 16
    assert (
        buffer.keys is not None and before.keys is not None and buffer.keys.shape[1] == sum(buffer.capacities)
    )
    for n, here, there in zip(full, buffer.starts, before.starts, strict=True):
        for name in ("keys", "values"):
            got, want = getattr(buffer, name), getattr(before, name)
            assert torch.equal(got[:, here : here + n], want[:, there : there + n])


def test_heads_that_keep_everything_are_found() -> None:
    assert keep_everything([10, 3], [6, 2, 0, 0], recent=4) == [True, False]
    assert keep_everything([10, 3], [6, 6, 0, 1], recent=4) == [True, False]
    assert keep_everything([10, 3], [5, 0], recent=4) == [False]
    assert keep_everything([4], [0, 0, 0], recent=4) == [
        True,
        True,
        True,
    ]  # nothing is old enough to be dropped


def test_layers_of_a_line_share_the_numbers_that_it_sends(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[Tensor] = []

    def noting(numbers: Tensor, device: torch.device) -> Tensor:
        sent.append(numbers)
        return numbers

    monkeypatch.setattr(attention_module, "sent", noting)
    blocks = LineBlocks([10, 3], DEVICE)
    for _ in range(3):
        assert [t.tolist() for t in blocks.heads([False, True, False, True], 2)] == [
            [0, 2],
            [1, 3],
            [2, 3, 6, 7],
        ]
        assert blocks.older(4).tolist() == [0, 10, 6, 10]  # where they begin, then where they end
    assert len(sent) == 2
    assert [t.tolist() for t in blocks.heads([False] * 4, 2)] == [[0, 1, 2, 3], [], []]
    assert blocks.older(2).tolist() == [0, 10, 8, 11]
    assert len(sent) == 4


def test_a_prompt_sends_where_its_row_begins_once_for_all_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a gate a layer the only segment begins at 0 in each of them."""
    model = llama_on_device(skip="kv", gates="layer")
    modlab.enable_fast_generation(model, compile=False)
    uploads: list[list[int]] = []
    real = attention_module.sent

    def noting(numbers: Tensor, device: torch.device) -> Tensor:
        uploads.append(numbers.tolist())
        return real(numbers, device)

    monkeypatch.setattr(attention_module, "sent", noting)
    monkeypatch.setattr("modlab.engine.ring.sent", noting)
    ids = prompts(20, 20)["input_ids"][:1]
    buffers = prefill(model.__dict__["mod_engine"], ids, None)[1]
    assert len(buffers) > 1 and all(buffer.starts == [0] for buffer in buffers)
    assert uploads.count([0]) == 1


@pytest.mark.parametrize("by_head", [False, True])
@pytest.mark.parametrize("open_heads", [(), (1,), (0, 2), (0, 1, 2)], ids=str)
def test_open_heads_run_dense_and_the_others_on_kept_keys(
    open_heads: tuple[int, ...], by_head: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The way of a GPU, its kernels in the interpreter where there is none."""
    pytest.importorskip("triton", reason="Triton is not installed")
    counts, heads, M, H, recent = [40, 7], 3, 2, 16, 5
    S, generator = sum(counts), torch.Generator().manual_seed(4)
    q, k, v = (torch.randn(1, n, S, H, generator=generator).to(DEVICE) for n in (heads * M, heads, heads))
    keep = torch.rand(S, heads if by_head else 1, generator=generator) < 0.3
    keep[:, list(open_heads) if by_head else slice(0, int(len(open_heads) == heads))] = True
    keep = keep.to(DEVICE)
    bounds = torch.tensor(np.cumsum([0, *counts]), device=DEVICE)
    blocks = LineBlocks(counts, DEVICE)
    kept = KeptKeys(keep, bounds, recent, blocks)
    buffer, older = RingBuffer(), kept.older.read()
    part = LayerPrefill(buffer, counts, torch.arange(S, device=DEVICE), bounds.int(), False, kept)
    stored = buffer.lay_out(counts, older, kept.before, recent, k[0], v[0], blocks.sent)
    reference_store_kept(k, v, counts, stored)
    dense: list[int] = []
    varlen = attention_module.varlen_attention

    def noting(query: Tensor, *args: Any) -> Tensor:
        dense.append(query.shape[1] // M)
        return varlen(query, *args)

    monkeypatch.setattr(attention_module, "varlen_attention", noting)
    whole = keep_everything(counts, older, recent)
    got = attend_by_head(part, blocks, stored, whole, q, k, v, None)
    want = reference_kept_attention(q, k, v, keep, counts, recent, None)
    torch.testing.assert_close(got, want, atol=2e-5, rtol=2e-5)
    expected = len(open_heads) if by_head else heads * (len(open_heads) == heads)
    assert dense == [expected] * (expected > 0)
