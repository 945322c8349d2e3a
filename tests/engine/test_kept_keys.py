"""Fast generation where routing decides about the cache alone (`skip="kv"`): the same tokens as the ordinary
path, and of what is not kept no more stored than the latest tokens.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import AttentionInterface

import modlab
from modlab.engine import prefill as prefill_module
from modlab.engine import step as step_module
from modlab.engine.attention import DECODE, decode_attention_function
from modlab.engine.prefill import prefill
from modlab.engine.ring import RingLayer
from modlab.execution.routed import RoutedKeys
from modlab.families.tiny_models import tiny_model
from tests.helpers.fast_generation import (
    DEVICE,
    NEW,
    LayersOnly,
    both_ways,
    generated,
    llama_on_device,
    masks_of_two_rows,
    prompts,
    stored_at_thresholds,
)
from tests.helpers.models import alternate_layers

kept_keys = functools.partial(llama_on_device, skip="kv")


@pytest.mark.parametrize("keep_recent", [1, 4, 16, 200])
@pytest.mark.parametrize("lengths", [(1,), (17,), (30, 3, 12)], ids=str)
def test_same_tokens_as_the_ordinary_path(keep_recent: int, lengths: tuple[int, ...]) -> None:
    model = kept_keys(keep_recent=keep_recent)
    last = both_ways(model, prompts(*lengths), eos_token_id=None)
    assert last["prompt_tokens"] == list(lengths)


@pytest.mark.parametrize(
    "settings",
    [
        {"do_sample": True, "temperature": 0.7, "top_k": 20},
        {"repetition_penalty": 1.3},
        {"num_return_sequences": 3, "do_sample": True},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_same_tokens_under_settings_of_generate(settings: dict[str, Any]) -> None:
    both_ways(kept_keys(), prompts(11, 6), max_new_tokens=20, **settings)


@pytest.mark.parametrize("kept", ["all", "none", "some", "rows"])
def test_a_routing_table_decides_prompt_and_new_tokens(kept: str) -> None:
    """And what is stored in the end are the latest tokens and older kept ones, no others."""
    model, inputs = kept_keys(), prompts(14, 6)
    masks = masks_of_two_rows(model, kept, 14 + NEW)
    with modlab.routing_override(model, modlab.RoutingTable(masks)):
        last = both_ways(model, inputs, eos_token_id=None)
    seen = [14 + NEW - 1, 6 + NEW - 1]
    for layer in range(6):
        stored = (
            [4 + int(masks[layer][row, : n - 4].sum()) for row, n in enumerate(seen)]
            if layer in masks
            else seen
        )
        assert last["kept_tokens"][layer] == stored


def test_bytes_are_those_of_what_is_stored_with_growth() -> None:
    model, inputs = kept_keys(), prompts(60, 20)
    last = both_ways(model, inputs, max_new_tokens=90, eos_token_id=None)
    token = 2 * 2 * 16 * 4 + 4  # K and V of 2 heads of 16 in fp32, and the column
    rings = len(model.mod.layers) * 2 * 4  # a flag each
    stored_bytes = sum(map(sum, last["kept_tokens"])) * token + rings
    slack = sum(max(16, n // 32) for row in last["kept_tokens"] for n in row) * token
    assert stored_bytes <= last["kv_bytes"] <= stored_bytes + slack
    routed = [sum(last["kept_tokens"][layer]) for layer in model.mod.layers]
    assert max(routed) < 60 + 20 + 2 * 89, "this routing should drop something"


@pytest.mark.parametrize(
    "model_type",
    ["mistral", "qwen2", "qwen3", "phi3", "phi", "gpt_neox", "gpt2", "olmo2", "mixtral", "qwen2_moe"],
)
def test_other_families_generate_the_same_tokens(model_type: str) -> None:
    model: Any = tiny_model(model_type)
    if getattr(model.config, "sliding_window", None):
        model.config.sliding_window = None
        model = type(model)(model.config).eval()
    modlab.convert(model, alternate_layers(skip="kv", keep_recent=5))
    model = model.to(DEVICE)
    mask = torch.rand(1, 80, generator=torch.Generator().manual_seed(4)) < 0.5
    with modlab.routing_override(model, modlab.RoutingTable(dict.fromkeys(model.mod.layers, mask))):
        vocabulary = model.get_input_embeddings().weight.shape[0]
        both_ways(model, prompts(13, 5, vocabulary=vocabulary), eos_token_id=None, max_new_tokens=12)


def test_rows_beyond_one_line_run_in_further_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = kept_keys(), prompts(12, 7, 9, 5)
    want = both_ways(model, inputs, eos_token_id=None)
    monkeypatch.setattr(prefill_module, "LINE_TOKENS", 20)
    got = both_ways(model, inputs, eos_token_id=None)
    assert got["kept_tokens"] == want["kept_tokens"]


def test_a_prompt_is_laid_out_as_a_ring_and_older_kept_tokens() -> None:
    model, inputs = kept_keys(), prompts(13, 3)
    keep = torch.rand(2, 13, generator=torch.Generator().manual_seed(0)) < 0.5
    modlab.enable_fast_generation(model, compile=False, check=False)
    engine = model.__dict__["mod_engine"]
    caches = {}
    for name, table in (("routed", keep), ("all", torch.ones_like(keep))):
        with modlab.routing_override(model, modlab.RoutingTable(dict.fromkeys(model.mod.layers, table))):
            caches[name] = prefill(engine, inputs["input_ids"], inputs["attention_mask"])[1][1]
    ring, everything = caches["routed"], caches["all"]
    assert isinstance(ring, RingLayer) and isinstance(everything, RingLayer)
    for row, n in enumerate((13, 3)):
        size = min(n, 4)
        older = [p for p in range(n - size) if keep[row, p]]
        assert ring.lengths[row] == size + len(older) and everything.lengths[row] == n
        places = {p: p % 4 for p in range(n - size, n)} | {p: 4 + i for i, p in enumerate(older)}
        whole = {p: p % 4 if p >= n - size else 4 + p for p in range(n)}
        for p, slot in places.items():  # the first routed layer's keys do not depend on its own routing
            want = everything.keys[:, everything.starts[row] + whole[p]]
            torch.testing.assert_close(ring.keys[:, ring.starts[row] + slot], want)
            if slot < 4:
                assert bool(ring.ring_kept[row, slot]) == bool(keep[row, p])
    assert not ring.ring_kept[1, 3], "a slot that is not in use"


def test_thresholds_are_live() -> None:
    model, inputs = kept_keys(), prompts(25)
    modlab.enable_fast_generation(model, compile=False)
    totals = stored_at_thresholds(model, inputs, (0.2, 0.5, 0.8, 0.2))
    assert totals[0] > totals[1] > totals[2] and totals[3] == totals[0]


def test_the_model_is_left_as_it_was() -> None:
    """Classes, forwards and attributes, after a generation and after one that was interrupted."""

    def interrupt(_ids: Any, _scores: Any, **_kwargs: Any) -> Any:
        raise KeyboardInterrupt

    model, inputs = kept_keys(), prompts(9, 4)
    before = [(type(module), set(module.__dict__)) for module in model.modules()]
    want = generated(model, inputs)
    modlab.enable_fast_generation(model, compile=False)
    with pytest.raises(KeyboardInterrupt):
        generated(model, inputs, stopping_criteria=[interrupt])
    assert isinstance(model.model.layers[1].self_attn, RoutedKeys)
    assert generated(model, inputs) == want
    modlab.disable_fast_generation(model)
    assert [(type(module), set(module.__dict__)) for module in model.modules()] == before


@pytest.mark.parametrize("recent", [1, 4, 9])
def test_padding_between_tokens_is_no_part_of_the_recent_past(recent: int) -> None:
    model, inputs = kept_keys(keep_recent=recent), prompts(19, 12)
    inputs["attention_mask"][0, 6:11] = 0
    inputs["attention_mask"][1, 13] = 0
    last = both_ways(model, inputs, eos_token_id=None)
    assert last["prompt_tokens"] == [14, 11]


@pytest.mark.skipif(DEVICE.type != "cpu", reason="runs compiled steps from the host")
def test_routed_layers_are_compiled_like_dense_ones_and_once_for_all(
    make_llama: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=counter))
    compiler = LayersOnly(enabled=True)
    monkeypatch.setattr(step_module, "Compiler", lambda enabled: compiler)
    inputs, frames = prompts(9, 4), []
    for model in (
        make_llama().to(DEVICE),
        kept_keys(num_hidden_layers=3),
        kept_keys(num_hidden_layers=6),
    ):
        want = generated(model, inputs, max_new_tokens=4, eos_token_id=None)
        modlab.enable_fast_generation(model, compile=False, check=False)
        # the reference attention of a CPU reads buffers of all sizes, for which it would be compiled again
        opaque = torch.compiler.disable(decode_attention_function)
        monkeypatch.setitem(AttentionInterface._global_mapping, DECODE, opaque)
        assert generated(model, inputs, max_new_tokens=4, eos_token_id=None) == want
        frames.append(counter.frame_count)
    dense, *routed = frames
    assert routed[0] == routed[1] <= 2 * dense, (
        "no more pieces than a dense layer, whose class is another one"
    )


@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a GPU")
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("compile", [False, True])
def test_on_a_gpu_steps_are_graphs(rows: int, compile: bool) -> None:
    model, inputs = kept_keys(), prompts(*[50] * rows)
    want = generated(model, inputs, eos_token_id=None)
    modlab.enable_fast_generation(model, compile=compile)
    assert generated(model, inputs, eos_token_id=None) == want
    report = modlab.fast_generation_report(model)
    assert report["branch"] in ("torch", "cuda-python") and report["compiled"] == compile
    assert report["batch_sizes"] == [rows]
