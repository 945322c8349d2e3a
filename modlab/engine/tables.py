"""What the decoding kernels read: each layer's KV buffers, lengths and routing state, at fixed addresses.

A CUDA graph knows addresses, not tensors. The tables below never move; what they point to may: a KV buffer
that grows is entered again, and the captured graph goes on.

Shape letters: B rows, L layers, G kv heads, H head dim, A gates of a layer, U rows of a layer's cache (B, or
B x G where each KV head has a gate), P positions of a routing table.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from modlab.cache.buffer import SegmentedBuffer
from modlab.cache.int8 import Int8Range
from modlab.engine.choice import Choice
from modlab.engine.ring import Int8Ring, RingBuffer
from modlab.kernels.decode_attention import ADDRESS_SLOTS
from modlab.kernels.ring_budget import RingBudget


@dataclass
class LayerStep:
    """One layer's state, as its attention sees it while decoding.

    Attributes:
        table: int64 [6 + U], addresses, capacity and row starts; see `kernels/decode_attention.py`.
        lengths: int32 [U], tokens stored; the kernels count it up.
        keep: bool [U], rows that run this attention in this step.
        column: int32 [B], column of the new token, shared by all layers.
        ring: where routing decides about the cache alone, which tokens of each row's ring are kept, bool
            [U, W]; then all rows run, and `keep` says whose new token outlives the ring.
        position: long [B, 1], index of the new token among the real ones of its row, shared by all layers.
        gate: of the layer's router, fp32 [U]; None without one.
        budget: what bounds the rows, where routing decides about the cache alone and something does.
        buffer: what `table` points to while a generation is under way.
        int8: what keys and values are measured against, where they are stored in eight bits.
    """

    table: Tensor
    lengths: Tensor
    keep: Tensor
    column: Tensor
    ring: Tensor | None
    position: Tensor
    gate: Tensor | None = None
    budget: RingBudget | None = None
    buffer: SegmentedBuffer | None = None
    int8: Int8Range | None = None

    def stored(self) -> tuple[tuple[Tensor, ...], list[int]]:
        """Keys and values [G, C, H], of codes their steps [G, C, 1] too, and where each row's begin: for
        attention in plain torch."""
        assert self.buffer is not None
        return tuple(getattr(self.buffer, name) for name in self.buffer.contents), self.buffer.starts


@dataclass
class RouterState:
    """One routed layer's decision in this step: gate fp32 [B] or [B, A], keep bool of that shape, any bool
    [1]; its threshold fp32 [1] and what kernels know of a forced table, int64 [3] (`RouterCall.forced_3`).
    """

    gate: Tensor
    keep: Tensor
    any: Tensor
    threshold: Tensor
    forced: Tensor


class Tables:
    """Fixed tables for `batch` rows; `attach` makes them point to one generation's buffers.

    Args:
        num_layers: decoder layers.
        routed: indices of those with a router.
        batch: rows B.
        device: of the model.
        skips_keys: whether a row that skips leaves out attention, and with it the new key and value; False
            where routers decide for MLPs alone.
        recent: W, where routers decide about the cache alone.
        gates: A of each routed layer; one by default.
        keep_first: where rows of a routed layer have a budget, the tokens that it does not touch.
        ranges: of layers that store keys and values in eight bits.
    """

    def __init__(
        self,
        num_layers: int,
        routed: Sequence[int],
        batch: int,
        device: torch.device,
        skips_keys: bool = True,
        recent: int | None = None,
        gates: dict[int, int] | None = None,
        keep_first: int | None = None,
        ranges: Mapping[int, Int8Range] | None = None,
    ) -> None:
        def full(value: int, *shape: int, dtype: torch.dtype) -> Tensor:
            return torch.full(shape, value, dtype=dtype, device=device)

        self.batch, self.device = batch, device
        self.column = full(0, batch, dtype=torch.int32)
        self.position = full(0, batch, 1, dtype=torch.long)
        self.choice = Choice.on(device, batch)
        everyone = full(1, batch, dtype=torch.bool)
        numbers = dict.fromkeys(routed, 1) | (gates or {})
        shapes = {layer: (batch, *[n] * (n > 1)) for layer, n in numbers.items()}
        self.routers = {
            layer: RouterState(
                gate=full(0, *shape, dtype=torch.float32),
                keep=full(0, *shape, dtype=torch.bool),
                any=full(0, 1, dtype=torch.bool),
                threshold=full(0, 1, dtype=torch.float32),
                forced=full(0, 3, dtype=torch.long),
            )
            for layer, shape in shapes.items()
        }

        self.most = full(0, 1, dtype=torch.int32)

        def ring_budget(rows: int) -> RingBudget | None:
            if keep_first is None or not recent:
                return None
            scores = full(0, rows, recent, dtype=torch.float32)
            return RingBudget(scores, full(0, rows, dtype=torch.int32), self.most, keep_first)

        def layer_step(layer: int) -> LayerStep:
            routed_here = layer in self.routers
            keep = self.routers[layer].keep.view(-1) if skips_keys and routed_here else everyone
            return LayerStep(
                table=full(0, ADDRESS_SLOTS + len(keep), dtype=torch.long),
                lengths=full(0, len(keep), dtype=torch.int32),
                keep=keep,
                column=self.column,
                ring=full(0, len(keep), recent, dtype=torch.bool) if recent and routed_here else None,
                position=self.position,
                gate=self.routers[layer].gate.view(-1) if routed_here else None,
                budget=ring_budget(len(keep)) if routed_here else None,
                int8=(ranges or {}).get(layer),
            )

        self.layers = [layer_step(layer) for layer in range(num_layers)]
        self.bounds: list[int] = []
        self.thresholds: dict[int, float] = {}
        self.forced: dict[int, Tensor] = {}

    def attach(
        self,
        buffers: Sequence[SegmentedBuffer],
        column: int,
        positions: list[int],
        ends: Sequence[int] = (),
        pad: int = 0,
    ) -> None:
        """Points the tables to `buffers` (one a layer); the next token stands at `column`, `positions` [B].

        Args:
            ends, pad: tokens that end a row, and what it goes on with; see `Choice`.
        """
        self.column.fill_(column)
        entries = [(self.position, positions), *self.choice.rules(list(ends), pad)]
        for layer, buffer in zip(self.layers, buffers, strict=True):
            layer.buffer = buffer
            entries += [(layer.lengths, buffer.lengths), (layer.table, addresses(buffer))]
            if layer.ring is not None:
                assert isinstance(buffer, RingBuffer)
                layer.ring.copy_(buffer.ring_kept)
                if layer.budget is not None and buffer.ring_scores is not None and buffer.most is not None:
                    layer.budget.scores_UW.copy_(buffer.ring_scores)
                    self.most.fill_(buffer.most - buffer.ring_kept.shape[1])
        self._enter(entries)
        self.bounds = [buffer.room for buffer in buffers]

    def release(self) -> None:
        """Frees the buffers."""
        for layer in self.layers:
            layer.buffer = None

    @property
    def buffers(self) -> list[SegmentedBuffer]:
        """What the tables point to, one a layer; none between generations."""
        return [layer.buffer for layer in self.layers if layer.buffer is not None]

    def reserve(self) -> None:
        """Makes sure that every layer can take one more token of every row.

        The host does not know which rows kept a token, so it counts every step as one for all rows; where
        that count meets a capacity it reads the true lengths (the one host sync, once in many steps).
        """
        if min(self.bounds) > 0:
            self.bounds = [room - 1 for room in self.bounds]
            return
        self.read_lengths()
        moved: list[tuple[Tensor, list[int]]] = []
        for index, (layer, buffer) in enumerate(zip(self.layers, self.buffers, strict=True)):
            if buffer.room < 1:
                buffer.grow()
                moved.append((layer.table, addresses(buffer)))
            self.bounds[index] = buffer.room - 1
        self._enter(moved)

    def read_lengths(self) -> None:
        """Brings the buffers' own lengths up to date (a host sync)."""
        lengths = torch.cat([layer.lengths for layer in self.layers]).tolist()
        for layer, buffer in zip(self.layers, self.buffers, strict=True):
            buffer.lengths, lengths = lengths[: len(layer.lengths)], lengths[len(layer.lengths) :]

    def set_thresholds(self, thresholds: dict[int, float]) -> None:
        """Takes over live thresholds; nothing is copied while they stand still."""
        if thresholds != self.thresholds:
            for layer, router in self.routers.items():
                router.threshold.fill_(thresholds[layer])
            self.thresholds = dict(thresholds)

    def force(self, tables: dict[int, Tensor]) -> None:
        """Lets tables bool [B, P] or [B, P, A] decide instead of gates; an empty dict gives the decision
        back."""
        if not tables and not self.forced:
            return
        self.forced = tables  # kept alive: the kernels hold addresses only
        self._enter([(router.forced, _place(tables.get(layer))) for layer, router in self.routers.items()])

    def _enter(self, entries: list[tuple[Tensor, list[int]]]) -> None:
        """Writes numbers of the host into tables, all by one transfer that nobody waits for.

        One blocking copy a table would hold the host until a prefill is done, and then cost as many round
        trips.
        """
        if not entries:
            return
        cuda = self.device.type == "cuda"
        numbers = torch.tensor([n for _, values in entries for n in values], pin_memory=cuda)
        numbers = numbers.to(self.device, non_blocking=cuda)
        parts = numbers.split([len(values) for _, values in entries])
        targets = [target for target, _ in entries]
        torch._foreach_copy_(targets, [part.view_as(t) for part, t in zip(parts, targets, strict=True)])


def addresses(buffer: SegmentedBuffer) -> list[int]:
    """What a layer's address table says of `buffer`; see `kernels/decode_attention.py`."""
    notes = buffer.scores if isinstance(buffer, RingBuffer) else buffer.columns
    steps = (buffer.key_steps, buffer.value_steps) if isinstance(buffer, Int8Ring) else (None, None)
    *at, key_steps, value_steps = (
        0 if t is None else t.data_ptr() for t in (buffer.keys, buffer.values, notes, *steps)
    )
    return [*at, buffer.capacity, key_steps, value_steps, *buffer.starts]


def _place(table: Tensor | None) -> list[int]:
    """What `RouterCall.forced_3` says of a routing table."""
    if table is None:
        return [0, 0, 0]
    return [table.data_ptr(), table.shape[1], table.shape[2] if table.dim() == 3 else 1]
