"""`skip="kv"`: every token passes the layer, a router decides whether its keys and values stay.

Shape letters: B rows, T tokens, L layers.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, MistralConfig, MistralForCausalLM

import modlab
from modlab import skips
from modlab.cache import bytes as kv_bytes
from modlab.cache.recent import RecentLayer
from modlab.cache.stored import (
    keep_ratio_for,
    keep_without_recent,
    recent_share,
    token_bytes,
)
from modlab.errors import ModlabError
from modlab.execution import masked_keys, packed
from modlab.execution.routed import RoutedKeys
from modlab.families.tiny_models import tiny_model
from modlab.measure import evaluate
from modlab.routing.state import record_routing
from modlab.training.checks import nothing_to_learn
from modlab.training.loop import TrainConfig, train
from tests.helpers.flex import sdpa_and_flex
from tests.helpers.models import alternate_layers, scatter_gates, tiny_config
from tests.helpers.routing import assert_packed_is_masked, assert_same, inputs, random_routing
from tests.helpers.traces import make_trace

RECENT = 5
LONG = 90  # long enough for several sweeps in decoding


def routed(make_llama: Any, **fields: Any) -> Any:
    fields = {"layers": "all", "keep_recent": RECENT, "keep_first": 0, **fields}
    return modlab.convert(make_llama(), modlab.MoDConfig(skip="kv", **fields))


@torch.no_grad()
@pytest.mark.parametrize("share", [0.0, 0.05, 0.5, 1.0])
@pytest.mark.parametrize("padding", ["one row", "none", "left", "right"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_packed_equals_masked(make_llama, attention, padding, share) -> None:
    model = routed(make_llama, layers=[0, 2, 3])
    model.set_attn_implementation(attention)
    ids, mask = inputs(model, padding)
    with modlab.routing_override(model, random_routing(share)):
        expected = assert_packed_is_masked(model, ids, mask)
        if padding == "right":
            return
        logits, cache = [], modlab.RaggedCache(model)
        cuts = [0, 11, *range(18, ids.shape[1] + 1)]
        for start, stop in zip(cuts, cuts[1:], strict=False):
            seen = None if mask is None else mask[:, :stop]
            out = model(ids[:, start:stop], attention_mask=seen, past_key_values=cache, use_cache=True)
            logits.append(out.logits)
        assert_same(torch.cat(logits, 1), expected, mask)


@torch.no_grad()
def test_it_is_the_dense_model_with_keys_hidden(make_llama) -> None:
    """By hand: the same tokens kept in all layers is one mask, which the dense model takes itself."""
    dense = make_llama()
    dense.set_attn_implementation("sdpa")
    ids, _ = inputs(dense, "none")
    keep_T = torch.rand(ids.shape[1], generator=torch.Generator().manual_seed(3)) < 0.4
    i, j = torch.meshgrid(torch.arange(ids.shape[1]), torch.arange(ids.shape[1]), indexing="ij")
    allowed = (j <= i) & (keep_T[None] | (i - j < RECENT))
    expected = dense(ids, attention_mask=allowed[None, None].expand(len(ids), 1, -1, -1)).logits
    assert not torch.allclose(expected, dense(ids).logits, atol=1e-3)
    model = modlab.convert(
        copy.deepcopy(dense), modlab.MoDConfig(skip="kv", layers="all", keep_recent=RECENT, keep_first=0)
    )
    with modlab.routing_override(model, lambda layer, gate, position: keep_T[position]):
        torch.testing.assert_close(model(ids, use_cache=False).logits, expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_open_gates_change_nothing_and_revert_gives_the_model_back(make_llama) -> None:
    model = make_llama()
    ids, mask = inputs(model, "left")
    dense = model(ids[:1]).logits
    classes = {name: type(module) for name, module in model.named_modules()}
    modlab.convert(model, alternate_layers(skip="kv"))
    assert torch.equal(model(ids[:1]).logits, dense)
    assert all(p.grad is None for p in model.parameters()), "convert asks the attention for a gradient"
    assert [i for i in range(4) if isinstance(model.model.layers[i].self_attn, RoutedKeys)] == [1, 3]
    modlab.revert(model)
    assert torch.equal(model(ids[:1]).logits, dense)
    assert {name: type(module) for name, module in model.named_modules()} == classes


@torch.no_grad()
def test_what_is_stored_follows_what_is_kept(make_llama) -> None:
    model = routed(make_llama)
    ids = torch.arange(3, 3 + LONG)[None] % 90 + 3
    with modlab.routing_override(model, random_routing(0.3)), record_routing(model) as recording:
        cache = modlab.RaggedCache(model)
        model(ids[:, :60], past_key_values=cache, use_cache=True)
        for index, keep_BT in recording.steps[0].keep.items():
            layer: Any = cache.layers[index]
            stored = keep_BT | (torch.arange(60) >= 60 - RECENT + 1)
            assert layer.columns.tolist() == stored[0].nonzero()[:, 0].tolist(), "a prefill stores no more"
            one = kv_bytes.token_nbytes(layer) + 4 + 1  # its column, and whether it is kept
            assert kv_bytes.allocated_bytes(vars(layer)) == int(stored.sum()) * one
        for t in range(60, LONG):
            model(ids[:, t : t + 1], past_key_values=cache, use_cache=True)
    kept = {i: sum(int(step.keep[i].sum()) for step in recording.steps) for i in model.mod.layers}
    for index, layer in enumerate(cache.layers):
        assert kept[index] <= layer.lengths[0] <= kept[index] + RECENT + layer.slack(RECENT)
        assert layer.cumulative_length == LONG and cache.get_seq_length() == LONG
    assert cache.dense_nbytes == LONG * token_bytes(model) * model.mod.num_layers


@torch.no_grad()
def test_nothing_of_a_forgotten_token_is_read(make_llama) -> None:
    """Keys and values outside of rows, and of tokens that are hidden, may be anything."""
    model = routed(make_llama)
    ids, mask = inputs(model, "left")
    with modlab.routing_override(model, random_routing(0.3)):
        out = model(ids[:, :18], attention_mask=mask[:, :18], use_cache=True)
        cache = out.past_key_values
        for t in range(18, 24):  # too few for a sweep
            model(ids[:, t : t + 1], attention_mask=mask[:, : t + 1], past_key_values=cache)
        expected = model(
            ids[:, 24:25], attention_mask=mask[:, :25], past_key_values=copy.deepcopy(cache)
        ).logits
        for layer in cache.layers:
            hidden = ~layer.kept & (layer.columns <= 24 - RECENT)
            used = torch.zeros_like(hidden)
            for start, n in zip(layer.starts, layer.lengths, strict=True):
                used[start : start + n] = True
            assert (hidden & used).any() and (~used).any()
            layer.keys[:, hidden & used], layer.values[:, hidden & used] = 1e4, -1e4
            layer.keys[:, ~used], layer.values[:, ~used] = torch.nan, torch.nan
        got = model(ids[:, 24:25], attention_mask=mask[:, :25], past_key_values=cache).logits
    torch.testing.assert_close(got, expected)


def generated(model: Any, **settings: Any) -> Tensor:
    ids, mask = inputs(model, "left")
    return model.generate(
        ids, attention_mask=mask, max_new_tokens=40, min_new_tokens=40, pad_token_id=0, **settings
    )


@pytest.mark.parametrize("settings", [{"do_sample": False}, {"num_beams": 3}], ids=["greedy", "beams"])
def test_generation_with_the_cache_is_generation_without(make_llama, settings) -> None:
    model = routed(make_llama, layers="inner")
    scatter_gates(model, 3.0)
    assert torch.equal(generated(model, **settings), generated(model, use_cache=False, **settings))


@pytest.mark.parametrize("recent", [RECENT, 128])
@pytest.mark.parametrize("length", [3, 33])
@pytest.mark.parametrize("drafts", ["dense", "routed", "prompt"])
def test_assisted_decoding_crops_the_cache(make_llama, drafts, length, recent) -> None:
    model = routed(make_llama, keep_recent=recent)
    scatter_gates(model, 3.0)
    draft = make_llama(num_hidden_layers=1, seed=1)
    if drafts == "routed":
        modlab.convert(draft, modlab.MoDConfig(skip="kv", layers="all", keep_recent=recent, keep_first=0))
        scatter_gates(draft, 3.0)
    ids = inputs(model, "one row")[0][:, :length]
    settings = {"max_new_tokens": 40, "min_new_tokens": 40, "do_sample": False, "pad_token_id": 0}
    plain = model.generate(ids, **settings)
    assistant = {"prompt_lookup_num_tokens": 3} if drafts == "prompt" else {"assistant_model": draft}
    assert torch.equal(model.generate(ids, **assistant, **settings), plain)


@torch.no_grad()
def test_a_crop_that_needs_forgotten_tokens_is_refused_by_all_layers(make_llama) -> None:
    model = routed(make_llama, layers=[1, 4])
    ids = torch.arange(3, 3 + LONG)[None] % 90 + 3
    with modlab.routing_override(model, random_routing(0.3)):
        cache = model(ids[:, :60], use_cache=True).past_key_values
        for wanted in (50, -10):
            with pytest.raises(ModlabError, match=r"cannot be cropped to 50 of 60 .*latest 5"):
                cache.crop(wanted)
        for t in range(60, 66):
            assert all(layer.get_seq_length() == t for layer in cache.layers)
            model(ids[:, t : t + 1], past_key_values=cache)
        cache.crop(-6)  # nothing was swept since: back to where the prefill ended
        again = model(ids[:, 60:61], past_key_values=cache).logits
        whole = model(ids[:, :61], use_cache=False).logits[:, -1:]
        torch.testing.assert_close(again, whole, rtol=1e-4, atol=1e-5)
        cache.crop(-61)
        assert cache.get_seq_length() == 0
        assert all(layer.keys is None for layer in cache.layers if isinstance(layer, RecentLayer))
        again = model(ids[:, :20], past_key_values=cache, use_cache=True).logits
        torch.testing.assert_close(again, model(ids[:, :20], use_cache=False).logits, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_open_gates_can_be_cropped_anywhere(make_llama) -> None:
    model = routed(make_llama, keep_recent=128)
    ids = torch.arange(3, 3 + LONG)[None] % 90 + 3
    cache = model(ids[:, :60], use_cache=True).past_key_values
    cache.crop(-40)
    assert cache.get_seq_length() == 20


@torch.no_grad()
def test_a_long_prompt_runs_in_chunks(make_llama, monkeypatch: pytest.MonkeyPatch) -> None:
    model = routed(make_llama)
    model.set_attn_implementation("eager")  # which makes a mask of all keys
    ids, mask = inputs(model, "left")
    seen: list[int] = []
    monkeypatch.setattr(packed, "CHUNK", 7)
    hook = model.model.layers[2].self_attn.q_proj.register_forward_pre_hook(
        lambda _module, args: seen.append(args[0].shape[1])
    )
    with modlab.routing_override(model, random_routing(0.3)):
        got = model(ids, attention_mask=mask, use_cache=True)
        hook.remove()
        assert max(seen) == 7 and len(seen) > 5
        whole = model(ids, attention_mask=mask, use_cache=False)
    assert_same(got.logits, whole.logits, mask)


def test_a_what_if_pass_tells_routers_what_keys_are_worth(make_llama) -> None:
    """The gradient of a router's weight is that of the output: by finite differences, with the same coins."""
    model = routed(make_llama, layers=[1], keep_first=2).double()
    scatter_gates(model)
    router = model.model.layers[1].mod_router
    ids, _ = inputs(model, "none")
    wanted = torch.randn(*ids.shape, model.config.vocab_size, dtype=torch.double)
    model.train()

    def loss() -> Tensor:
        torch.manual_seed(0)
        return (model(ids, use_cache=False).logits * wanted).sum()

    loss().backward()
    slope = router.weight.grad.clone()
    assert slope.abs().max() > 0
    at = int(slope.abs().argmax())
    with torch.no_grad():
        step, values = 1e-3, []
        for sign in (1, -1):
            router.weight[at] += sign * step
            values.append(float(loss()))
            router.weight[at] -= sign * step
    # the coins take a sigmoid of fp32 logits: differences are good to a few digits
    assert (values[0] - values[1]) / (2 * step) == pytest.approx(float(slope[at]), rel=0.02)


