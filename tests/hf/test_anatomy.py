"""Finding things in a model by its structure: modules made up for the purpose, and tiny models."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from modlab.errors import ModlabError
from modlab.families.tiny_models import tiny_model
from modlab.hf import anatomy
from tests.helpers.models import dense_llama


class ToyAttention(nn.Module):
    pass


class ToyAttentionNorm(nn.Module):
    pass


class AttnLayerNorm2d(nn.Module):
    pass


class ToySparseMoeBlock(nn.Module):
    pass


class MoeFamilyAttention(nn.Module):
    """An attention whose model is called after its experts."""


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = ToyAttentionNorm()
        self.attn = ToyAttention()


def layer(**children: nn.Module) -> nn.Module:
    made = nn.Module()
    for name, child in children.items():
        made.add_module(name, child)
    return made


def test_an_attention_is_known_by_its_class_and_its_norm_is_not_one() -> None:
    made = layer(norm=ToyAttentionNorm(), other=AttnLayerNorm2d(), mix=ToyAttention())
    assert anatomy.attention_name(made) == "mix"
    assert anatomy.attention_name(layer(norm=ToyAttentionNorm(), mlp=ToySparseMoeBlock())) is None


def test_an_attention_one_module_deeper_is_found() -> None:
    """DBRX wraps it with its norm."""
    assert anatomy.attention_name(layer(block=Inner())) == "block.attn"


def test_an_attention_of_a_mixture_of_experts_is_no_mlp() -> None:
    made = layer(attn=MoeFamilyAttention(), experts=ToySparseMoeBlock())
    assert (anatomy.attention_name(made), anatomy.mlp_name(made)) == ("attn", "experts")
    assert anatomy.is_mlp(made.experts) and not anatomy.is_mlp(made.attn)


def test_what_takes_neither_mask_nor_cache_does_not_attend() -> None:
    class Silent(nn.Module):
        def forward(self, hidden, state=None):
            return hidden

    class Speaking(nn.Module):
        def forward(self, hidden, **kwargs):
            return hidden

    assert not anatomy.attends(Silent()) and anatomy.attends(Speaking())
    assert anatomy.attends(dense_llama().model.layers[0])


def test_an_attention_that_makes_masks_or_shares_keys_says_so() -> None:
    class Masking(nn.Module):
        def prepare_dynamic_mask(self):
            pass

    assert anatomy.makes_masks(Masking()) and not anatomy.makes_masks(ToyAttention())
    picking = ToyAttention()
    picking.indexer = nn.Module()
    assert anatomy.makes_masks(picking)
    sharing = ToyAttention()
    sharing.is_kv_shared_layer = True
    assert anatomy.shares_keys(sharing) and not anatomy.shares_keys(ToyAttention())


def test_the_layers_are_the_list_of_the_configured_length() -> None:
    model = dense_llama()
    assert list(anatomy.decoder_layers(model)) == list(model.model.layers)
    assert anatomy.decoder_of(model) is model.model
    model.config.num_hidden_layers = 5
    with pytest.raises(ModlabError, match="no list of 5 decoder layers"):
        anatomy.decoder_layers(model)


def test_windows_of_layers_that_slide_and_of_those_that_do_not() -> None:
    mixed = tiny_model("gemma2")
    windows = anatomy.attention_windows(mixed, mixed.config.num_hidden_layers)
    slides = [kind == "sliding_attention" for kind in mixed.config.layer_types]
    assert [windows[i] for i in range(len(slides))] == [
        mixed.config.sliding_window if s else None for s in slides
    ]
    assert anatomy.attention_windows(dense_llama(), 6) == dict.fromkeys(range(6))


@pytest.mark.parametrize(
    ("model_type", "reason"),
    [("mamba", anatomy.NO_ATTENTION), ("zamba2", "a recurrent state next to"), ("llama4_text", "chunked")],
)
def test_windows_say_why_a_layer_cannot_be_routed(model_type: str, reason: str) -> None:
    model = tiny_model(model_type)
    windows = anatomy.attention_windows(model, model.config.num_hidden_layers)
    assert any(isinstance(window, str) and reason in window for window in windows.values())


def test_a_local_layer_of_gpt_neo_has_the_configs_window() -> None:
    model = tiny_model("gpt_neo")
    windows = anatomy.attention_windows(model, model.config.num_hidden_layers)
    local = [kind == "local" for kind in model.config.attention_layers]
    assert any(local)
    assert [windows[i] is not None for i in range(len(local))] == local


def test_a_cache_layer_with_an_indexer_is_told_by_its_method() -> None:
    assert anatomy.indexed(SimpleNamespace(update_indexer=print)) and not anatomy.indexed(torch.zeros(1))
