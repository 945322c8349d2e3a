"""Cropping a cache: what follows is as if the tokens had never come, or nothing has changed."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import MistralConfig, MistralForCausalLM

import modlab
from modlab.errors import ModlabError
from modlab.families.tiny_models import tiny_config, tiny_model
from tests.helpers.routing import random_routing

WINDOW = 12
IDS = torch.randint(3, 90, (2, 60), generator=torch.Generator().manual_seed(2))


def windowed(skip: Any, layers: Any = "all") -> Any:
    """A converted Mistral whose layers see 12 tokens."""
    config = tiny_config(MistralConfig)
    config.sliding_window, config.num_hidden_layers = WINDOW, 4
    torch.manual_seed(0)
    model = MistralForCausalLM(config).eval()
    return modlab.convert(model, modlab.MoDConfig(skip=skip, layers=layers, keep_recent=3, keep_first=0))


def forward(model: Any, start: int, end: int, cache: Any = None) -> Any:
    return model(IDS[:, start:end], past_key_values=cache, use_cache=True)


@torch.no_grad()
@pytest.mark.parametrize("layers", ["all", "alternate"])
@pytest.mark.parametrize("skip", ["layer", "attention", "mlp", "kv"])
@pytest.mark.parametrize("steps", [0, 3, 20], ids="{}-steps".format)
def test_behind_a_sliding_window_a_crop_is_right_or_refused(skip: str, layers: str, steps: int) -> None:
    model, seen, refused, right = windowed(skip, layers), 30 + steps, 0, 0
    with modlab.routing_override(model, random_routing(0.6)):
        cache = forward(model, 0, 30).past_key_values
        for t in range(30, seen):
            forward(model, t, t + 1, cache)
        for target in (0, 1, 5, WINDOW, 20, 29, 30, seen - 2, seen - 1, seen):
            for wanted in {target, target - seen}:
                if wanted == 0 and target != seen:
                    continue  # 0 removes nothing
                cropped = copy.deepcopy(cache)
                try:
                    cropped.crop(wanted)
                    right += 1
                except ModlabError as error:
                    assert f"cropped to {target} of {seen}" in str(error) or "activate_past" in str(error)
                    target_now = seen
                    refused += 1
                else:
                    target_now = target
                assert {layer.get_seq_length() for layer in cropped.layers} == {target_now}
                got = forward(model, target_now, target_now + 3, cropped).logits
                want = model(IDS[:, : target_now + 3], use_cache=False).logits[:, target_now:]
                torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    assert right and (refused or steps < 20), "what was dropped by then cannot come back"


@torch.no_grad()
@pytest.mark.parametrize("layers", ["all", "alternate"])
@pytest.mark.parametrize("skip", ["layer", "kv"])
def test_a_cache_that_records_its_past_goes_back_behind_the_window(skip: str, layers: str) -> None:
    model = windowed(skip, layers)
    with modlab.routing_override(model, random_routing(0.6)):
        cache = forward(model, 0, 20).past_key_values
        for first in (20, 24):  # drafts of nine tokens, four of which are right
            cache.activate_past_recording()
            forward(model, first, first + 9, cache)
            cache.crop(-5)
            assert cache.get_seq_length() == first + 4
            got = forward(model, first + 4, first + 6, copy.deepcopy(cache)).logits
            want = model(IDS[:, : first + 6], use_cache=False).logits[:, first + 4 :]
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("skip", ["layer", "kv"])
def test_a_number_of_tokens_in_a_tensor_is_a_number(skip: str) -> None:
    """transformers 5.17 crops by one; a length that stays a tensor grows wherever it was noted."""
    model = windowed(skip)
    with modlab.routing_override(model, random_routing(0.3)):
        cache = forward(model, 0, 30).past_key_values
        for first in (30, 32, 34, 36):
            cache.activate_past_recording()
            forward(model, first, first + 5, cache)
            cache.crop(torch.tensor(-3))
            assert all(type(layer.get_seq_length()) is int for layer in cache.layers)
        got = forward(model, 38, 40, cache).logits
        want = model(IDS[:, :40], use_cache=False).logits[:, 38:]
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_window_that_is_not_full_can_be_cropped_anywhere() -> None:
    model = windowed("layer")
    with modlab.routing_override(model, random_routing(0.6)):
        for target in (1, 4, 9):
            cache = forward(model, 0, WINDOW - 2).past_key_values
            cache.crop(target)
            got = forward(model, target, target + 5, cache).logits
            want = model(IDS[:, : target + 5], use_cache=False).logits[:, target:]
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_state_that_cannot_go_back_refuses_for_all_layers() -> None:
    """Linear attention holds a sum: transformers' layer raises, after others have been cropped."""
    model: Any = tiny_model("qwen3_next")
    modlab.convert(model, modlab.MoDConfig(skip="mlp", layers="all"))
    cache = model(IDS[:1, :20] % 90, use_cache=True).past_key_values
    with pytest.raises(ModlabError, match="activate_past_recording"):
        cache.crop(-4)
    assert {layer.keys.shape[-2] for layer in cache.layers if getattr(layer, "keys", None) is not None} == {
        20
    }


@torch.no_grad()
def test_what_was_refused_once_is_possible_in_a_copy_made_before() -> None:
    model = windowed("kv")
    with modlab.routing_override(model, random_routing(0.3)):
        cache = forward(model, 0, 30).past_key_values
        before = copy.deepcopy(cache)
        for t in range(30, 55):
            forward(model, t, t + 1, cache)
        with pytest.raises(ModlabError, match=r"copy\.deepcopy"):
            cache.crop(30)
        got = forward(model, 30, 35, before).logits
        torch.testing.assert_close(
            got, model(IDS[:, :35], use_cache=False).logits[:, 30:], rtol=1e-4, atol=1e-5
        )
