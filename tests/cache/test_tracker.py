"""KVTracker: allocated bytes against hand computation, on dense caches of every kind and the ragged one."""

import pandas as pd
import pytest
import torch
from transformers import (
    DynamicCache,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    StaticCache,
)

import modlab
from modlab.cache.bytes import allocated_bytes, snapshot
from modlab.errors import ModlabError
from tests.helpers.models import narrow_config, tiny_config

LAYERS, HEADS_KV, HEAD_DIM = 3, 2, 8
TOKEN_BYTES = 2 * HEADS_KV * HEAD_DIM * 4  # K and V, fp32


def llama(dtype=torch.float32, **kwargs):
    torch.manual_seed(0)
    config = tiny_config(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=LAYERS,
        num_key_value_heads=HEADS_KV,
        max_position_embeddings=256,
        eos_token_id=None,
        **kwargs,
    )
    return LlamaForCausalLM(config).eval().to(dtype)


@pytest.fixture(scope="module")
def model():
    return llama()


def ids(rows=1, length=10, seed=0):
    return torch.randint(2, 64, (rows, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dense_bytes_are_the_hand_computed_ones(dtype):
    model = llama(dtype)
    with modlab.KVTracker(model) as kv, torch.no_grad():
        model(ids(rows=3, length=7), use_cache=True)
    frame = kv.frame()
    assert list(frame.layer) == list(range(LAYERS))
    expected = 3 * 7 * TOKEN_BYTES * dtype.itemsize // 4
    assert (frame.kv_bytes == expected).all()
    assert (frame.dense_kv_bytes == expected).all()
    assert (frame.kept_tokens == 3 * 7).all()
    assert (frame.seen_tokens == 7).all()
    assert set(frame.phase) == {"prefill"}


def test_each_layer_says_where_it_lies():
    """As with `device_map`; a layer that has seen nothing lies nowhere yet."""
    cache, states = DynamicCache(), torch.zeros(1, HEADS_KV, 5, HEAD_DIM)
    cache.update(states, states.clone(), 0)
    cache.update(states.to("meta"), states.to("meta"), 1)
    assert [(row["layer"], row["device"]) for row in snapshot(cache)] == [(0, "cpu"), (1, "meta")]
    assert snapshot(cache)[0]["kv_bytes"] == 5 * TOKEN_BYTES
    model = modlab.convert(llama(), modlab.MoDConfig(layers="all"))
    with modlab.KVTracker(model) as kv, torch.no_grad():
        cache = model(ids(), use_cache=True).past_key_values
    frame = kv.frame()
    assert list(frame.groupby(["step", "device"]).kv_bytes.sum().items()) == [((0, "cpu"), cache.nbytes)]
    assert {row["device"] for row in snapshot(modlab.RaggedCache(model))} == {""}


def test_generate_with_left_padding_gives_a_row_for_every_step_and_layer(model):
    prompt = ids(rows=2, length=6)
    prompt[0, :3] = 0
    with modlab.KVTracker(model) as kv:
        model.generate(prompt, attention_mask=(prompt != 0).long(), max_new_tokens=5, do_sample=False)
    frame = kv.frame()
    assert {"step", "layer", "kept_tokens", "kv_bytes", "dense_kv_bytes"} <= set(frame.columns)
    assert len(frame) == 5 * LAYERS  # one prefill and four decode forwards: the fifth token needs no forward
    by_step = frame.groupby("step").first()
    assert list(by_step.seen_tokens) == [6, 7, 8, 9, 10]
    assert list(by_step.phase) == ["prefill"] + ["decode"] * 4
    assert (frame.kv_bytes == 2 * frame.seen_tokens * TOKEN_BYTES).all()
    summary = kv.summary()
    assert summary["kv_bytes"] == summary["dense_kv_bytes"] == 2 * 10 * TOKEN_BYTES * LAYERS
    assert summary["kv_saving"] == 1.0
    assert summary["steps"] == 5


def test_beams_count_every_beam(model):
    with modlab.KVTracker(model) as kv:
        model.generate(
            ids(), attention_mask=torch.ones(1, 10), max_new_tokens=2, num_beams=3, do_sample=False
        )
    last = kv.frame().query("step == 1")
    assert (last.kv_bytes == 3 * 11 * TOKEN_BYTES).all()


def test_chunked_prefill_and_single_token_prompt_phases(model):
    cache = DynamicCache(config=model.config)
    with modlab.KVTracker(model) as kv, torch.no_grad():
        for chunk in ids(length=9).split([1, 5, 2, 1], dim=1):
            model(chunk, past_key_values=cache, use_cache=True)
    by_step = kv.frame().groupby("step").first()
    assert list(by_step.seen_tokens) == [1, 6, 8, 9]
    assert list(by_step.phase) == ["prefill", "prefill", "prefill", "decode"]


def test_static_cache_counts_what_it_allocated(model):
    cache = StaticCache(config=model.config, max_cache_len=32)
    with modlab.KVTracker(model) as kv, torch.no_grad():
        model(ids(rows=2), past_key_values=cache, use_cache=True)
    frame = kv.frame()
    assert (frame.kv_bytes == 2 * 32 * TOKEN_BYTES).all()
    assert (frame.dense_kv_bytes == 2 * 10 * TOKEN_BYTES).all()
    assert (frame.kept_tokens == 2 * 10).all()
    assert set(frame.kind) == {"static"}
    assert kv.summary()["kv_saving"] == pytest.approx(10 / 32)


@pytest.mark.parametrize("static", [False, True])
def test_sliding_window_limits_dense_bytes(static):
    torch.manual_seed(0)
    config = narrow_config(
        MistralConfig, vocab_size=64, num_hidden_layers=2, sliding_window=8, pad_token_id=0, eos_token_id=None
    )
    model = MistralForCausalLM(config).eval()
    cache = StaticCache(config=config, max_cache_len=64) if static else None
    prompt = ids(length=20)
    with modlab.KVTracker(model) as kv:
        model.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=3, past_key_values=cache
        )
    frame = kv.frame()
    assert (frame.dense_kv_bytes == 7 * TOKEN_BYTES).all()  # window - 1 past tokens
    assert (frame.seen_tokens == 20 + frame.step).all()
    if static:
        assert (frame.kv_bytes == 8 * TOKEN_BYTES).all()
    else:
        # The stored keys are a slice of the concatenated tensor, whose storage stays alive: all of the prompt
        # after the prefill, the window and the newest token later.
        assert list(frame.groupby("step").kv_bytes.first()) == [n * TOKEN_BYTES for n in (20, 8, 8)]
        assert (frame.kept_tokens == 7).all()


def test_views_count_their_storage_and_shared_storages_once():
    big = torch.zeros(100, 4)
    assert allocated_bytes(big[:2]) == 1600
    assert allocated_bytes([big[:2], {"other": big[50:]}]) == 1600
    counted: set[int] = set()
    assert allocated_bytes(big, counted=counted) == 1600
    assert allocated_bytes(big[3], torch.zeros(3), counted=counted) == 12
    assert allocated_bytes(torch.tensor(3), None, "x") == 0  # a counter is no buffer


def test_linear_attention_layers_report_their_state():
    from transformers import Qwen3NextConfig, Qwen3NextForCausalLM

    torch.manual_seed(0)
    config = narrow_config(
        Qwen3NextConfig,
        vocab_size=64,
        head_dim=HEAD_DIM,
        linear_num_key_heads=2,
        linear_num_value_heads=2,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        num_experts=2,
        num_experts_per_tok=1,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
    )
    model = Qwen3NextForCausalLM(config).eval()
    with modlab.KVTracker(model) as kv, torch.no_grad():
        model(ids(), use_cache=True)
    frame = kv.frame().set_index("layer")
    assert list(frame.kind) == ["linear", "linear", "linear", "dynamic"]
    assert frame.kv_bytes[3] == frame.dense_kv_bytes[3] == 10 * TOKEN_BYTES
    states = frame.loc[[0, 1, 2]]
    assert (states.kept_tokens == 0).all()
    assert (states.kv_bytes > 0).all()
    assert (states.kv_bytes == states.dense_kv_bytes).all()


def test_quantized_cache_counts_the_quantized_bytes(model):
    from transformers import QuantizedCache

    try:
        cache = QuantizedCache(backend="fp8", config=model.config)
    except ValueError:
        pytest.skip("this transformers has no quantized cache that needs no further package")
    with modlab.KVTracker(model) as kv:
        model.generate(ids(), attention_mask=torch.ones(1, 10), max_new_tokens=3, past_key_values=cache)
    frame = kv.frame()
    assert set(frame.kind) == {"quantized"}
    assert (frame.kept_tokens == frame.seen_tokens).all()
    assert (frame.kv_bytes == frame.seen_tokens * TOKEN_BYTES // 4).all()
    assert (frame.dense_kv_bytes == frame.seen_tokens * TOKEN_BYTES).all()


def test_tuple_outputs_work(model):
    with modlab.KVTracker(model) as kv, torch.no_grad():
        model(ids(), use_cache=True, return_dict=False)
    assert (kv.frame().kv_bytes == 10 * TOKEN_BYTES).all()


def test_base_model_without_head_works(model):
    with modlab.KVTracker(model.model) as kv, torch.no_grad():
        model(ids(), use_cache=True)
    assert len(kv.frame()) == LAYERS


def test_no_cache_and_no_call_are_clear_errors(model):
    with modlab.KVTracker(model) as kv, torch.no_grad():
        model(ids(), use_cache=False)
    with pytest.raises(ModlabError, match="use_cache=True"):
        kv.frame()
    with pytest.raises(ModlabError, match="use_cache=True"):
        kv.summary()
    with modlab.KVTracker(model) as kv:
        pass
    with pytest.raises(ModlabError, match="no forward of this model ran"):
        kv.frame()
    with pytest.raises(ModlabError, match="causal language model"), modlab.KVTracker(torch.nn.Linear(2, 2)):
        pass


def test_hooks_go_away_also_after_an_error(model):
    decoder = model.get_decoder()
    before = len(decoder._forward_hooks)
    kv = modlab.KVTracker(model)
    with pytest.raises(RuntimeError, match="boom"), kv:
        assert len(decoder._forward_hooks) == before + 1
        raise RuntimeError("boom")
    assert len(decoder._forward_hooks) == before
    with torch.no_grad():
        model(ids(), use_cache=True)
    with pytest.raises(ModlabError):
        kv.frame()


def test_nested_trackers_and_reuse(model):
    with torch.no_grad(), modlab.KVTracker(model) as outer:
        model(ids(), use_cache=True)
        with modlab.KVTracker(model) as inner:
            model(ids(length=4), use_cache=True)
        with outer:  # entering again while active records nothing twice
            model(ids(length=5), use_cache=True)
        model(ids(length=6), use_cache=True)
    assert list(outer.frame().groupby("step").seen_tokens.first()) == [10, 4, 5, 6]
    assert list(inner.frame().groupby("step").seen_tokens.first()) == [4]
    with torch.no_grad(), outer:
        model(ids(length=3), use_cache=True)
    assert list(outer.frame().groupby("step").seen_tokens.first()) == [3]


def test_plot_shows_both_curves(model):
    with modlab.KVTracker(model) as kv:
        model.generate(ids(), attention_mask=torch.ones(1, 10), max_new_tokens=4, do_sample=False)
    figure = kv.plot()
    assert [trace.name for trace in figure.data] == ["dense cache", "allocated"]
    assert list(figure.data[1].y) == [n * TOKEN_BYTES * LAYERS / 1024 for n in (10, 11, 12, 13)]


def test_frame_is_a_plain_dataframe(model):
    with modlab.KVTracker(model) as kv, torch.no_grad():
        model(ids(), use_cache=True)
    assert isinstance(kv.frame(), pd.DataFrame)
    assert kv.rows[0]["kv_bytes"] == 10 * TOKEN_BYTES  # the same without pandas


def forced(keep_token):
    """An override that keeps the positions for which `keep_token(layer, position)` holds."""

    def keep(layer, gate, positions):
        return torch.tensor([[keep_token(layer, int(p)) for p in row] for row in positions])

    return keep


def test_mod_bytes_are_kept_tokens_times_bytes_per_token():
    model = modlab.convert(llama(), modlab.MoDConfig(skip="layer", layers=[1]))
    with (
        modlab.routing_override(model, forced(lambda layer, position: position % 3 == 0)),
        torch.no_grad(),
        modlab.KVTracker(model) as kv,
    ):
        out = model(ids(rows=2), use_cache=True)
    frame = kv.frame().set_index("layer")
    assert list(frame.kind) == ["dynamic", "ragged", "dynamic"]
    assert list(frame.kept_tokens) == [20, 8, 20]
    index = 4  # bytes that note where a stored token stood
    assert list(frame.kv_bytes) == [20 * TOKEN_BYTES, 8 * (TOKEN_BYTES + index), 20 * TOKEN_BYTES]
    assert (frame.dense_kv_bytes == 20 * TOKEN_BYTES).all()
    assert frame.kv_bytes.sum() == out.past_key_values.nbytes
    assert frame.dense_kv_bytes.sum() == out.past_key_values.dense_nbytes


def test_mod_generate_follows_the_ragged_cache():
    model = modlab.convert(llama(), modlab.MoDConfig(skip="layer", layers=[1]))
    prompt = ids(rows=2, length=6)
    prompt[0, :3] = 0
    with (
        modlab.routing_override(model, forced(lambda layer, position: position in (0, 2, 4, 7))),
        modlab.KVTracker(model) as kv,
    ):
        out = model.generate(
            prompt,
            attention_mask=(prompt != 0).long(),
            max_new_tokens=5,
            do_sample=False,
            return_dict_in_generate=True,
        )
    frame = kv.frame()
    routed = frame[frame.layer == 1]
    # row 0 has 3 real prompt tokens, row 1 has 6; each decode step adds one position to both
    assert list(routed.kept_tokens) == [2 + 3, 2 + 3, 3 + 4, 3 + 4, 3 + 4]
    last = frame[frame.step == frame.step.max()]
    assert last.kv_bytes.sum() == out.past_key_values.nbytes
    assert last.kept_tokens.to_list() == out.past_key_values.kept_tokens.sum(1).tolist()
    assert (last.dense_kv_bytes == 2 * 10 * TOKEN_BYTES).all()


def test_a_layer_that_keeps_nothing_still_saves_what_a_dense_one_would_store():
    model = modlab.convert(llama(), modlab.MoDConfig(skip="layer", layers=[1]))
    with (
        modlab.routing_override(model, forced(lambda layer, position: False)),
        torch.no_grad(),
        modlab.KVTracker(model) as kv,
    ):
        model(ids(), use_cache=True)
    frame = kv.frame().set_index("layer")
    assert (frame.kept_tokens[1], frame.kv_bytes[1]) == (0, 0)
    assert frame.dense_kv_bytes[1] == 10 * TOKEN_BYTES
    assert kv.summary()["kv_saving"] == pytest.approx(LAYERS / (LAYERS - 1))


@pytest.mark.parametrize("told", [True, False])
def test_a_forward_of_another_thread_may_tell_no_keyword_arguments(model, told):
    """torch has the hook a moment before it knows that the hook takes them, and a moment after."""
    with modlab.KVTracker(model) as kv:
        if not told:
            model.get_decoder()._forward_hooks_with_kwargs.clear()
        model(torch.zeros(1, 5, dtype=torch.long), use_cache=True)
    assert kv.frame().seen_tokens.tolist() == [5] * LAYERS
