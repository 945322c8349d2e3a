"""Who may see whom is what the dense model's own mask says, minus what routing takes away: packed documents,
blocks that see the future, masks of four dimensions. Held to the oracle, which knows no mask of modlab's."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import modlab
from modlab.families.oracle import Decisions, oracle_logits
from modlab.families.tiny_models import tiny_model
from modlab.routing.forward import packed_documents, position_in_document, real_columns
from modlab.routing.state import masked_execution
from tests.helpers.models import scatter_gates

B, T = 2, 30
IDS = torch.randint(3, 500, (B, T), generator=torch.Generator().manual_seed(0))
LOWEST = torch.finfo(torch.float32).min
SKIPS = ["kv", "layer", "attention", "mlp"]


def block_mask(first: int, last: int, padding: int = 0) -> torch.Tensor:
    """Causal, but tokens from `first` up to, not with, `last` all see each other, as an image's do; `padding`
    columns on the left of the second row. bool [B, 1, T, T]."""
    at = torch.arange(T)
    visible = at[None, :] <= at[:, None]
    inside = (at >= first) & (at < last)
    visible = (visible | (inside[:, None] & inside[None, :])).expand(B, 1, T, T).clone()
    visible[1, :, :, :padding] = False
    return visible


def positions(*lengths: int) -> torch.Tensor:
    return torch.cat([torch.arange(n) for n in lengths])[None].expand(B, -1)


def inputs(case: str) -> dict[str, torch.Tensor]:
    if case == "documents":
        return {"position_ids": positions(11, 13, 6)}
    visible = block_mask(6, 20, padding=4 if "padded" in case else 0)
    if "boolean" in case:
        return {"attention_mask": visible}
    return {"attention_mask": torch.zeros(visible.shape).masked_fill(~visible, LOWEST)}


CASES = [
    ("documents", "sdpa"),
    ("documents", "eager"),
    ("block, boolean", "sdpa"),
    ("block, additive", "sdpa"),
    ("block, additive", "eager"),
    ("block, padded, boolean", "sdpa"),
    ("block, padded, additive", "eager"),
]


@pytest.fixture
def pair(make_llama: Any) -> Any:
    def make(skip: str, attention: str) -> tuple[Any, Any]:
        dense = make_llama(attn_implementation=attention)
        config = modlab.MoDConfig(skip=skip, layers=[1, 2, 4], keep_recent=3, keep_first=1)
        model = modlab.convert(make_llama(attn_implementation=attention), config)
        scatter_gates(model)
        return dense, model

    return make


@pytest.mark.parametrize("skip", SKIPS)
@pytest.mark.parametrize(("case", "attention"), CASES)
def test_routed_layers_start_from_the_mask_that_is_given(
    pair: Any, skip: str, case: str, attention: str
) -> None:
    dense, model = pair(skip, attention)
    given = inputs(case)
    with torch.no_grad(), modlab.record_routing(model) as recording:
        packed = model(IDS, use_cache=False, **given).logits
    step = recording.steps[0]
    assert 0.2 < torch.stack(list(step.keep.values())).float().mean() < 0.9
    want = oracle_logits(dense, Decisions.recorded(model, step), input_ids=IDS, **given)
    real = step.real
    torch.testing.assert_close(packed[real], want[real], rtol=1e-4, atol=1e-4)
    with torch.no_grad(), masked_execution(model):
        masked = model(IDS, use_cache=False, **given).logits
    torch.testing.assert_close(masked[real], want[real], rtol=1e-4, atol=1e-4)
    model.train()
    model.mod.what_if = False
    with torch.no_grad():
        trained = model(IDS, use_cache=False, **given).logits
    torch.testing.assert_close(trained[real], want[real], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("skip", SKIPS)
@pytest.mark.parametrize("chunk", [7, 1024])
def test_a_block_is_read_whole_into_the_cache(pair: Any, skip: str, chunk: int, monkeypatch: Any) -> None:
    """A prompt that is run in pieces would hide the later half of a block from its earlier half."""
    monkeypatch.setattr("modlab.execution.packed.CHUNK", chunk)
    dense, model = pair(skip, "sdpa")
    given = {"attention_mask": block_mask(6, 20)}
    with torch.no_grad(), modlab.record_routing(model) as recording:
        got = model(IDS, use_cache=True, **given).logits
    decisions = Decisions.recorded(model, recording.steps[0])
    want = oracle_logits(dense, decisions, input_ids=IDS, **given)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


WINDOWED = [(name, skip, "layer") for name in ("mistral", "gemma3_text", "gpt_neo") for skip in SKIPS]


@pytest.mark.parametrize(("name", "skip", "gates"), [*WINDOWED, ("mistral", "kv", "kv_head")])
def test_a_mask_says_itself_whether_a_window_hides_a_key(name: str, skip: Any, gates: Any) -> None:
    """In a sliding layer, too: the block is wider than the window. GPT-Neo's attention slides whatever the
    mask says."""
    dense = tiny_model(name).eval()
    config = modlab.MoDConfig(skip=skip, gates=gates, layers="all", keep_recent=2, keep_first=1)
    model = scatter_gates(modlab.convert(copy.deepcopy(dense), config), 3.0).eval()
    windows = [w for w in model.mod.windows.values() if w is not None]
    assert windows and max(windows) < 20 - 6
    ids = IDS % dense.config.vocab_size
    visible = block_mask(6, 20)
    given = {"attention_mask": torch.zeros(visible.shape).masked_fill(~visible, LOWEST)}
    with torch.no_grad(), modlab.record_routing(model) as recording, masked_execution(model):
        masked = model(ids, use_cache=False, **given).logits
    want = oracle_logits(dense, Decisions.recorded(model, recording.steps[0]), input_ids=ids, **given)
    torch.testing.assert_close(masked, want, rtol=1e-4, atol=1e-4)
    for use_cache in (False, True):
        with torch.no_grad():
            packed = model(ids, use_cache=use_cache, **given).logits
        torch.testing.assert_close(packed, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("skip", SKIPS)
@pytest.mark.parametrize("what_if", [True, False])
def test_no_gradient_crosses_from_one_document_to_another(pair: Any, skip: str, what_if: bool) -> None:
    _, model = pair(skip, "sdpa")
    model.train()
    model.mod.what_if = what_if
    x = model.get_input_embeddings()(IDS).detach().requires_grad_()
    logits = model(inputs_embeds=x, position_ids=positions(14, 16), use_cache=False).logits
    logits[:, 14:].square().sum().backward()
    assert x.grad[:, :14].abs().max() == 0 and x.grad[:, 14:].abs().max() > 0


@pytest.mark.parametrize("skip", SKIPS)
def test_a_document_is_what_it_is_alone(pair: Any, skip: str) -> None:
    """Same routes, protected first tokens of its own, same logits."""
    _, model = pair(skip, "sdpa")
    with torch.no_grad(), modlab.record_routing(model) as recording:
        packed = model(IDS, position_ids=positions(11, 19), use_cache=False).logits[:, 11:]
        alone = model(IDS[:, 11:], use_cache=False).logits
    together, single = recording.steps
    for layer in model.mod.layers:
        assert torch.equal(together.keep[layer][:, 11:], single.keep[layer])
        assert together.keep[layer][:, 11].all(), "its first token is protected"
    torch.testing.assert_close(packed, alone, rtol=1e-4, atol=1e-4)


def test_a_row_longer_than_the_context_may_hold_documents_that_fit(make_llama: Any) -> None:
    model = modlab.convert(make_llama(max_position_embeddings=20))
    assert model(IDS, position_ids=positions(15, 15), use_cache=False).logits.shape[1] == T
    with pytest.raises(modlab.ModlabError, match="has 25 tokens, the model's context is 20"):
        model(IDS, position_ids=positions(25, 5), use_cache=False)
    with pytest.raises(modlab.ModlabError, match="has 30 tokens"):
        model(IDS, use_cache=False)


def test_documents_are_told_by_restarting_positions_alone() -> None:
    assert packed_documents(positions(3, 2), B, 5).tolist() == [[0, 0, 0, 1, 1]] * 2
    assert packed_documents(torch.arange(5)[None] + 7, B, 5) is None, "one document that begins late"
    assert packed_documents(None, B, 5) is None
    assert position_in_document(torch.tensor([[0, 0, 0, 1, 1], [4, 5, 5, 5, 6]])).tolist() == [
        [0, 1, 2, 0, 1],
        [0, 0, 1, 2, 0],
    ]


def test_padding_is_what_not_even_its_own_token_sees() -> None:
    visible = block_mask(6, 20, padding=4)
    want = torch.ones(B, T, dtype=torch.bool)
    want[1, :4] = False
    assert torch.equal(real_columns(visible, T, T), want)
    additive = torch.zeros(visible.shape).masked_fill(~visible, LOWEST)
    assert torch.equal(real_columns({"sliding": None, "full": additive}, T, T), want)
    assert torch.equal(real_columns(visible[:, :, -2:], 2, T), want), "cached columns: seen by any new token"
    assert real_columns(visible[0], T, T) is None


def test_a_mask_of_another_form_is_refused(make_llama: Any) -> None:
    model = modlab.convert(make_llama())
    with pytest.raises(modlab.ModlabError, match=r"takes \[B, 30\] .* boolean or additive"):
        model(IDS, attention_mask=torch.ones(B, T, T))
