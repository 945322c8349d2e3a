"""Whole rows through one kernel (here in Triton's interpreter) against packed execution with its masks."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import modlab
from modlab.errors import ModlabError
from modlab.execution import weighed_attention, whole_rows
from modlab.kernels import weighed_attention as kernels
from tests.helpers.models import spread_gates

pytest.importorskip("triton")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# On a GPU the kernel is for 16 bit; the interpreter's products are exact in 32.
DTYPE, NEAR = (torch.bfloat16, 3e-2) if DEVICE.type == "cuda" else (torch.float32, 1e-5)
IDS = torch.randint(3, 250, (2, 150), generator=torch.Generator().manual_seed(0)).to(DEVICE)
BEHIND = torch.ones_like(IDS)
BEHIND[1, 90:] = 0
BEFORE = BEHIND.flip(1)
INSIDE = torch.ones_like(IDS)
INSIDE[1, 70:80] = 0


def model(make_llama, **settings):
    config = modlab.MoDConfig(**{"skip": "kv", "layers": "all", "keep_recent": 40} | settings)
    dense = make_llama(hidden_size=64, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=3)
    return spread_gates(modlab.convert(dense, config)).eval().to(DEVICE, DTYPE)


def both(model, monkeypatch: pytest.MonkeyPatch, **inputs) -> tuple[Tensor, Tensor, int]:
    """Logits of packed execution, those through the kernel where it may, and in how many layers it ran."""
    ran = []
    weighing = whole_rows.weighing_attention
    monkeypatch.setattr(whole_rows, "weighing_attention", lambda config: ran.append(1) or weighing(config))
    with torch.no_grad():
        monkeypatch.setattr(whole_rows, "on_gpu", lambda tensor: False)
        want = model(use_cache=False, **inputs).logits
        assert not ran
        monkeypatch.setattr(whole_rows, "on_gpu", lambda tensor: True)
        got = model(use_cache=False, **inputs).logits
    return want, got, len(ran)


@pytest.mark.parametrize("gates", ["layer", "kv_head"])
@pytest.mark.parametrize("skip", ["kv", "kv+prompt"])
@pytest.mark.parametrize("mask", [None, BEHIND], ids=["whole", "padded behind"])
def test_the_kernel_says_what_packed_execution_says(
    make_llama, monkeypatch: pytest.MonkeyPatch, skip: str, gates: str, mask: Tensor | None
) -> None:
    routed = model(make_llama, skip=skip, gates=gates)
    given = {} if mask is None else {"attention_mask": mask}
    want, got, ran = both(routed, monkeypatch, input_ids=IDS, **given)
    real = torch.ones_like(IDS).bool() if mask is None else mask.bool()
    assert ran == len(routed.mod.layers)
    torch.testing.assert_close(got[real], want[real], rtol=10 * NEAR, atol=NEAR)
    dense = modlab.revert(routed)(IDS, attention_mask=mask).logits
    assert not torch.allclose(dense[real], want[real], rtol=10 * NEAR, atol=NEAR), "nothing was hidden"


@pytest.mark.parametrize("skip", ["kv", "kv+prompt"])
def test_keys_and_values_in_eight_bits_come_to_the_kernel(make_llama, monkeypatch, skip: str) -> None:
    """What differs in the last bit may be rounded to another whole number: against what rounding does."""
    routed = model(make_llama, skip=skip, kv_cache_dtype="int8")
    want, got, ran = both(routed, monkeypatch, input_ids=IDS)
    assert ran == len(routed.mod.layers)
    modlab.set_kv_cache_dtype(routed, "auto")
    with torch.no_grad():
        unrounded = routed(IDS, use_cache=False).logits
    assert (got - want).abs().mean() < 0.1 * (unrounded - want).abs().mean()


@pytest.mark.parametrize("mask", [BEFORE, INSIDE], ids=["before", "inside"])
def test_padding_before_tokens_is_left_to_masks(make_llama, monkeypatch, mask: Tensor) -> None:
    want, got, ran = both(model(make_llama), monkeypatch, input_ids=IDS, attention_mask=mask)
    assert ran == 0 and torch.equal(got, want)


def test_documents_are_left_to_masks(make_llama, monkeypatch) -> None:
    places = (torch.arange(150, device=DEVICE) % 75).expand(2, -1)
    want, got, ran = both(model(make_llama), monkeypatch, input_ids=IDS, position_ids=places)
    assert ran == 0 and torch.equal(got, want)


def test_where_every_key_stays_the_dense_call_runs(make_llama, monkeypatch) -> None:
    routed = model(make_llama)
    modlab.set_threshold(routed, 0)
    want, got, ran = both(routed, monkeypatch, input_ids=IDS)
    assert ran == 0 and torch.equal(got, want)


def test_only_16_bit_goes_through_the_kernel() -> None:
    assert not whole_rows.on_gpu(torch.zeros(1, dtype=torch.bfloat16))
    if DEVICE.type == "cuda":
        assert whole_rows.on_gpu(torch.zeros(1, dtype=torch.bfloat16, device="cuda"))
        assert not whole_rows.on_gpu(torch.zeros(1, device="cuda"))
        with torch.autocast("cuda", torch.bfloat16):
            assert whole_rows.on_gpu(torch.zeros(1, device="cuda"))


def test_an_attention_that_caps_its_scores_keeps_to_its_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    """As Gemma 2 with transformers 5.17, which runs under sdpa there; later versions refuse that."""
    given = []
    monkeypatch.setattr(weighed_attention, "as_sdpa", lambda *args, **kwargs: given.append((args, kwargs)))
    q, k, v = (torch.randn(1, heads, 130, 16) for heads in (4, 2, 2))
    keys = weighed_attention.WeighedKeys(torch.zeros(1, 130), plain=20, instead=lambda: "mask")
    weighed_attention.weighed_attention(torch.nn.Module(), q, k, v, keys, scaling=0.3, softcap=30.0)
    ((args, kwargs),) = given
    assert args[1:] == (q, k, v, "mask") and kwargs == {"scaling": 0.3, "softcap": 30.0}
    keys.instead = None
    with pytest.raises(ModlabError, match="softcap"):
        weighed_attention.weighed_attention(torch.nn.Module(), q, k, v, keys, softcap=30.0)


@pytest.mark.parametrize("size", ["head_dim", "entries"])
def test_what_the_kernel_does_not_take_keeps_to_its_mask(make_llama, monkeypatch, size: str) -> None:
    """A width of heads that the module does not tell, rows too large to count: the mask, never no mask."""
    routed = model(make_llama, gates="kv_head")
    if size == "entries":
        monkeypatch.setattr(kernels, "MOST_ENTRIES", 1)
    else:
        monkeypatch.setattr(kernels, "HEAD_DIMS", ())
    want, got, ran = both(routed, monkeypatch, input_ids=IDS)
    assert ran
    torch.testing.assert_close(got, want, rtol=10 * NEAR, atol=NEAR)


def test_traced_layers_are_left_to_masks(make_llama, monkeypatch) -> None:
    routed = model(make_llama)
    routed.mod.compile_layers = True
    monkeypatch.setattr(torch, "compile", lambda function, **settings: function)
    want, got, ran = both(routed, monkeypatch, input_ids=IDS)
    assert ran == 0 and torch.equal(got, want)
