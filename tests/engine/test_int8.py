"""Fast generation with keys and values in eight bits: the ordinary path's tokens, half of the bytes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import modlab
from modlab.cache.int8 import Int8Range
from modlab.engine import attention as attention_module
from modlab.engine.attention import KeptKeys, LayerPrefill, LineBlocks, attend_by_head, store_kept_keys
from modlab.engine.budget import MIB, layer_bytes
from modlab.engine.prefill import prefill, scratch_buffers
from modlab.engine.ring import Int8Ring
from modlab.engine.tables import LayerStep
from modlab.families.tiny_models import tiny_model
from modlab.kernels.decode_attention import decode_ring_attention, fold
from modlab.kernels.int8 import encode
from modlab.kernels.kept_attention import reference_kept_attention, store_kept
from tests.helpers.fast_generation import (
    DEVICE,
    NEW,
    SETTINGS,
    both_ways,
    generated,
    llama_on_device,
    prompts,
    stepped,
    use_engine,
)
from tests.helpers.models import alternate_layers, leaving_llama, scatter_gates

RECENT = 4
GATES = pytest.mark.parametrize("gates", ["layer", "kv_head"])
SKIPS = pytest.mark.parametrize("skip", ["kv", "kv+prompt"])


def rounded(gates: str, skip: str = "kv", **fields: Any) -> Any:
    """A model that stores keys and values in eight bits."""
    if skip == "kv":
        model = llama_on_device(skip="kv", gates=gates, **fields)
    else:
        model = leaving_llama(skip, gates, **fields).to(DEVICE)
    modlab.set_kv_cache_dtype(model, "int8")
    return model


@GATES
@SKIPS
@pytest.mark.parametrize("lengths", [(2, 1), (30, 3, 12)], ids=str)
def test_same_tokens_as_the_ordinary_path(lengths: tuple[int, ...], skip: str, gates: str) -> None:
    last = both_ways(rounded(gates, skip), prompts(*lengths), eos_token_id=None)
    assert last["prompt_tokens"] == list(lengths)


@GATES
def test_buffers_that_grow_go_on_the_same(gates: str) -> None:
    """Steps enough for every buffer to move several times."""
    both_ways(rounded(gates), prompts(20, 3), eos_token_id=None, max_new_tokens=120)


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda settings: next(iter(settings)))
def test_same_tokens_under_settings_of_generate(settings: dict[str, Any]) -> None:
    both_ways(rounded("kv_head"), prompts(11, 6), max_new_tokens=20, **settings)


@pytest.mark.parametrize("model_type", ["qwen2", "phi3", "gpt_neox"])
def test_other_families_generate_the_same_tokens(model_type: str) -> None:
    model: Any = tiny_model(model_type)
    if getattr(model.config, "sliding_window", None):
        model.config.sliding_window = None
        model = type(model)(model.config).eval()
    config = alternate_layers(skip="kv", keep_recent=5, gates="kv_head", kv_cache_dtype="int8")
    model = scatter_gates(modlab.convert(model, config), 2.4).to(DEVICE)
    vocabulary = model.get_input_embeddings().weight.shape[0]
    both_ways(model, prompts(13, 5, vocabulary=vocabulary), eos_token_id=None, max_new_tokens=12)


@torch.no_grad()
@GATES
@SKIPS
def test_logits_are_those_of_the_ordinary_path(skip: str, gates: str) -> None:
    """Of a prompt and of a step after others, far nearer than with full numbers. A number between two codes
    may fall either way, so that rounding is not the same to the last bit."""
    model, inputs = rounded(gates, skip, by=0.1) if skip == "kv+prompt" else rounded(gates), prompts(40)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    want, engine = model(ids, use_cache=False).logits[:, -1], use_engine(model)
    engine.defer_tokens = 10**6
    got = [prefill(engine, ids, mask)[0]]
    if skip == "kv":  # else the tokens of a prompt are those that leave early
        stepped(engine, ids, mask, 33)
        got.append(engine.steps[1].logits)
    modlab.set_kv_cache_dtype(model, "auto")
    full = model(ids, use_cache=False).logits[:, -1]
    assert all(float((one - want).norm()) < 0.1 * float((full - want).norm()) for one in got)


@GATES
def test_lines_and_deferred_layouts_store_the_same(gates: str) -> None:
    model, inputs = rounded(gates), prompts(30, 12, 21)
    caches = []
    for tokens, defer in ((1, 0), (1000, 0), (1000, 1000)):
        engine = use_engine(model, line_tokens=tokens)
        engine.defer_tokens = defer
        with torch.no_grad():
            caches.append(prefill(engine, inputs["input_ids"], inputs["attention_mask"])[1])
        modlab.disable_fast_generation(model)
    for layer in model.mod.layers:
        apart, together, late = (cache[layer] for cache in caches)
        for other in (together, late):
            assert isinstance(apart, Int8Ring) and isinstance(other, Int8Ring)
            assert apart.lengths == other.lengths
            for name in apart.contents:
                here, there = getattr(apart, name), getattr(other, name)
                assert there.shape[1] == sum(other.capacities)
                for n, a, b in zip(apart.lengths, apart.starts, other.starts, strict=True):
                    off = (here[:, a : a + n].float() - there[:, b : b + n].float()).abs().max()
                    assert off <= (1.0 if here.dtype == torch.int8 else 1e-4), name  # ties fall either way


@GATES
def test_what_is_stored_is_codes_and_steps_alone(gates: str) -> None:
    model, inputs = rounded(gates), prompts(60, 20)
    plain = llama_on_device(skip="kv", gates=gates)
    for one in (model, plain):
        modlab.enable_fast_generation(one, compile=False)
    caches = [
        prefill(one.__dict__["mod_engine"], inputs["input_ids"], inputs["attention_mask"])[1]
        for one in (model, plain)
    ]
    for layer in model.mod.layers:
        codes, numbers = (cache[layer] for cache in caches)
        assert isinstance(codes, Int8Ring) and codes.keys is not None and codes.key_steps is not None
        assert codes.keys.dtype == torch.int8 and codes.key_steps.dtype == torch.float16
        assert numbers.keys is not None and numbers.keys.dtype == torch.float32
        token = sum(getattr(codes, name)[:, 0].nbytes for name in codes.contents)
        assert token * model.config.num_key_value_heads == (2 * 16 + 2 * 2) * 2 * len(codes.keys)
        held = [t for t in vars(codes).values() if isinstance(t, Tensor) and t.dim() == 3]
        assert len(held) == 4, "nothing is held twice"


@GATES
@pytest.mark.parametrize("tokens", [RECENT, 11])
def test_a_bound_counts_codes(tokens: int, gates: str) -> None:
    model, inputs = rounded(gates), prompts(30, 3, 12)
    modlab.enable_fast_generation(model, compile=False, kv_tokens=tokens)
    generated(model, inputs, eos_token_id=None)
    stored = [modlab.fast_generation_report(model)["last"]["kept_tokens"][i] for i in model.mod.layers]
    assert max(map(max, stored)) == tokens
    modlab.enable_fast_generation(model, compile=False, kv_mib=0.3)
    engine = model.__dict__["mod_engine"]
    before = engine.budget.older(2, 60 + NEW)
    generated(model, prompts(60, 20), eos_token_id=None)
    assert modlab.fast_generation_report(model)["last"]["kv_bytes"] <= 0.3 * MIB
    modlab.set_kv_cache_dtype(model, "auto")
    assert engine.budget.older(2, 60 + NEW) < before, "full numbers take more"
    modlab.set_kv_cache_dtype(model, "int8")
    assert engine.budget.older(2, 60 + NEW) == before


@GATES
def test_a_bound_that_is_not_met_changes_nothing(gates: str) -> None:
    inputs = prompts(30, 9)
    want = generated(rounded(gates), inputs, eos_token_id=None)
    model = modlab.enable_fast_generation(rounded(gates), compile=False, kv_tokens=200)
    assert generated(model, inputs, eos_token_id=None) == want


def test_bytes_of_layers_are_those_of_codes_and_steps() -> None:
    for gates, heads in (("layer", 1), ("kv_head", 2)):
        found = layer_bytes(scratch_buffers(use_engine(rounded(gates)), 1))
        assert [layer.gates for layer in found] == [0, heads] * 3
        assert [layer.token for layer in found] == [2 * 2 * 16 * 4, 2 * 2 * (16 + 2)] * 3


@GATES
@SKIPS
def test_the_type_is_live(skip: str, gates: str) -> None:
    """An engine that has steps for one type makes new ones for the other."""
    model, ordinary = rounded(gates, skip), rounded(gates, skip)
    modlab.enable_fast_generation(model, compile=False)
    inputs, sizes = prompts(60, 9), []
    for dtype in ("int8", "auto", "int8"):
        for one in (model, ordinary):
            modlab.set_kv_cache_dtype(one, dtype)
        want = generated(ordinary, inputs, eos_token_id=None)
        assert generated(model, inputs, eos_token_id=None) == want
        last = modlab.fast_generation_report(model)["last"]
        assert last["fast"], last["why"]
        sizes.append(last["kv_bytes"])
    assert sizes[0] == sizes[2] < sizes[1]


def test_steps_are_made_anew_where_the_type_has_changed() -> None:
    model = rounded("layer")
    engine = use_engine(model)
    first = engine.step(1)
    assert first is engine.step(1)
    modlab.set_kv_cache_dtype(model, "auto")
    second = engine.step(1)
    assert second is not first and second is engine.step(1)
    assert [layer.int8 is None for layer in second.tables.layers] == [True] * 6
    assert [layer.int8 is None for layer in first.tables.layers] == [True, False] * 3


def by_kernels(step: LayerStep, ring: Tensor, new: tuple[Tensor, Tensor, Tensor], scale: float) -> Tensor:
    """`_decode_ring` as on a GPU."""
    if step.int8 is None:
        channels = ()
    else:
        channels = (step.int8.key_shift, step.int8.key_step, step.int8.value_step)
    folded = [fold(x, len(step.lengths)) for x in new]
    state = (step.table, step.lengths, step.keep, ring, step.position[:, 0], scale, None)
    return decode_ring_attention(*folded, *state, *channels).view(*new[0].shape[:2], -1)


def filled(kept: Any, query: Tensor, key: Tensor, value: Tensor, stored: Any) -> None:
    """`_fill` as on a GPU."""
    store_kept(key, value, kept.blocks.of(32), 32, stored)


@GATES
@SKIPS
def test_kernels_of_a_gpu_say_the_same(skip: str, gates: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A prompt and steps after it, in Triton's interpreter where there is no GPU."""
    pytest.importorskip("triton", reason="Triton is not installed")
    model, inputs = rounded(gates, skip), prompts(17, 9)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]

    def run() -> tuple[Tensor, list[Any]]:
        engine = use_engine(model)
        buffers, _ = stepped(engine, ids, mask, 14)
        return engine.steps[2].logits.clone(), buffers

    want, buffers = run()

    def encoded(part: LayerPrefill, key: Tensor, value: Tensor) -> Any:
        return None if part.int8 is None else encode(part.int8, key, value)

    monkeypatch.setattr(attention_module, "_fill", filled)
    monkeypatch.setattr(attention_module, "encoded_line", encoded)
    monkeypatch.setattr(attention_module, "_decode_ring", by_kernels)
    got, others = run()
    torch.testing.assert_close(got, want, atol=1e-3, rtol=1e-3)  # a code or two fall the other way
    for one, other in zip(buffers, others, strict=True):
        assert one.lengths == other.lengths and one.starts == other.starts