@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "autocast"])
def test_hidden_keys_through_flex_attention(make_llama, monkeypatch, autocast) -> None:
    """A step of training without weighing; on a CPU without gradients, where flex attention has none."""
    model = routed(make_llama)
    scatter_gates(model, 3.0)
    ids, mask = inputs(model, "left")
    model.train()
    model.mod.what_if = False
    want, got = sdpa_and_flex(model, ids, mask, monkeypatch, autocast)
    rtol, atol = (3e-2, 3e-2) if autocast else (1e-4, 1e-5)
    torch.testing.assert_close(got[mask.bool()], want[mask.bool()], rtol=rtol, atol=atol)


def test_coins_are_weighted_by_the_threshold(make_llama, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the gate lies above the threshold, a key is more often seen than not."""
    model = routed(make_llama, layers=[1])
    ids, _ = inputs(model, "none")
    model.train()
    noted: list[Tensor] = []
    real = masked_keys.log_weights

    def note(*arguments: Any) -> Tensor:
        noted.append(real(*arguments))
        return noted[-1]

    monkeypatch.setattr(masked_keys, "log_weights", note)
    seen: dict[float, float] = {}
    for p in (0.1, 0.88, 0.99):
        modlab.set_threshold(model, p)
        noted.clear()
        model(ids, use_cache=False)
        past = noted[0][:, 0, -1, :-RECENT]
        seen[p] = float((past > math.log(0.5)).float().mean())
    assert seen[0.1] > 0.9 and 0.2 < seen[0.88] < 0.8 and seen[0.99] < 0.3, seen


def test_every_step_has_the_routers_in_its_graph(make_llama) -> None:
    """DistributedDataParallel counts on it."""
    model = routed(make_llama)
    ids, _ = inputs(model, "none")
    model.train()
    model.mod.what_if = False
    model(ids, labels=ids, use_cache=False).loss.backward()
    assert all(layer.mod_router.weight.grad is not None for layer in model.model.layers)


@pytest.mark.parametrize("name", ["mpt", "doge"])
def test_attention_that_cannot_weigh_keys_is_refused(name: str) -> None:
    with pytest.raises(ModlabError, match="does not add its mask to its scores"):
        modlab.convert(tiny_model(name), alternate_layers(skip="kv"))


def test_tokens_that_can_be_seen_anyway_have_no_say(make_llama) -> None:
    model = routed(make_llama, layers=[1], keep_recent=64)
    scatter_gates(model)
    ids, _ = inputs(model, "none")
    model.train()
    model(ids, labels=ids, use_cache=False).loss.backward()
    assert float(model.model.layers[1].mod_router.weight.grad.abs().max()) == 0


def test_rows_that_can_teach_are_told_from_those_that_cannot(make_llama) -> None:
    """By their length, to the token."""
    model = routed(make_llama, layers=[1], keep_recent=9, keep_first=3).train()
    scatter_gates(model)
    for length in (13, 14):
        model.zero_grad()
        ids = torch.randint(3, 90, (1, length), generator=torch.Generator().manual_seed(0))
        model(ids, labels=ids, use_cache=False).loss.backward()
        learns = bool(model.model.layers[1].mod_router.weight.grad.any())
        assert learns == (nothing_to_learn(model, length) == "") == (length == 14)
    assert nothing_to_learn(modlab.convert(make_llama(), alternate_layers()), 2) == ""


def test_layers_with_a_window_of_recent_tokens_stay_dense() -> None:
    def convert(keep_recent: int, **config: object):
        model = MistralForCausalLM(MistralConfig(**{**tiny_config().to_dict(), "sliding_window": 16}))
        return modlab.convert(model, modlab.MoDConfig(keep_recent=keep_recent, **config))

    assert convert(15).mod.layers == [2, 3, 4]
    with pytest.raises(ModlabError, match="no routable layers: all of its sliding window of 16 tokens"):
        convert(16)
    assert convert(16, skip="layer").mod.layers == [2, 3, 4]


def test_training_reaches_the_keep_ratio(make_llama) -> None:
    rows = torch.randint(3, 90, (256, 64), generator=torch.Generator().manual_seed(0))
    model = routed(make_llama, keep_recent=4)
    settings = {"batch_size": 16, "lr": 3e-3, "router_lr": 3e-2, "log_every": 20, "warmup": 0.1}
    result = train(model, rows, TrainConfig(steps=60, keep_ratio=0.4, lam=4.0, **settings))
    assert evaluate(result.model, rows[:64]).keep_ratio == pytest.approx(0.4, abs=0.03)


def test_saved_and_loaded(make_llama, tmp_path) -> None:
    model = routed(make_llama, keep_recent=7)
    scatter_gates(model, 3.0)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.mod.config == model.mod.config and loaded.mod.config.keep_recent == 7
    ids, _ = inputs(model, "none")
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, model(ids).logits)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"keep_recent": 0}, "each token attends to itself"),
        ({"skip": "kv", "gate": "paper"}, r"^MoDConfig\(skip='kv', .*no output for a gate to scale"),
        ({"skip": "kv", "operator": "topk"}, r"^MoDConfig\(skip='kv', .*by threshold only"),
        ({"skip": "kv+prompt", "gate": "paper"}, r"^MoDConfig\(skip='kv\+prompt', gate='paper'"),
        ({"skip": "kv+prompt", "operator": "topk"}, r"^MoDConfig\(skip='kv\+prompt', operator='topk'"),
    ],
)
def test_settings_that_mean_nothing_are_refused(fields, says) -> None:
    with pytest.raises(ModlabError, match=says):
        modlab.MoDConfig(**fields)


def test_flash_attention_is_refused_where_it_would_need_a_mask(make_llama) -> None:
    model = routed(make_llama)
    model.config._attn_implementation_internal = "flash_attention_2"
    ids, _ = inputs(model, "one row")
    with modlab.routing_override(model, random_routing(0.3)), pytest.raises(ModlabError, match="'sdpa'"):
        model(ids)


def test_savings_count_the_recent_tokens(make_llama) -> None:
    config = alternate_layers(skip="kv", keep_recent=128)
    assert recent_share(config, 1016) == 0.125 and recent_share(config, 64) == 1.0
    assert recent_share(alternate_layers(), 1024) == 0.0
    stored = skips.named("kv").stored_share(0.4, 0.125)
    assert stored == pytest.approx(0.4 + 0.6 * 0.125)
    assert keep_without_recent(stored, 0.125) == pytest.approx(0.4)

    keep = torch.zeros(3, 60, dtype=torch.bool).numpy()
    keep[:, :10] = True
    trace = make_trace(keep=keep, skip="kv", keep_recent=20)
    assert trace.kv_saving == pytest.approx(6 / (3 + 3 * 0.5))
    assert trace.part(0, 20).kv_saving == pytest.approx(6 / (3 + 3 * 0.5)), (
        "its latest tokens are not the text's"
    )

    model = routed(make_llama, keep_recent=16)
    each = token_bytes(model) + 5
    ratio = keep_ratio_for(model, kv_mib=model.mod.num_layers * 256 * each * 0.5 / 2**20, context=256)
    assert skips.named("kv").stored_share(ratio, 15 / 256) == pytest.approx(0.5)
    with pytest.raises(ModlabError, match="and the latest tokens"):
        keep_ratio_for(model, kv_mib=model.mod.num_layers * 256 * each * 0.05 / 2**20, context=256)
