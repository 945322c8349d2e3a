"""Prompt tokens leave early and routers decide about the cache: both at once, each apart."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import modlab
from modlab.cache.heads import HeadsLayer
from modlab.execution import packed, stored_keys
from modlab.execution.projections import PROJECTIONS
from modlab.hf.names import given_cache
from modlab.routing.state import masked_execution
from tests.helpers.models import dense_llama, leaving_llama
from tests.helpers.routing import IDS, MASK, inputs, positions
from tests.helpers.tokenizers import make_tokenizer
from tests.helpers.training import added, learnt

GATES = ["layer", "kv_head"]


def converted(gates: str = "kv_head", attention: str = "sdpa", **fields: Any) -> Any:
    return leaving_llama(gates=gates, dense=dense_llama(attn_implementation=attention), **fields)


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.allclose(a, b, atol=2e-5)


def test_without_routing_it_is_leaving_alone_and_without_leaving_routing_alone() -> None:
    both = converted()
    left = modlab.convert(dense_llama(), modlab.MoDConfig(skip="prompt"))
    state = both.state_dict()
    left.load_state_dict({name: state[name] for name in left.state_dict()})
    with modlab.routing_override(both, lambda layer, gate, position: torch.ones_like(gate).bool()):
        assert close(both(IDS, use_cache=False).logits, left(IDS, use_cache=False).logits)
    routed = modlab.convert(
        dense_llama(),
        modlab.MoDConfig(gates="kv_head", keep_recent=6, keep_first=2, layers="all"),
    )
    routed.load_state_dict({name: state[name] for name in routed.state_dict()})
    ends = {}
    for name, model in (("both", both), ("routed", routed)):
        model.model.layers[3].register_forward_hook(
            lambda m, a, output, name=name: ends.update({name: output})
        )
        model(IDS, use_cache=False)
    assert close(ends["both"], ends["routed"]), "below the point of leaving nothing differs"
    assert not close(both(IDS).logits, routed(IDS).logits)


def test_routers_above_read_the_state_where_tokens_leave() -> None:
    model = converted("layer")
    seen: dict[int, torch.Tensor] = {}
    for index in (4, 5):
        router = model.model.layers[index].mod_router
        router.register_forward_hook(lambda m, args, output, index=index: seen.update({index: args[0]}))
    model(IDS, use_cache=False)
    assert torch.equal(seen[4], seen[5])
    assert model.mod.layers == [0, 1, 2, 3, 4, 5]
    inner = modlab.convert(dense_llama(), modlab.MoDConfig(skip="kv+prompt", layers=[2]))
    assert inner.mod.layers == [2, 4, 5]


@pytest.mark.parametrize("gates", GATES)
def test_it_converts_and_reverts(gates: str) -> None:
    dense = dense_llama()
    want, names = dense(IDS).logits, set(dict(dense.named_parameters()))
    model = modlab.convert(dense, modlab.MoDConfig(skip="kv+prompt", gates=gates, layers="all"))
    own = [name for name in set(dict(model.named_parameters())) - names if PROJECTIONS in name]
    assert own and all(name.split(".")[2] in "45" for name in own)
    with modlab.routing_off(model):
        assert torch.equal(model(IDS).logits, want)
    modlab.revert(model)
    assert torch.equal(model(IDS).logits, want) and set(dict(model.named_parameters())) == names


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("padding", ["none", "left", "right", "one row"])
@pytest.mark.parametrize("gates", GATES)
def test_packed_and_leaving_are_the_reference(gates: str, padding: str, attention: str) -> None:
    model = converted(gates, attention)
    ids, mask = inputs(model, padding)
    given = {"attention_mask": mask, **positions(mask)}
    real = torch.ones_like(ids).bool() if mask is None else mask.bool()
    with masked_execution(model):
        reference = model(ids, use_cache=False, **given).logits
    assert close(model(ids, use_cache=False, **given).logits[real], reference[real])
    whole = model(ids, use_cache=True, **given)
    assert close(whole.logits[real], reference[real])
    some = model(ids, use_cache=True, logits_to_keep=1, **given)
    assert close(some.logits[real[:, -1:]], reference[:, -1:][real[:, -1:]])
    assert torch.equal(given_cache(some).kept_tokens, given_cache(whole).kept_tokens)
    assert given_cache(whole).kept_tokens.sum() < 6 * real.sum() * (2 if gates == "kv_head" else 1)


@pytest.mark.parametrize("gates", GATES)
def test_tokens_that_leave_run_nothing_above(gates: str) -> None:
    model = converted(gates)
    rows: list[int] = []
    for layer in model.model.layers[4:]:
        layer.mlp.register_forward_hook(lambda module, args, output: rows.append(output[..., 0].numel()))
    output = model(IDS, attention_mask=MASK, logits_to_keep=1, use_cache=True)
    assert sum(rows) == 2 * 3
    layers = given_cache(output).layers
    assert all(isinstance(layer, HeadsLayer) for layer in layers) or gates == "layer"
    rows.clear()
    model(IDS, attention_mask=MASK)
    assert sum(rows) == 2 * 120, "all logits are asked for"


@pytest.mark.parametrize("how", ["greedy", "left", "beams", "chunks"])
@pytest.mark.parametrize("gates", GATES)
def test_it_generates_what_the_full_computation_says(gates: str, how: str) -> None:
    model = converted(gates)
    extra: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    extra |= {"beams": {"num_beams": 3}, "chunks": {"prefill_chunk_size": 16}}.get(how, {})
    mask = MASK if how == "left" else torch.ones_like(MASK)
    made = model.generate(IDS, attention_mask=mask, **extra)
    if how == "beams":
        assert torch.equal(made, model.generate(IDS, attention_mask=mask, use_cache=False, **extra))
        return
    whole = torch.cat([mask, torch.ones(3, 8, dtype=mask.dtype)], 1)
    logits = model(made, attention_mask=whole, use_cache=False, **positions(whole)).logits
    assert torch.equal(logits[:, 39:-1].argmax(-1), made[:, 40:])


def test_a_prompt_longer_than_a_chunk_leaves_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("modlab.execution.packed.CHUNK", 16)
    model = converted()
    ids = torch.randint(3, 500, (2, 33), generator=torch.Generator().manual_seed(3))
    full = model(ids, use_cache=False).logits[:, -1:]
    assert close(model(ids, use_cache=True, logits_to_keep=1).logits, full)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("gates", GATES)
def test_above_the_point_of_leaving_last_tokens_alone_attend(
    gates: str, attention: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither scores nor a mask of any other: the mask of a prompt grows with its square."""
    asked: list[tuple[int, int]] = []

    def noting(module: Any, name: str, layer_of: Any, queries_of: Any) -> None:
        real = getattr(module, name)

        def noted(*args: Any, **kwargs: Any) -> Any:
            asked.append((layer_of(args), queries_of(args)))
            return real(*args, **kwargs)

        monkeypatch.setattr(module, name, noted)

    model = converted(gates, attention)
    cache = modlab.RaggedCache(model)
    noting(stored_keys, "attended", lambda a: cache.layers.index(a[0]), lambda a: a[2].shape[1])
    noting(packed, "_group_mask", lambda a: a[0].layer_idx, lambda a: a[1].index_RS.shape[1])
    model(IDS, attention_mask=MASK, logits_to_keep=1, past_key_values=cache)
    assert {queries for layer, queries in asked if layer < 4} >= {40}
    assert {queries for layer, queries in asked if layer >= 4} == {1}
    assert {layer for layer, _ in asked} == set(range(6))


@pytest.mark.parametrize("what_if", [0.0, 1.0])
@pytest.mark.parametrize("gates", GATES)
def test_routers_and_projections_learn(gates: str, what_if: float) -> None:
    model = converted(gates)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert learnt(model, IDS, what_if=what_if) == added(model)


def test_it_is_saved_loaded_and_traced(tmp_path, word_tokenizer) -> None:
    model = converted(leave_rank=4)
    model.save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    again, _ = modlab.load(tmp_path / "model")
    assert torch.equal(again(IDS).logits, model(IDS).logits)
    assert "the upper layers by position" in (tmp_path / "model" / "README.md").read_text()
    trace = modlab.trace(model, word_tokenizer, " ".join(f"w{i}" for i in range(40)))
    assert len(trace.layers) == 12 and trace.kv_saving > 1
