"""Attention over the cache where it lies: which attentions may, and that it is what the reference says."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

import modlab
from modlab.errors import ModlabError
from modlab.execution import stored_keys
from modlab.families.tiny_models import tiny_model
from modlab.hf.names import cache_argument, given_cache
from modlab.routing.state import masked_execution
from modlab.skips.plain import Watching

IDS = torch.randint(3, 100, (3, 61), generator=torch.Generator().manual_seed(0))


def converted(model: Any, gates: Any, **changes: Any) -> Any:
    """With routers that say something else of each token."""
    config = modlab.MoDConfig(layers="all", gates=gates, keep_first=1, keep_recent=5, **changes)
    model = modlab.convert(model, config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".mod_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model.eval()


@pytest.fixture
def attended(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many tokens attended over stored keys, call by call."""
    seen: list[int] = []
    real = stored_keys.attended

    def counting(layer: Any, row: int, query_NSH: torch.Tensor, *rest: Any) -> torch.Tensor:
        seen.append(query_NSH.shape[1])
        return real(layer, row, query_NSH, *rest)

    monkeypatch.setattr(stored_keys, "attended", counting)
    return seen


@pytest.mark.parametrize("gates", ["layer", "kv_head"])
@pytest.mark.parametrize("stretch", [4, 256])
@torch.no_grad()
def test_a_prompt_in_pieces_and_single_tokens(
    make_llama, attended, monkeypatch: pytest.MonkeyPatch, gates: str, stretch: int
) -> None:
    monkeypatch.setattr(stored_keys, "STRETCH", stretch)
    model = converted(make_llama(), gates)
    mask = torch.ones_like(IDS)
    mask[1, :20] = mask[2, 30:40] = 0
    with masked_execution(model):
        want = model(IDS, attention_mask=mask, use_cache=False).logits
    cache, got = None, []
    for start, stop in ((0, 33), (33, 50), *((i, i + 1) for i in range(50, 61))):
        given = {} if cache is None else {cache_argument(model): cache}
        out = model(IDS[:, start:stop], attention_mask=mask[:, :stop], use_cache=True, **given)
        cache = given_cache(out)
        got.append(out.logits)
    real = mask.bool()
    torch.testing.assert_close(torch.cat(got, 1)[real], want[real], rtol=1e-4, atol=2e-5)
    assert max(attended) == 33 and min(attended) == 1, "no attention over a copy"
    assert len(attended) == model.config.num_hidden_layers * (3 * 13)


@pytest.mark.parametrize("gates", ["layer", "kv_head"])
@torch.no_grad()
def test_nothing_but_stored_keys_is_read(make_llama, gates: str) -> None:
    """What torch's attention is given for one more token is no larger than what the cache holds."""
    model = converted(make_llama(), gates)
    cache = given_cache(model(IDS[:1], use_cache=True))
    before = sum(sum(layer.lengths) * (1 if gates == "kv_head" else 2) for layer in cache.layers)
    with Watching() as watching:
        model(IDS[:1, :1], use_cache=True, **{cache_argument(model): cache})
    read = [call["key"].shape[1] * call["key"].shape[2] for call in watching.calls]
    G = model.config.num_key_value_heads
    assert G == 2 and sum(read) == before + G * model.config.num_hidden_layers


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "mistral", "gemma3_text", "gpt_neox", "gpt2"])
def test_attentions_that_do_nothing_else_are_found(name: str) -> None:
    model = converted(tiny_model(name), "layer")
    plans = [
        m.mod_plan for m in model.modules() if getattr(m, "mod_plan", None) and m.mod_plan.part != "layer"
    ]
    assert plans and all(plan.plain for plan in plans)


@pytest.mark.parametrize("name", ["bloom", "gemma2", "gpt_oss", "falcon", "deepseek_v3"])
def test_others_run_over_a_copy(name: str, attended) -> None:
    """ALiBi, soft caps, sinks, latents: their attention needs more than queries, keys and values."""
    changes = {"alibi": True} if name == "falcon" else {}
    model = tiny_model(name, **changes)
    if name == "gemma2":  # transformers 5.17 lets it run under sdpa, which leaves the soft caps out
        model.set_attn_implementation("eager")
    model = converted(model, "layer")
    with torch.no_grad(), masked_execution(model):
        want = model(IDS[:1], use_cache=False).logits
    with torch.no_grad():
        got = model(IDS[:1], use_cache=True).logits
    torch.testing.assert_close(got, want, rtol=1e-4, atol=2e-5)
    assert not attended


@pytest.mark.parametrize("name", ["gemma2", "bloom", "gpt_oss"])
@torch.no_grad()
def test_an_attention_is_run_as_the_model_names_it_now(name: str) -> None:
    """Whichever is its own choice, and after a change of it: with and without a cache the same logits."""
    model = converted(tiny_model(name, attention_dropout=0.0), "layer")
    for implementation in (model.config._attn_implementation, "eager"):
        model.set_attn_implementation(implementation)
        with masked_execution(model):
            want = model(IDS[:1], use_cache=False).logits
        torch.testing.assert_close(model(IDS[:1], use_cache=True).logits, want, rtol=1e-4, atol=2e-5)


@torch.no_grad()
def test_an_attention_that_changed_is_noticed(make_llama, monkeypatch: pytest.MonkeyPatch) -> None:
    model = converted(make_llama(), "kv_head")
    real = F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *args, **kwargs: real(*args, **kwargs))
    with pytest.raises(ModlabError, match="something else with its keys"):
        model(IDS, use_cache=True)
    monkeypatch.undo()
    assert model(IDS, use_cache=True).logits.isfinite().all(), "nothing of it is left"