@pytest.mark.parametrize("by_head", [False, True])
def test_a_prompt_attends_on_a_gpu_to_what_codes_say(by_head: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The way of a GPU, its kernels in the interpreter where there is none: numbers of the model's type for
    the one layer, and codes left behind."""
    pytest.importorskip("triton", reason="Triton is not installed")
    counts, heads, H, recent = [40, 7], 2, 16, 5
    S, generator = sum(counts), torch.Generator().manual_seed(4)
    q, k, v = (torch.randn(1, n, S, H, generator=generator).to(DEVICE) for n in (heads * 2, heads, heads))
    int8 = Int8Range(heads, H, H).to(DEVICE)
    int8.measure(k + 3.0, v)
    keep = (torch.rand(S, heads if by_head else 1, generator=generator) < 0.3).to(DEVICE)
    bounds = torch.tensor([0, 40, S], device=DEVICE)
    kept = KeptKeys(keep, bounds, recent, LineBlocks(counts, DEVICE))
    buffer = Int8Ring()
    part = LayerPrefill(buffer, counts, torch.arange(S, device=DEVICE), bounds.int(), False, kept, int8=int8)
    monkeypatch.setattr(attention_module, "_fill", filled)
    encoded = encode(int8, k, v)
    stored = store_kept_keys(part, kept, kept.older.read(), q, k, v, encoded)
    seen = attention_module._seen(kept, stored, q, *encoded.seen)
    assert seen.keys.dtype == k.dtype and stored.keys.dtype == torch.int8 and stored.keys is buffer.keys
    whole = [False] * len(kept.before)
    got = attend_by_head(part, kept.blocks, seen, whole, q, *encoded.seen, None)
    want = reference_kept_attention(q, *int8.rounded(k, v), keep, counts, recent, None)
    torch.testing.assert_close(got, want, atol=2e-5, rtol=2e-5)
    for name, content in (("keys", seen.keys), ("values", seen.values)):
        decode = int8.decode_keys if name == "keys" else int8.decode_values
        codes, steps = getattr(buffer, name), getattr(buffer, f"{name[:-1]}_steps")
        for unit, (start, n) in enumerate(zip(buffer.starts, buffer.lengths, strict=True)):
            places = slice(start, start + n)
            own = slice(unit % heads, unit % heads + 1) if by_head else slice(None)
            assert torch.equal(decode(codes[:, places], steps[:, places], k.dtype, own), content[:, places])
