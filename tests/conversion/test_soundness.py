"""What is no causal decoder with a cache of keys is refused at conversion, and left as it was."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertLMHeadModel

import modlab
from modlab.errors import ModlabError
from modlab.families.tiny_models import tiny_model
from tests.helpers.models import alternate_layers, dense_llama


def refusal(model: Any) -> str:
    """What conversion says of the model, which it leaves as it was."""
    classes = {name: type(module) for name, module in model.named_modules()}
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ModlabError) as refused:
        modlab.convert(model, alternate_layers())
    assert {name: type(module) for name, module in model.named_modules()} == classes
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
    return str(refused.value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_encoder_that_was_meant_to_be_a_decoder(dtype: torch.dtype) -> None:
    """A BERT whose config does not say `is_decoder` attends both ways; transformers warns at most."""
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 4}
    torch.manual_seed(0)
    model = BertLMHeadModel(BertConfig(vocab_size=99, initializer_range=0.5, **sizes)).eval().to(dtype)
    assert "sees later tokens" in refusal(model) or "does not go on from a cache" in refusal(model)


def test_a_model_that_sees_later_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    model = dense_llama()
    attention = type(model.model.layers[2].mlp)
    forward = attention.forward
    monkeypatch.setattr(attention, "forward", lambda self, x: forward(self, x + x.mean(1, keepdim=True)))
    assert "sees later tokens" in refusal(model)


def test_layers_that_run_twice() -> None:
    model = dense_llama(num_hidden_layers=4)
    model.model.layers[3] = model.model.layers[1]
    assert "its layer 1 ran twice in one forward" in refusal(model)


def test_a_forward_that_fails_is_an_error_that_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    model = dense_llama()

    def fail(*args: Any, **kwargs: Any) -> None:
        raise ValueError("no token ids without an image")

    monkeypatch.setattr(type(model.model.norm), "forward", fail)
    assert "its forward fails on token ids alone: ValueError: no token ids without an image" in refusal(model)


def test_cached_steps_that_differ_where_there_is_padding(monkeypatch: pytest.MonkeyPatch) -> None:
    model = dense_llama()
    forward = type(model).forward

    @functools.wraps(forward)
    def off_in_padded_rows(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = forward(self, *args, **kwargs)
        if kwargs["use_cache"] and output.logits.shape[1] == 1:
            output.logits += (kwargs["attention_mask"][:, :1, None] == 0).float()
        return output

    monkeypatch.setattr(type(model), "forward", off_in_padded_rows)
    assert "gives other logits in cached steps in a padded row" in refusal(model)


@pytest.mark.parametrize(
    ("model_type", "reason"),
    [
        ("moshi", "its sliding window is the cache's, not the mask's"),
        ("minimax", "it does not go on from a cache: ValueError: MiniMax uses cache of its own"),
        ("openai-gpt", "it has no cache of keys and values"),
        ("git", "gives other logits in cached steps"),  # before 5.24 in rows without padding, too
        ("cpmant", r"run on \[2, 35\] positions where the input has \[2, 3\] tokens"),
    ],
)
def test_types_that_transformers_has_otherwise(model_type: str, reason: str) -> None:
    with pytest.raises(ModlabError, match=reason):
        modlab.convert(tiny_model(model_type), alternate_layers())


@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe", "gpt_oss"])
def test_rounding_in_half_precision_refuses_nobody(model_type: str) -> None:
    """Also where a mixture of experts chooses another expert for a token that runs in another batch."""
    for dtype in (torch.bfloat16, torch.float16):
        assert modlab.is_converted(modlab.convert(tiny_model(model_type).to(dtype), alternate_layers()))
