"""Forced routing, batches to run under it, and the comparison of packed execution with its reference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from modlab.routing.state import masked_execution

IDS = torch.randint(3, 512, (3, 40), generator=torch.Generator().manual_seed(1))
"""Three rows for the tiny Llama."""
MASK = torch.ones_like(IDS)
"""Their attention mask: row 0 is full, the others are padded on the left."""
MASK[1, :9] = 0
MASK[2, :21] = 0

ODD = 33
"""Columns of the batches that `inputs` makes."""


def random_routing(share: float = 0.4) -> Callable[..., torch.Tensor]:
    """Keeps a token by its layer and its index in the row: the same tokens in any batch, padding and
    chunking."""

    def decide(layer_idx, gate, position_ids):
        table = torch.rand(4096, generator=torch.Generator().manual_seed(layer_idx)) < share
        return table[position_ids.clamp(min=0)]

    return decide


def expected_kept(model: Any, mask: torch.Tensor) -> torch.Tensor:
    """Tokens that `random_routing()` keeps in each layer and row, [L, B]."""
    rows = []
    for layer in range(model.config.num_hidden_layers):
        if layer in model.mod.layers:
            keep = random_routing()(layer, None, mask.cumsum(1) - 1) & mask.bool()
            rows.append(keep.sum(1))
        else:
            rows.append(torch.full((len(mask),), mask.shape[1]))
    return torch.stack(rows)


def inputs(model: Any, padding: str) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Ids and mask of three rows ("one row": of one) padded as it says: none, left or right."""
    vocab = model.get_input_embeddings().num_embeddings
    rows = 1 if padding == "one row" else 3
    ids = torch.randint(3, vocab, (rows, ODD), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    if padding == "left":
        mask[1, :8], mask[2, :20] = 0, 0
    elif padding == "right":
        mask[1, -8:], mask[2, -20:] = 0, 0
    return ids, None if padding in ("one row", "none") else mask


def positions(mask: torch.Tensor | None) -> dict[str, torch.Tensor]:
    """What `generate` passes for a padded batch."""
    return {} if mask is None else {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)}


def assert_same(got: torch.Tensor, expected: torch.Tensor, mask: torch.Tensor | None) -> None:
    """Equal within fp32 rounding wherever the mask says that a token is real."""
    real = slice(None) if mask is None else mask.bool()
    torch.testing.assert_close(got[real], expected[real], rtol=1e-4, atol=2e-5)


def assert_packed_is_masked(model: Any, ids: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Holds packed execution, without a cache and with one, against the masked reference; its logits."""
    with masked_execution(model):
        expected = model(ids, attention_mask=mask, use_cache=False).logits
    assert_same(model(ids, attention_mask=mask, use_cache=False).logits, expected, mask)
    assert_same(model(ids, attention_mask=mask, use_cache=True).logits, expected, mask)
    return expected
