"""Copies of projections above the point of leaving, in closed form."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import modlab
from modlab.families.tiny_models import tiny_model
from modlab.hf.anatomy import decoder_layers
from modlab.saving.routers import tensors_of
from modlab.training.fit_projections import fit_projections
from tests.helpers.models import dense_llama, leaving_llama, scatter_gates

ROWS = torch.randint(3, 500, (24, 40), generator=torch.Generator().manual_seed(0))


def leaving(skip: str, **fields: Any) -> Any:
    return modlab.convert(dense_llama(), modlab.MoDConfig(skip=skip, **fields)).eval()  # type: ignore[arg-type]


@torch.no_grad()
def divergence(model: Any) -> float:
    """KL of held-out rows to the dense self."""
    ids = torch.randint(3, 500, (4, 40), generator=torch.Generator().manual_seed(1))
    said = model(ids, use_cache=False).logits.log_softmax(-1)
    with modlab.routing_off(model):
        told = model(ids, use_cache=False).logits.log_softmax(-1)
    return (told.exp() * (told - said)).sum(-1).mean().item()


@pytest.mark.parametrize("rank", [0, 24, 200])
@pytest.mark.parametrize("skip", ["prompt", "kv+prompt"])
def test_fitted_copies_say_more_of_what_the_dense_model_says(skip: str, rank: int) -> None:
    model = leaving(skip, leave_rank=rank)
    before = divergence(model)
    found = fit_projections(model, ROWS)
    assert list(found) == [4, 5] and found[4] > 0.99, "the first layer above reads its own state"
    assert 0.2 < found[5] <= 1
    assert divergence(model) < 0.7 * before


def test_nothing_but_keys_and_values_above_moves() -> None:
    model = leaving("kv+prompt", layers="all")
    before = {name: tensor.clone() for name, tensor in tensors_of(model).items()}
    fit_projections(model, ROWS[:4])
    moved = {name for name, tensor in tensors_of(model).items() if not torch.equal(tensor, before[name])}
    assert moved and all("mod_projections.k" in name or "mod_projections.v" in name for name in moved)
    assert all(int(name.split(".")[2]) == 5 for name in moved if "layers.4." not in name)


@pytest.mark.parametrize("hidden", [0, 4])
@pytest.mark.parametrize("gates", ["layer", "kv_head"])
def test_routers_above_say_what_they_said_of_their_own_state(gates: str, hidden: int) -> None:
    """On the state where tokens leave, as far as a linear map of it can."""
    model = scatter_gates(leaving("kv+prompt", layers="all", gates=gates, router_hidden=hidden))
    layers, states = decoder_layers(model), {}

    def note(index: int) -> Any:
        return lambda module, args, output: states.update({index: args[0]})

    hooks = [layers[i].register_forward_hook(note(i)) for i in (4, 5)]

    @torch.no_grad()
    def gap() -> float:
        with modlab.routing_off(model):
            model(ROWS[:6], use_cache=False)
        return float((want - layers[5].mod_router(states[4])).square().mean())

    with modlab.routing_off(model), torch.no_grad():
        model(ROWS[:6], use_cache=False)
        want = layers[5].mod_router(states[5])
    before = gap()
    fit_projections(model, ROWS)
    assert gap() < 0.5 * before
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize("model_type", ["qwen2", "qwen3", "olmo2"])
def test_families_with_biases_and_norms(model_type: str) -> None:
    dense = tiny_model(model_type)
    vocabulary = dense.get_input_embeddings().weight.shape[0]
    model = modlab.convert(dense, modlab.MoDConfig(skip="prompt")).eval()
    found = fit_projections(model, ROWS % vocabulary)
    assert all(0 <= share <= 1 + 1e-6 for share in found.values())


def test_what_has_no_projections_is_refused() -> None:
    with pytest.raises(modlab.ModlabError, match="no token leaves"):
        fit_projections(leaving("kv"), ROWS)
    with pytest.raises(modlab.ModlabError, match="no rows"):
        fit_projections(leaving_llama("prompt"), [])
