"""Thresholds are live, decisions are causal and private to a row, and everything can be seen and forced."""

import threading

import pytest
import torch

import modlab
from modlab.errors import ModlabError
from modlab.routing.state import thresholds_restored, thresholds_restored_on_error
from tests.helpers.models import alternate_layers, leaving_llama, routed_llama, scatter_gates, spread_gates

IDS = torch.randint(3, 512, (2, 32), generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def test_threshold_is_live_and_monotone(tiny_llama) -> None:
    spread_gates(tiny_llama)
    kept = []
    for p in (0.1, 0.5, 0.9):
        modlab.set_threshold(tiny_llama, p)
        with modlab.record_routing(tiny_llama) as recording:
            tiny_llama(IDS)
        step = recording.steps[0]
        first = tiny_llama.mod.layers[0]  # deeper layers see other inputs when p moves
        position = step.position_ids
        expected = (step.gate[first] >= p) | (position < tiny_llama.mod.config.keep_first)
        assert torch.equal(step.keep[first], expected)
        kept.append(int(step.keep[first].sum()))
    assert kept[0] > kept[1] > kept[2] > 0


def test_it_says_what_is_routed_where(tiny_llama) -> None:
    assert repr(tiny_llama.mod) == "Routing(whole layers of layers [1, 3, 5] of 6, p = 0.5)"
    modlab.set_threshold(tiny_llama, 0.25, layers=[3])
    assert repr(tiny_llama.mod).endswith("p from 0.25 to 0.5)")
    assert repr(leaving_llama("prompt").mod) == "Routing(the upper layers, by position, layers [4, 5] of 6)"


def test_a_saving_means_nothing_where_no_gate_decides() -> None:
    with pytest.raises(ModlabError, match="skip='prompt' no gate decides"):
        modlab.set_kv_saving(leaving_llama("prompt"), 2.0)


def test_thresholds_of_a_block_are_its_threads_own(tiny_llama) -> None:
    seen: list[dict[int, float]] = []
    with thresholds_restored(tiny_llama):
        modlab.set_threshold(tiny_llama, 0.9)
        other = threading.Thread(target=lambda: seen.append(dict(tiny_llama.mod.thresholds)))
        other.start()
        other.join(60)
        assert set(tiny_llama.mod.thresholds.values()) == {0.9}
    assert set(seen[0].values()) == {0.5} == set(tiny_llama.mod.thresholds.values())
    with thresholds_restored_on_error(tiny_llama):
        modlab.set_threshold(tiny_llama, 0.9)
        assert set(tiny_llama.mod.common_thresholds.values()) == {0.5}
    assert set(tiny_llama.mod.thresholds.values()) == {0.9}
    with pytest.raises(KeyboardInterrupt), thresholds_restored_on_error(tiny_llama):
        modlab.set_threshold(tiny_llama, 0.2)
        raise KeyboardInterrupt
    assert set(tiny_llama.mod.thresholds.values()) == {0.9}


@torch.no_grad()
def test_threshold_of_one_layer(tiny_llama) -> None:
    spread_gates(tiny_llama)
    modlab.set_threshold(tiny_llama, 0.99, layers=[3])
    assert tiny_llama.mod.thresholds == {1: 0.5, 3: 0.99, 5: 0.5}
    modlab.set_threshold(tiny_llama, {1: 0.2, 5: 0.3})
    assert tiny_llama.mod.thresholds == {1: 0.2, 3: 0.99, 5: 0.3}


@torch.no_grad()
def test_the_threshold_0_keeps_every_token_whatever_its_gate(tiny_llama) -> None:
    spread_gates(tiny_llama)
    for layer in tiny_llama.model.layers:
        if hasattr(layer, "mod_router"):
            layer.mod_router.bias.fill_(-200.0)  # the gate of such a logit is 0 in fp32
    modlab.set_threshold(tiny_llama, 0)
    with modlab.record_routing(tiny_llama) as recording:
        tiny_llama(torch.arange(3, 33)[None])
    assert all(bool(keep.all()) for keep in recording.steps[0].keep.values())
    assert all(float(gate.max()) == 0 for gate in recording.steps[0].gate.values())


@pytest.mark.parametrize("skip", ["kv", "layer", "attention", "mlp"])
def test_a_what_if_pass_at_the_threshold_0_is_the_dense_one_and_has_gradients(make_llama, skip: str) -> None:
    ids = torch.arange(3, 43)[None]
    dense = make_llama()(ids).logits
    model = modlab.convert(make_llama(), modlab.MoDConfig(skip=skip, keep_recent=8))
    modlab.set_threshold(model, 0)
    out = model.train()(input_ids=ids, labels=ids)
    torch.testing.assert_close(out.logits, dense, rtol=1e-4, atol=1e-4)
    out.loss.backward()
    assert all(torch.isfinite(p.grad).all() for n, p in model.named_parameters() if p.grad is not None)


@pytest.mark.parametrize("p", [1, -0.5, 2.0, "0.5", None, float("nan"), True])
def test_bad_thresholds_are_refused(tiny_llama, p) -> None:
    with pytest.raises(ModlabError, match="at least 0 and below 1"):
        modlab.set_threshold(tiny_llama, p)
    assert set(tiny_llama.mod.thresholds.values()) == {0.5}


def test_unrouted_layers_and_dense_models_are_refused(tiny_llama, make_llama) -> None:
    with pytest.raises(ModlabError, match="layer 2 is not routed"):
        modlab.set_threshold(tiny_llama, 0.4, layers=[1, 2])
    assert set(tiny_llama.mod.thresholds.values()) == {0.5}
    with pytest.raises(ModlabError, match=r"modlab.convert\(model\) first"):
        modlab.set_threshold(make_llama(), 0.4)


@torch.no_grad()
def test_first_tokens_are_kept_and_padding_never(tiny_llama) -> None:
    spread_gates(tiny_llama)
    modlab.set_threshold(tiny_llama, 0.999)
    mask = torch.ones_like(IDS)
    mask[1, :10] = 0
    with modlab.record_routing(tiny_llama) as recording:
        tiny_llama(IDS, attention_mask=mask)
    step = recording.steps[0]
    for keep in step.keep.values():
        assert keep[0, :4].all() and keep[1, 10:14].all()
        assert not keep[1, :10].any()
    assert step.position_ids[1, 9:13].tolist() == [-1, 0, 1, 2]


@torch.no_grad()
def test_decisions_are_causal(tiny_llama) -> None:
    spread_gates(tiny_llama)
    changed = IDS.clone()
    changed[:, 20:] = 7
    with modlab.record_routing(tiny_llama) as recording:
        first, second = tiny_llama(IDS).logits, tiny_llama(changed).logits
    torch.testing.assert_close(first[:, :20], second[:, :20])
    for layer in tiny_llama.mod.layers:
        assert torch.equal(recording.steps[0].keep[layer][:, :20], recording.steps[1].keep[layer][:, :20])


@torch.no_grad()
def test_changing_row_0_never_changes_row_1(tiny_llama) -> None:
    spread_gates(tiny_llama)
    changed = IDS.clone()
    changed[0] = IDS[0].flip(0)
    assert torch.equal(tiny_llama(IDS).logits[1], tiny_llama(changed).logits[1])
    assert not torch.equal(tiny_llama(IDS).logits[0], tiny_llama(changed).logits[0])


@torch.no_grad()
def test_override_forces_the_routing_and_ends(tiny_llama) -> None:
    plain = tiny_llama(IDS).logits
    seen = []

    def nobody(layer_idx, gate, position_ids):
        seen.append((layer_idx, gate.shape, position_ids.shape))
        return torch.zeros_like(gate, dtype=torch.bool)

    with modlab.routing_override(tiny_llama, nobody), modlab.record_routing(tiny_llama) as recording:
        skipped = tiny_llama(IDS).logits
    assert seen == [(layer, IDS.shape, IDS.shape) for layer in (1, 3, 5)]
    assert not any(keep.any() for keep in recording.steps[0].keep.values())
    assert not torch.allclose(skipped, plain)
    assert torch.equal(tiny_llama(IDS).logits, plain)


def test_override_must_return_a_mask(tiny_llama) -> None:
    with (
        pytest.raises(ModlabError, match="must return a bool tensor"),
        modlab.routing_override(tiny_llama, lambda i, g, p: g),
    ):
        tiny_llama(IDS)
    assert tiny_llama.mod.override is None


@torch.no_grad()
def test_skipping_every_routed_layer_equals_a_model_without_them(make_llama) -> None:
    """The strongest form of "skipped": the layers might as well not be there."""
    model, shallow = make_llama(), make_llama()
    shallow.model.layers = torch.nn.ModuleList([shallow.model.layers[i] for i in (0, 2, 4)])
    shallow.config.num_hidden_layers = 3
    modlab.convert(model, alternate_layers())
    with modlab.routing_override(model, lambda i, g, p: torch.zeros_like(g, dtype=torch.bool)):
        assert torch.equal(model(IDS, use_cache=False).logits, shallow(IDS, use_cache=False).logits)


@torch.no_grad()
@pytest.mark.parametrize("skip", ["layer", "attention", "mlp"])
def test_no_row_is_computed_for_a_skipped_token(make_llama, skip) -> None:
    """Counts the rows that enter every projection of a routed layer, padding and unequal rows included."""
    model = modlab.convert(make_llama(), modlab.MoDConfig(skip=skip, layers=[3]))
    spread_gates(model)
    modlab.set_threshold(model, 0.6)
    mask = torch.ones_like(IDS)
    mask[0, :11] = 0
    rows: dict[str, int] = {}

    def count(name):
        def hook(module, args):
            rows[name] = rows.get(name, 0) + args[0].shape[:-1].numel()

        return hook

    layer = model.model.layers[3]
    for name, module in layer.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(count(name))
    with modlab.record_routing(model) as recording:
        cache = model(IDS, attention_mask=mask, use_cache=True).past_key_values
        model(IDS[:, :1], attention_mask=torch.cat([mask, mask[:, -1:]], 1), past_key_values=cache)
    kept = sum(int(step.keep[3].sum()) for step in recording.steps)
    everything = IDS.numel() + len(IDS)
    assert 0 < kept < everything // 2
    for name, n in rows.items():
        routed = skip == "layer" or (skip == "attention") == name.startswith("self_attn")
        assert n == (kept if routed else everything), name


@torch.no_grad()
def test_topk_keeps_its_capacity_in_training_and_is_causal_in_evaluation(make_llama) -> None:
    model = spread_gates(modlab.convert(make_llama(), modlab.MoDConfig.topk(0.25, keep_first=0)))
    with modlab.record_routing(model) as recording:
        model.train()
        model(IDS)
        model.eval()
        model(IDS)
    for layer in model.mod.layers:
        assert recording.steps[0].keep[layer].sum(1).tolist() == [8, 8]
        assert torch.equal(recording.steps[1].keep[layer], recording.steps[1].gate[layer] >= 0.5)


def test_gradients_reach_router_and_layer(make_llama) -> None:
    """Straight-through: what-if passes give the router a gradient from skipped tokens, packed ones from kept
    only.
    """
    model = spread_gates(modlab.convert(make_llama(), alternate_layers()))
    model.train()
    gradients = {}
    for what_if in (True, False):
        model.mod.what_if = what_if
        model.zero_grad()
        model(IDS, labels=IDS).loss.backward()
        gradients[what_if] = model.model.layers[3].mod_router.weight.grad.clone()
        assert model.model.layers[3].mlp.up_proj.weight.grad.abs().sum() > 0
    assert gradients[True].abs().sum() > 0 and gradients[False].abs().sum() > 0
    assert not torch.allclose(gradients[True], gradients[False])


@pytest.mark.parametrize("gate", ["straight-through", "fused", "paper"])
def test_training_packed_equals_training_masked_in_value(make_llama, gate) -> None:
    model = spread_gates(modlab.convert(make_llama(), alternate_layers(gate=gate)))
    model.train()
    mask = torch.ones_like(IDS)
    mask[0, :5] = 0
    values = []
    for what_if in (True, False):
        model.mod.what_if = what_if
        values.append(model(IDS, attention_mask=mask).logits[mask.bool()])
    torch.testing.assert_close(*values, rtol=1e-4, atol=1e-5)
    model.eval()
    torch.testing.assert_close(
        model(IDS, attention_mask=mask).logits[mask.bool()], values[0], rtol=1e-4, atol=1e-5
    )


def test_straight_through_gradient_is_that_of_the_fused_form(make_llama) -> None:
    """d loss / d gate of a kept token is <d loss / d out, Layer(x) - x>: checked by a finite difference."""

    def loss(model):  # in fp64 throughout; the model's own loss is fp32, too coarse for a difference
        logits = model(IDS).logits[:, :-1]
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), IDS[:, 1:].flatten())

    model = modlab.convert(make_llama(), modlab.MoDConfig(skip="layer", layers=[5])).double()
    model.train()
    model.mod.what_if = False
    loss(model).backward()
    by_router = model.model.layers[5].mod_router.bias.grad.item()
    fused = modlab.convert(
        make_llama(), modlab.MoDConfig(skip="layer", layers=[5], gate="fused", p=0.01)
    ).double()
    losses = []
    for gate in (0.998, 0.9999):
        fused.model.layers[5].mod_router.bias.data.fill_(torch.logit(torch.tensor(gate)).item())
        losses.append(loss(fused).item())
    slope = (losses[1] - losses[0]) / (0.9999 - 0.998)
    assert by_router == pytest.approx(slope * 0.88 * 0.12, rel=0.02)


