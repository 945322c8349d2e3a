"""Controls decide in the product's own forward, at the gates' stored keys, and leave no trace."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from benchmarks.real_models.measured import fixed
from benchmarks.real_models.measured.product import Product
from modlab.errors import ModlabError

IDS = torch.randint(320, (2, 400), generator=torch.Generator().manual_seed(0))
GATES = {"keys": 0.25, "keep_by_gate": [[0.9, 0.1], [0.3, 0.2]]}


def kept(product: Product, name: str) -> list[torch.Tensor]:
    with fixed.control(product, name, GATES, 400):
        return product.gates(IDS)[1]


@pytest.mark.parametrize("name", fixed.NAMES)
def test_a_control_keeps_its_share(product: Product, name: str) -> None:
    before, config = product.states(IDS), product.routing.config
    share = torch.stack(kept(product, name))[:, :, :384].float().mean((1, 2))  # [L, G]
    assert torch.equal(product.states(IDS), before) and product.routing.config is config
    assert not product.routing.override and not any(
        layer._forward_pre_hooks for layer in product.decoder.layers
    )
    if name == "window alone":
        assert share.max() == product.first / 384
    elif name == "whole heads":
        assert share[0, 0] == 1 and share.flatten()[1:].max() < 0.02
    elif name == "whole layers":
        assert abs(share - share[:, :1]).max() == 0
    else:
        wanted = (0.25 * 400 - 16) / 384
        assert abs(share.mean() - wanted) < 0.03
        order = {"chance": 0.05, "key norm": 0.05}.get(name)
        assert order is None or abs(share - wanted).max() < order


def test_the_window_of_a_control_is_wider(product: Product) -> None:
    seen = []
    with fixed.control(product, "window alone", GATES, 400):
        seen.append(product.window)
    assert seen == [400 * 0.25 - product.first] and product.window == 16


def test_keys_of_smallest_norm_stay(product: Product) -> None:
    found = kept(product, "key norm")[0][0, product.first : 384]  # of layer 0, which nothing precedes
    layer = product.decoder.layers[0]
    entering = product.decoder.embed_tokens(IDS[:1])
    norm = layer.self_attn.k_proj(layer.input_layernorm(entering)).view(400, 2, -1).norm(dim=-1)[4:384]
    for head in range(2):
        here = found[:, head]
        assert norm[here, head].max() <= norm[~here, head].min()


def test_gates_of_a_layer_have_no_heads_to_choose(product: Product) -> None:
    with pytest.raises(ModlabError, match="no control 'whole heads'"):
        with fixed.control(product, "whole heads", {"keys": 0.25, "keep_by_gate": [[0.9], [0.1]]}, 400):
            pass
    assert np.isfinite(GATES["keys"])
