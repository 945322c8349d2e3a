"""Conversion changes nothing but the routers, and can be undone."""

import copy
import pickle

import pytest
import torch
from transformers import BertConfig, BertForMaskedLM, T5Config, T5ForConditionalGeneration

import modlab
from modlab.errors import ModlabError
from tests.helpers.models import alternate_layers

IDS = torch.randint(3, 512, (2, 24), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
@pytest.mark.parametrize("skip", ["layer", "attention", "mlp", "kv"])
@pytest.mark.parametrize("layers", ["alternate", "all", [0, -1]])
def test_default_gates_change_no_logit(make_llama, skip, layers) -> None:
    model = make_llama()
    before = model(IDS).logits
    modlab.convert(model, modlab.MoDConfig(layers=layers, skip=skip))
    assert torch.equal(model(IDS).logits, before)


def test_only_routers_are_added_and_revert_is_bit_for_bit(make_llama) -> None:
    model = make_llama()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    classes = [type(m) for m in model.modules()]
    logits = model(IDS).logits
    modlab.convert(model)
    added = set(model.state_dict()) - set(before)
    assert added and all("router" in name for name in added)
    assert modlab.is_converted(model)
    modlab.revert(model)
    assert not modlab.is_converted(model)
    assert [type(m) for m in model.modules()] == classes
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert torch.equal(model(IDS).logits, logits)
    assert not model.get_decoder()._forward_pre_hooks and not model.get_decoder()._forward_hooks


def test_no_other_object_is_touched(make_llama) -> None:
    other, model = make_llama(seed=1), make_llama(seed=0)
    kind, layer_kind = type(other), type(other.model.layers[1])
    modlab.convert(model)
    assert type(other) is kind and type(other.model.layers[1]) is layer_kind
    assert not modlab.is_converted(other)
    assert isinstance(model, kind) and isinstance(model.model.layers[1], layer_kind)
    assert type(model).__name__ == kind.__name__  # what accelerate and FSDP know layers by


@torch.no_grad()
def test_copies_are_independent(tiny_llama) -> None:
    expected = tiny_llama(IDS).logits
    twin = copy.deepcopy(tiny_llama)
    thawed = pickle.loads(pickle.dumps(tiny_llama))
    modlab.set_threshold(tiny_llama, 0.95)
    assert torch.equal(twin(IDS).logits, expected)
    assert torch.equal(thawed(IDS).logits, expected)
    assert not torch.equal(tiny_llama(IDS).logits, expected)
    modlab.revert(twin)
    assert torch.equal(twin(IDS).logits, expected) and modlab.is_converted(tiny_llama)


@torch.no_grad()
def test_converts_again_after_revert(make_llama) -> None:
    model = modlab.convert(make_llama())
    with pytest.raises(ModlabError, match="converted already"):
        modlab.convert(model)
    modlab.convert(modlab.revert(model), modlab.MoDConfig(skip="layer", layers="all"))
    assert model.mod.layers == [0, 1, 2, 3, 4, 5]


@torch.no_grad()
def test_bf16_model_keeps_fp32_routers(make_llama) -> None:
    model = modlab.convert(make_llama().to(torch.bfloat16))
    assert model.model.layers[2].mod_router.weight.dtype == torch.float32
    assert model(IDS).logits.dtype == torch.bfloat16


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_neox", "phi3", "gpt2"])
def test_paper_gate_multiplies_both_branches(family) -> None:
    """u = x + g·Attn, x' = u + g·MLP: held against a dense model whose branch weights are scaled by hand."""
    from modlab.families.tiny_models import tiny_model

    model = tiny_model(family)
    expected = copy.deepcopy(model)
    g = 0.75
    modlab.convert(model, modlab.MoDConfig(skip="layer", gate="paper", init_gate=g, layers=[1]))
    layer = _layers(expected)[1]
    for name in _last_of_branch(family):
        module = layer.get_submodule(name)
        if "norm" in type(module).__name__.lower():  # Gemma's norms multiply by 1 + weight
            module.weight.copy_(g * (1 + module.weight) - 1)
        else:
            module.weight.mul_(g)
            if getattr(module, "bias", None) is not None:
                module.bias.mul_(g)
    ids = torch.randint(3, 60, (2, 9), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(model(ids).logits, expected(ids).logits, rtol=1e-4, atol=1e-5)


def _layers(model):
    from modlab.hf.anatomy import decoder_layers

    return decoder_layers(model)


def _last_of_branch(family: str) -> tuple[str, str]:
    return {
        "llama": ("self_attn.o_proj", "mlp.down_proj"),
        "phi3": ("self_attn.o_proj", "mlp.down_proj"),
        "gemma2": ("post_attention_layernorm", "post_feedforward_layernorm"),
        "gpt_neox": ("attention.dense", "mlp.dense_4h_to_h"),
        "gpt2": ("attn.c_proj", "mlp.c_proj"),
    }[family]


@torch.no_grad()
def test_fused_gate(make_llama) -> None:
    """x' = x + g·(Layer(x) - x), seen on the hidden states around one routed layer."""
    model = make_llama()
    dense = model(IDS, output_hidden_states=True).hidden_states
    modlab.convert(model, modlab.MoDConfig(skip="layer", gate="fused", init_gate=0.6, layers=[0]))
    fused = model(IDS, output_hidden_states=True).hidden_states
    torch.testing.assert_close(fused[1], dense[0] + 0.6 * (dense[1] - dense[0]))


def test_models_that_cannot_be_routed_are_refused_by_name() -> None:
    bert = BertForMaskedLM(
        BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    )
    with pytest.raises(ModlabError, match="BertForMaskedLM"):
        modlab.convert(bert)
    t5 = T5ForConditionalGeneration(
        T5Config(d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=2, vocab_size=64)
    )
    with pytest.raises(ModlabError, match="encoder-decoder"):
        modlab.convert(t5)
    with pytest.raises(ModlabError, match="Linear"):
        modlab.convert(torch.nn.Linear(2, 2))  # type: ignore[arg-type]


def test_recurrent_model_has_no_routable_layers() -> None:
    from modlab.families.tiny_models import tiny_model

    with pytest.raises(ModlabError, match="no routable layers"):
        modlab.convert(tiny_model("mamba"))


def test_refused_conversion_changes_nothing(make_llama) -> None:
    model = make_llama()
    names = list(model.state_dict())
    with pytest.raises(ModlabError, match="names layer 6"):
        modlab.convert(model, modlab.MoDConfig(skip="layer", layers=[1, 6]))
    with pytest.raises(ModlabError, match="which is not routed"):
        modlab.convert(model, alternate_layers(p={2: 0.4}))
    assert list(model.state_dict()) == names and not modlab.is_converted(model)


def test_a_branch_that_cannot_be_skipped_is_refused_and_nothing_changes() -> None:
    from modlab.families.tiny_models import tiny_model

    model = tiny_model("gpt_neox_japanese").train()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    with pytest.raises(
        ModlabError, match=r"layer 3 .*Use MoDConfig\(skip='layer'\) .*, or leave layers \[3\] out"
    ):
        modlab.convert(model, modlab.MoDConfig(layers=[0, 1, 2, 3], skip="attention"))
    after = model.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[name], before[name]) for name in before)
    assert not modlab.is_converted(model) and all(module.training for module in model.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    modlab.convert(model, modlab.MoDConfig(layers="all", skip="attention"))
    assert model.mod.layers == [0, 1, 2], "all means those that can be"
