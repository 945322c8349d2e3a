"""Tokens that skip a layer's work while their keys and values are written."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import modlab
from modlab.hf.names import given_cache
from modlab.routing.state import masked_execution
from tests.helpers.models import dense_llama, scatter_gates
from tests.helpers.routing import IDS, MASK, inputs, positions, random_routing
from tests.helpers.tokenizers import make_tokenizer
from tests.helpers.training import added, learnt

SKIPS = ["written", "sublayers"]


def converted(skip: str, attention: str = "sdpa", **fields: Any) -> Any:
    dense = dense_llama(attn_implementation=attention)
    return scatter_gates(modlab.convert(dense, modlab.MoDConfig(skip=skip, layers=[1, 3, 4], **fields)), 3.0)


def test_it_follows_the_specification() -> None:
    """Against code that shares none: all tokens run, outputs of skipped ones are taken out."""
    model, dense = converted("sublayers"), dense_llama()
    with modlab.record_routing(model) as recording:
        found = model(IDS, use_cache=False).logits
    keep = recording.steps[0].keep
    assert keep[3].shape == (3, 40, 2) and not torch.equal(keep[3][..., 0], keep[3][..., 1])
    for index, keep_BTG in keep.items():
        for part, at in (("self_attn", 0), ("mlp", 1)):

            def silence(module, args, output, kept=keep_BTG[..., at, None]):
                return (output[0] * kept, *output[1:]) if isinstance(output, tuple) else output * kept

            dense.model.layers[index].get_submodule(part).register_forward_hook(silence)
    assert torch.allclose(found, dense(IDS, use_cache=False).logits, atol=2e-5)


@pytest.mark.parametrize("skip", SKIPS)
def test_it_converts_and_reverts(skip: str) -> None:
    dense = dense_llama()
    want = dense(IDS).logits
    model = modlab.convert(dense, modlab.MoDConfig(skip=skip))
    assert torch.equal(model(IDS).logits, want), "every gate is open"
    scatter_gates(model, 3.0)
    assert not torch.allclose(model(IDS).logits, want)
    assert torch.equal(modlab.revert(model)(IDS).logits, want)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("padding", ["none", "left", "right", "one row"])
@pytest.mark.parametrize("skip", SKIPS)
def test_packed_is_the_reference(skip: str, padding: str, attention: str) -> None:
    model = converted(skip, attention)
    ids, mask = inputs(model, padding)
    given = {"attention_mask": mask, **positions(mask)}
    real = torch.ones_like(ids).bool() if mask is None else mask.bool()
    for routing in (None, random_routing(0.0), random_routing()):
        with modlab.routing_override(model, routing) if routing else modlab.record_routing(model):
            packed = model(ids, use_cache=False, **given).logits
            cached = model(ids, use_cache=True, **given)
            with masked_execution(model):
                reference = model(ids, use_cache=False, **given).logits
        assert torch.allclose(packed[real], reference[real], atol=2e-5)
        assert torch.allclose(cached.logits[real], reference[real], atol=2e-5)
        assert given_cache(cached).kept_tokens.eq(ids.shape[1]).all(), "all keys are written"


@pytest.mark.parametrize("skip", SKIPS)
def test_what_is_skipped_does_not_run(skip: str) -> None:
    model = converted(skip)
    layer, rows = model.model.layers[3], dict.fromkeys(("q_proj", "k_proj", "o_proj", "down_proj"), 0)

    def count(name: str):
        def hook(module, args, output) -> None:
            rows[name] += output[..., 0].numel()

        return hook

    for name in rows:
        part = layer.mlp if name == "down_proj" else layer.self_attn
        part.get_submodule(name).register_forward_hook(count(name))
    with modlab.record_routing(model) as recording:
        model(IDS[:1], use_cache=False)
    keep = recording.steps[0].keep[3]
    attention, mlp = (keep[..., 0], keep[..., 1]) if skip == "sublayers" else (keep, keep)
    assert 0 < attention.sum() < 40
    runs = int(attention.sum())
    assert rows == {"q_proj": runs, "k_proj": 40, "o_proj": runs, "down_proj": int(mlp.sum())}


@pytest.mark.parametrize("skip", SKIPS)
def test_it_generates_as_it_reads(skip: str) -> None:
    model = converted(skip)
    extra = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    made = model.generate(IDS, attention_mask=MASK, **extra)
    whole = torch.cat([MASK, torch.ones(3, 6, dtype=MASK.dtype)], 1)
    logits = model(made, attention_mask=whole, use_cache=False, **positions(whole)).logits
    assert torch.equal(logits[:, 39:-1].argmax(-1), made[:, 40:])


@pytest.mark.parametrize("what_if", [0.0, 1.0])
@pytest.mark.parametrize("skip", SKIPS)
def test_routers_learn(skip: str, what_if: float) -> None:
    model = converted(skip)
    assert learnt(model, IDS, what_if=what_if) == added(model)


@pytest.mark.parametrize("skip", SKIPS)
def test_it_is_saved_traced_and_calibrated(skip: str, tmp_path, word_tokenizer) -> None:
    model = converted(skip)
    model.save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    again, _ = modlab.load(tmp_path / "model")
    assert torch.equal(again(IDS).logits, model(IDS).logits)
    assert "keys and values written" in (tmp_path / "model" / "README.md").read_text()
    trace = modlab.trace(model, word_tokenizer, "w1 w2 w3 w4 w5 w6 w7 w8 w9")
    assert trace.kv_saving == 1 and len(trace.layers) == (6 if skip == "sublayers" else 3)
    reached = modlab.calibrate(model, [{"input_ids": IDS}], keep_ratio=0.6, tolerance=0.05)
    assert reached.keep_ratio == pytest.approx(0.6, abs=0.05)


@pytest.mark.parametrize("skip", SKIPS)
def test_fast_generation_leaves_it_to_generate(skip: str) -> None:
    model, settings = converted(skip), {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    made = model.generate(IDS, attention_mask=MASK, **settings)
    with pytest.warns(UserWarning, match="has no form in the engine yet"):
        modlab.enable_fast_generation(model)
    assert torch.equal(model.generate(IDS, attention_mask=MASK, **settings), made)
    last = modlab.fast_generation_report(model)["last"]
    assert not last["fast"] and skip in last["why"]
