"""Where a layer's branches end, found by running it: what the paper's gate multiplies."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from modlab.conversion.survey import survey
from modlab.errors import ModlabError
from modlab.families.tiny_models import tiny_model
from modlab.skips.probe import branch_ends
from tests.helpers.models import dense_llama


def ends(model: nn.Module, layer: int) -> list[str]:
    return branch_ends(model, survey(model).facts[layer])


def test_a_branch_ends_where_the_residual_is_added() -> None:
    assert ends(dense_llama(), 2) == ["self_attn", "mlp"]
    # norms after both branches
    assert ends(tiny_model("gemma2"), 1) == ["post_attention_layernorm", "post_feedforward_layernorm"]


def test_looking_for_the_ends_leaves_modes_hooks_and_gradients_as_they_were() -> None:
    model = dense_llama().train()
    model.model.layers[3].mlp.eval()
    modes = [module.training for module in model.modules()]
    ends(model, 3)
    assert [module.training for module in model.modules()] == modes
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_layer_of_another_form_has_no_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    model = dense_llama()
    layer_class = type(model.model.layers[0])
    forward = layer_class.forward
    monkeypatch.setattr(layer_class, "forward", lambda self, *a, **kw: twice(forward(self, *a, **kw)))
    with pytest.raises(ModlabError, match="gate='paper' needs layers of the form x"):
        ends(model, 0)


def twice(output: torch.Tensor | tuple) -> torch.Tensor | tuple:
    return (output[0] * 2, *output[1:]) if isinstance(output, tuple) else output * 2
