"""What-if passes through flex attention against the masked reference with its mask as a tensor."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention.flex_attention import create_mask

import modlab
from modlab.execution import reference, weighed_attention, what_if_attention
from modlab.execution.masks import masked_reference_mask
from tests.helpers.flex import sdpa_and_flex
from tests.helpers.models import alternate_layers, spread_gates

IDS = torch.randint(3, 250, (3, 200), generator=torch.Generator().manual_seed(0))
PADDED = torch.ones_like(IDS)
PADDED[1, :37] = 0


@pytest.mark.parametrize("recent", [1, 40])
@pytest.mark.parametrize("T", [1, 127, 128, 129, 300])
def test_the_rule_says_what_the_mask_says(T: int, recent: int) -> None:
    generator = torch.Generator().manual_seed(T)
    keep = torch.rand(3, T, generator=generator) < 0.3
    real = torch.rand(3, T, generator=generator) < 0.9
    if recent > 1:  # the recent past is counted in columns, which tokens are where padding has no gaps
        real = torch.arange(T).expand(3, T) >= torch.tensor([[0], [T // 3], [T // 2]])
    keep[1], keep[2] = False, True
    mask = what_if_attention.what_if_block_mask(keep, real, recent)
    want = masked_reference_mask(keep, real, recent=recent)
    assert torch.equal(create_mask(mask.mask_mod, 3, 1, T, T, device="cpu"), want)
    blocks = mask.to_dense()[0, 0].bool()  # a block that is left out holds nothing that may be seen
    for q in range(blocks.shape[0]):
        for k in range(blocks.shape[1]):
            inside = want[:, 0, q * 128 : (q + 1) * 128, k * 128 : (k + 1) * 128]
            assert blocks[q, k] or not inside.any()
    assert mask.full_kv_num_blocks is None, "a block that the rule is not asked for"


@pytest.mark.parametrize("recent", [1, 40, 128, 200])
@pytest.mark.parametrize("T", [1, 127, 128, 129, 300])
def test_recent_and_earlier_keys_are_all_that_is_seen_and_never_both(T: int, recent: int) -> None:
    real = torch.rand(2, T, generator=torch.Generator().manual_seed(T)) < 0.9
    weighed = weighed_attention.weighed_keys(torch.zeros(2, T), real, recent, at_once=True)
    seen = torch.zeros(2, 1, T, T, dtype=torch.int)
    for part in weighed.blocks:
        if part is None:
            assert recent >= T
            continue
        mask = create_mask(part.mask_mod, 2, 1, T, T, device="cpu")
        blocks = part.to_dense()[0, 0].bool()
        outside = ~blocks.repeat_interleave(128, 0).repeat_interleave(128, 1)[:T, :T]
        assert not (mask & outside).any(), "a block that holds a seen key is left out"
        seen += mask
    assert torch.equal(seen, masked_reference_mask(real, real).int())


def test_no_block_mask_is_made_where_the_kernel_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """They took a third of the host's time in the forward of a distilled step."""
    made, q = [], torch.randn(1, 2, 130, 16)

    def kernel(q, k, v, weight, recent, scale):
        return q

    def make(*args):
        made.append(args)
        raise NotImplementedError

    monkeypatch.setattr(weighed_attention, "band_block_mask", make)
    monkeypatch.setattr(weighed_attention, "kernel_weighed_attention", kernel)
    monkeypatch.setattr(weighed_attention, "takes", lambda q: True)
    real = torch.ones(1, 130, dtype=torch.bool)
    keys = weighed_attention.weighed_keys(torch.zeros(1, 130), real, 20, padded=False)
    weighed_attention.weighed_attention(torch.nn.Module(), q, q, q, keys)
    assert not made
    keys = weighed_attention.weighed_keys(torch.zeros(1, 130), real, 20, padded=True)
    with pytest.raises(NotImplementedError):
        weighed_attention.weighed_attention(torch.nn.Module(), q, q, q, keys)


@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "autocast"])
@pytest.mark.parametrize("skip", ["layer", "attention", "kv"])
def test_same_logits_as_through_sdpa(
    make_llama, monkeypatch: pytest.MonkeyPatch, skip: str, autocast: bool
) -> None:
    """On a CPU without gradients, the only form in which flex attention runs there; uncompiled, for speed."""
    config = alternate_layers(skip=skip, keep_recent=40)
    model = spread_gates(modlab.convert(make_llama(), config)).train()
    want, got = sdpa_and_flex(model, IDS, PADDED, monkeypatch, autocast)
    rtol, atol = (3e-2, 1e-2) if autocast else (1e-4, 1e-5)
    torch.testing.assert_close(got[PADDED.bool()], want[PADDED.bool()], rtol=rtol, atol=atol)


def test_only_where_nothing_but_the_mask_decides(make_llama, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def ask(site, given, device):  # what it would say of a GPU; the pass itself stays on this device
        asked.append(what_if_attention.takes_flex(site, given, torch.device("cuda")))
        return False

    monkeypatch.setattr(reference, "takes_flex", ask)

    def answers(**changes) -> set[bool]:
        asked.clear()
        model = modlab.convert(make_llama(**changes), alternate_layers()).train()
        model(IDS[:, :20])
        return set(asked)

    assert answers() == {True}
    assert answers(attention_dropout=0.1) == {False}
    assert answers(attn_implementation="eager") == {False}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(
    ("skip", "what_if"), [("layer", True), ("attention", True), ("kv", True), ("kv", False)]
)
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_same_gradients_as_through_sdpa(make_llama, skip: str, what_if: bool, compiled: bool) -> None:
    config = alternate_layers(skip=skip, keep_recent=40)
    model = spread_gates(modlab.convert(make_llama(), config)).cuda().train()
    model.mod.compile_layers = compiled
    model.mod.what_if = what_if
    gradients, losses = [], []
    for flex in (False, True):
        model.mod.supports_flex = flex
        model.zero_grad()
        torch.manual_seed(1)
        loss = model(IDS.cuda(), attention_mask=PADDED.cuda(), labels=IDS.cuda()).loss
        loss.backward()
        losses.append(loss.detach())
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    torch.testing.assert_close(*losses, rtol=1e-4, atol=1e-4)
    for name, want in gradients[0].items():
        atol = 1e-3 * float(want.abs().max()) + 1e-7
        torch.testing.assert_close(gradients[1][name], want, rtol=1e-2, atol=atol)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("flex", [False, True], ids=["mask", "flex"])
def test_routers_of_a_frozen_base_learn(make_llama, flex: bool) -> None:
    """In half precision, where nothing before the first router has a gradient."""
    model = make_llama().bfloat16().requires_grad_(False)
    model = spread_gates(modlab.convert(model, alternate_layers(skip="kv", keep_recent=40))).cuda().train()
    model.mod.supports_flex = flex
    model(IDS.cuda(), labels=IDS.cuda()).loss.backward()
    for layer in model.mod.layers:
        slope = model.model.layers[layer].mod_router.weight.grad
        assert bool(slope.isfinite().all()) and bool(slope.any())