def test_input_longer_than_the_context(make_llama) -> None:
    model = modlab.convert(make_llama(max_position_embeddings=16))
    with pytest.raises(ModlabError, match="32 tokens, the model's context is 16"):
        model(IDS)
    with pytest.raises(ModlabError, match="no token"):
        model(IDS[:, :0])


def with_recent(tokens: int, gates: str = "kv_head", **changes: object) -> object:
    return scatter_gates(routed_llama(skip="kv", gates=gates, keep_recent=tokens, **changes))


@pytest.mark.parametrize("gates", ["layer", "kv_head"])
@pytest.mark.parametrize("tokens", [1, 3, 20])
@torch.no_grad()
def test_recent_tokens_are_live(gates: str, tokens: int) -> None:
    """As converted with that many: whole rows, a cache in pieces, what is stored, and generated tokens."""
    model, want = with_recent(6, gates), with_recent(tokens, gates)
    modlab.set_keep_recent(model, tokens)
    assert model.mod.config == want.mod.config and model.mod.recent == tokens
    assert torch.equal(model(IDS, use_cache=False).logits, want(IDS, use_cache=False).logits)
    caches = []
    for one in (model, want):
        cache = None
        for part in IDS.split(12, 1):
            output = one(part, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
        caches.append((output.logits, cache.kept_tokens, cache.nbytes))
    assert torch.equal(caches[0][0], caches[1][0]) and torch.equal(caches[0][1], caches[1][1])
    assert caches[0][2] == caches[1][2]
    told = [one.generate(IDS, max_new_tokens=8, do_sample=False, eos_token_id=None) for one in (model, want)]
    assert torch.equal(*told)


def test_recent_tokens_of_a_block_are_its_threads_own() -> None:
    model, seen = with_recent(6), []
    with thresholds_restored(model):
        modlab.set_keep_recent(model, 9)
        other = threading.Thread(target=lambda: seen.append(model.mod.recent))
        other.start()
        other.join(60)
        assert model.mod.recent == 9
    assert seen == [6] and model.mod.recent == 6
    with thresholds_restored_on_error(model):
        modlab.set_keep_recent(model, 9)
        assert model.mod.common_config.keep_recent == 6
    assert model.mod.recent == 9
    with pytest.raises(KeyboardInterrupt), thresholds_restored_on_error(model):
        modlab.set_keep_recent(model, 2)
        raise KeyboardInterrupt
    assert model.mod.recent == 9


def test_a_cache_from_before_other_recent_tokens_is_refused() -> None:
    model = with_recent(6)
    cache = model(IDS, use_cache=True).past_key_values
    modlab.set_keep_recent(model, 7)
    with pytest.raises(ModlabError, match="keep_recent differ"):
        model(IDS[:, :1], past_key_values=cache, use_cache=True)


@pytest.mark.parametrize("tokens", [0, -1, 2.5, True, "8"])
def test_recent_tokens_are_a_count(tokens: object) -> None:
    model = with_recent(6)
    with pytest.raises(ModlabError, match="keep_recent="):
        modlab.set_keep_recent(model, tokens)
    assert model.mod.recent == 6


def test_recent_tokens_need_a_cache_that_drops_some(tiny_llama) -> None:
    with pytest.raises(ModlabError, match="keep_recent means nothing"):
        modlab.set_keep_recent(tiny_llama, 4)


def test_recent_tokens_fit_into_a_sliding_window() -> None:
    from modlab.families.tiny_models import tiny_model

    model = modlab.convert(
        tiny_model("mistral", sliding_window=12), modlab.MoDConfig(layers="all", keep_recent=4)
    )
    assert model.mod.most_recent == 11
    with pytest.raises(ModlabError, match="sliding window of layer 0 has 12 tokens"):
        modlab.set_keep_recent(model, 12)
    modlab.set_keep_recent(model, 11)
    assert with_recent(4).mod.most_recent is None


def test_what_a_block_leaves_alone_another_thread_may_set_meanwhile() -> None:
    model = with_recent(6)
    layer = model.mod.layers[0]
    with thresholds_restored_on_error(model):
        other = threading.Thread(
            target=lambda: (modlab.set_keep_recent(model, 9), modlab.set_threshold(model, 0.9))
        )
        other.start()
        other.join(60)
        modlab.set_threshold(model, 0.2, layers=[layer])
    assert model.mod.recent == 9
    assert model.mod.thresholds[layer] == 0.2 and set(model.mod.thresholds.values()) == {0.2, 0.9}


@torch.no_grad()
def test_a_steps_rows_are_not_what_is_generated_between_two_steps() -> None:
    model = with_recent(6).train()
    told = model.generate(IDS, max_new_tokens=4, do_sample=False, eos_token_id=None)
    model.mod.row_recent, model.mod.row_shift = 20, torch.full((5,), 3.0)  # of five rows
    assert torch.equal(model.generate(IDS, max_new_tokens=4, do_sample=False, eos_token_id=None), told)
