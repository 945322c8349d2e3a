"""Routing decided beforehand: which tokens each layer keeps, as a table that a GPU kernel can read.

Shape letters: B batch rows, T tokens in, P positions, G gates of a layer.
"""

from __future__ import annotations

import torch
from torch import Tensor

from modlab.errors import ModlabError


class RoutingTable:
    """A function for `routing_override` that keeps what a table says: to replay, to edit, to measure.

    Unlike any other function it also works under `enable_fast_generation`.

    Args:
        keep: by routed layer, bool [B, P]: whether row b keeps its token at position p (counted among the
            row's real tokens); [B, P, G] where each gate of a layer has an answer of its own. Rows of a batch
            of 1 serve any batch.

    Raises:
        ModlabError: tables of other types or of different shapes; when it is used, a layer that it lacks, or
            a batch of another number of rows.
    """

    def __init__(self, keep: dict[int, Tensor]) -> None:
        shapes = {tuple(table.shape) for table in keep.values()}
        if len(shapes) != 1 or any(t.dtype != torch.bool or t.dim() not in (2, 3) for t in keep.values()):
            raise ModlabError(
                "a RoutingTable takes bool tensors [rows, positions] or [rows, positions, gates], all of one "
                "shape."
            )
        self.keep = keep
        self.rows, self.positions, *_ = shapes.pop()

    def lookup(self, layer_idx: int, row: Tensor, position: Tensor) -> Tensor:
        """Keep of the tokens at `position` (long, any shape) of rows `row` (broadcastable), with the gates as
        a last axis where the table has them."""
        table = self._of(layer_idx)
        if table.device != position.device:
            table = self.keep[layer_idx] = table.to(position.device)
        return table[row.clamp_max(self.rows - 1), position.clamp(0, self.positions - 1)]

    def __call__(self, layer_idx: int, gate: Tensor, position_ids: Tensor) -> Tensor:
        """Keep [B, T] or [B, T, G] of the tokens at `position_ids` [B, T]; the last position serves all later
        ones."""
        self._check_rows(gate.shape[0])
        rows_B1 = torch.arange(gate.shape[0], device=position_ids.device)[:, None]
        return self.lookup(layer_idx, rows_B1, position_ids)

    def _of(self, layer_idx: int) -> Tensor:
        if layer_idx not in self.keep:
            raise ModlabError(f"the RoutingTable has no layer {layer_idx}; it has {sorted(self.keep)}.")
        return self.keep[layer_idx]

    def _check_rows(self, batch: int) -> None:
        if self.rows not in (1, batch):
            raise ModlabError(f"the RoutingTable has {self.rows} rows, the batch has {batch}.")

    def for_rows(self, layer_idx: int, batch: int, device: torch.device) -> Tensor:
        """The layer's table, bool [B, P] or [B, P, G], contiguous on `device`."""
        self._check_rows(batch)
        table = self._of(layer_idx).to(device)
        return table.expand(batch, *table.shape[1:]).contiguous()
