"""Prefill: the prompts of a batch in one line without padding, each layer on the tokens that it keeps.

Shape letters: B rows, T tokens in (padding included), S tokens of all rows in one line, V vocabulary.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from modlab.cache.buffer import SegmentedBuffer
from modlab.engine.attention import PREFILL, CannotCapture, LayerPrefill, LineBlocks
from modlab.engine.compiled import norm_forwards
from modlab.engine.forms import prefill_forwards
from modlab.engine.lending import lent, lent_values, unrouted
from modlab.engine.prefill_layers import PrefillLine
from modlab.engine.ring import RingBuffer
from modlab.hf.anatomy import decoder_of
from modlab.routing.record import ForwardCall
from modlab.routing.state import Routing
from modlab.routing.table import RoutingTable

if TYPE_CHECKING:
    from modlab.engine.engine import Engine


@torch.no_grad()
def prefill(
    engine: Engine, ids_BT: Tensor, mask_BT: Tensor | None, most_older: int | None = None
) -> tuple[Tensor, list[SegmentedBuffer], list[int]]:
    """Runs the prompts.

    Args:
        ids_BT: tokens, long.
        mask_BT: 1 for tokens, 0 for padding; None for no padding.
        most_older: tokens that a row may store besides its ring, where the engine has a budget.

    Returns:
        logits of each row's last token [B, V], one buffer a layer with room for decoding, tokens a row.
    """
    B, T = ids_BT.shape
    real_BT = torch.ones_like(ids_BT, dtype=torch.bool) if mask_BT is None else mask_BT.bool()
    counts: list[int] = [T] * B if mask_BT is None else real_BT.sum(1).tolist()
    logits, parts = [], []
    for rows in lines(counts, engine.line_tokens):
        logits_RV, buffers = _prefill_line(
            engine, ids_BT[rows], real_BT[rows], counts[rows], rows.start, most_older
        )
        logits.append(logits_RV)
        parts.append(buffers)
    if len(parts) == 1:
        return logits[0], parts[0], counts
    # Layer by layer, each part freed at once: at most one layer is held twice.
    buffers = [type(parts[0][0]).joined([part.pop(0) for part in parts]) for _ in engine.layers]
    return torch.cat(logits), buffers, counts


def lines(counts: list[int], line_tokens: int) -> Iterator[slice]:
    """Consecutive rows of at most `line_tokens` tokens, or one longer row."""
    first, tokens = 0, 0
    for row, n in enumerate(counts):
        if row > first and tokens + n > line_tokens:
            yield slice(first, row)
            first, tokens = row, 0
        tokens += n
    yield slice(first, len(counts))


def _prefill_line(
    engine: Engine,
    ids_BT: Tensor,
    real_BT: Tensor,
    counts: list[int],
    first_row: int,
    most_older: int | None,
) -> tuple[Tensor, list[SegmentedBuffer]]:
    B, T = ids_BT.shape
    # A boolean index would ask the host how many there are; it knows.
    at_S = torch.nonzero_static(real_BT.flatten(), size=sum(counts))[:, 0]
    columns_S, rows_S = (at_S % T).to(torch.int32), at_S // T + first_row
    position_1S = (real_BT.long().cumsum(1) - 1).flatten()[at_S][None]
    bounds = F.pad(real_BT.sum(1).cumsum(0), (1, 0))
    ringed = engine.routed if engine.keep_recent else []
    buffers = [RingBuffer() if i in ringed else SegmentedBuffer() for i in range(len(engine.layers))]
    places = bounds.int()
    layers = [LayerPrefill(buffer, counts, columns_S, places, varying=False) for buffer in buffers]
    assert engine.form is not None, "calls are refused before"
    line = PrefillLine(engine.routing, bounds[1:] - 1, LineBlocks(counts, engine.device), most_older)
    forwards = prefill_forwards(engine.form, engine.layers, layers, line)
    if engine.compile is True:
        forwards |= norm_forwards([decoder_of(engine.model), *engine.layers], engine.line_compiler)
    with (
        _flat_call(engine.routing, position_1S, rows_S, T),
        engine.forward_as(PREFILL),
        lent_values(engine.attention, "mod_prefill", layers),
        unrouted(m for m in engine.kept_keys if m not in forwards),
        lent(forwards),
    ):
        ids_1S = ids_BT.flatten()[at_S][None]
        # Where tokens leave, no others than the last ones are there in the end.
        asked = {} if engine.form.above else {"logits_to_keep": bounds[1:] - 1}
        logits = engine.run_model(ids_1S, position_1S, **asked)
    if logits.shape[0] * logits.shape[1] != B:
        raise CannotCapture("its forward does not take logits_to_keep")
    _fill_empty(layers)
    return logits.flatten(0, 1), buffers


@contextlib.contextmanager
def _flat_call(routing: Routing | None, position_1S: Tensor, rows_S: Tensor, columns: int) -> Iterator[None]:
    """Inside this block `Routing.decide` sees the line of all rows as its forward."""
    if routing is None:
        yield
        return
    before, override = routing.call, routing.override
    if isinstance(override, RoutingTable):
        table = override

        def override(layer: int, gate: Tensor, position: Tensor) -> Tensor:
            return table.lookup(layer, rows_S[None], position)

    routing.of_thread.call = ForwardCall(
        torch.ones_like(position_1S, dtype=torch.bool),
        position_1S,
        columns=position_1S[0],
        num_columns=columns,
        cache=None,
        steps=[],
        thresholds=dict(routing.thresholds),
        what_if=False,
        masked=False,
        override=override,
        recent=routing.recent,
    )
    try:
        yield
    finally:
        routing.of_thread.call = before


def _fill_empty(layers: list[LayerPrefill]) -> None:
    """Gives layers that kept nothing a buffer too: the kernels need an address to append to."""
    known = next((layer.buffer for layer in layers if layer.buffer.keys is not None), None)
    if known is None or known.keys is None or known.values is None:
        raise CannotCapture("no attention of it came to the engine's attention function")
    for layer in layers:
        if layer.buffer.keys is None:
            capacities = [layer.buffer.slack(0)] * len(layer.counts)
            layer.buffer.reserve(capacities, known.keys, known.values)


def scratch_buffers(engine: Engine, batch: int) -> list[SegmentedBuffer]:
    """Small buffers to capture with: one prefilled token a row tells the layers' head sizes."""
    ids = torch.zeros(batch, 1, dtype=torch.long, device=engine.device)
    with engine.deciding({layer: torch.ones(1, 1, dtype=torch.bool) for layer in engine.forced}):
        return prefill(engine, ids, None, None if engine.budget is None else 0)[1]
