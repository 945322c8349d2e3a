"""Prefill: the prompts of a batch in one line without padding, each layer on the tokens that it keeps.

Shape letters: B rows, T tokens in (padding included), S tokens of all rows in one line, V vocabulary.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from modlab.cache.buffer import SegmentedBuffer
from modlab.engine.attention import PREFILL, CannotCapture, LayerPrefill, LineBlocks
from modlab.engine.compiled import MAX_COMPILED, norm_forwards
from modlab.engine.compiled_layers import LineLayers, NotCompiled
from modlab.engine.deferred import DeferredLayouts
from modlab.engine.forms import prefill_forwards
from modlab.engine.lending import lent, lent_values, unrouted
from modlab.engine.prefill_layers import PrefillLine
from modlab.engine.ring import Int8Ring, RingBuffer
from modlab.hf.anatomy import decoder_of
from modlab.kernels.aside import nothing_left_aside
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

    Raises:
        CannotCapture: the model does not run as the engine needs it; the message says where.
        KernelRefused: the GPU has no room for a kernel.
    """
    B, T = ids_BT.shape
    real_BT = torch.ones_like(ids_BT, dtype=torch.bool) if mask_BT is None else mask_BT.bool()
    counts: list[int] = [T] * B if mask_BT is None else real_BT.sum(1).tolist()
    logits, parts = [], []
    for rows in lines(counts, engine.line_tokens):
        prompts = Prompts(ids_BT[rows], real_BT[rows], counts[rows], rows.start, most_older)
        logits_RV, buffers = _prefill_line(engine, prompts)
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


@dataclass(frozen=True)
class Prompts:
    """Rows of a batch that run in one line.

    Attributes:
        ids_BT: tokens, long.
        real_BT: False for padding.
        counts: tokens of each row.
        first_row: the place of the first one in the batch.
        most_older: tokens that a row may store besides its ring; None for no bound.
    """

    ids_BT: Tensor
    real_BT: Tensor
    counts: list[int]
    first_row: int
    most_older: int | None


def _prefill_line(engine: Engine, prompts: Prompts) -> tuple[Tensor, list[SegmentedBuffer]]:
    """Logits of each row's last token, and a buffer a layer; of one row perhaps on guesses (`guesses.py`)."""
    counts = prompts.counts
    guesses = engine.guesses if len(counts) == 1 else None
    sizes = {} if guesses is None else guesses.of(counts[0])
    logits, buffers, kept = _run_line(engine, prompts, sizes)
    if guesses is None:
        return logits, buffers
    right = all(kept[layer] <= size for layer, size in sizes.items())
    guesses.right += bool(sizes) and right
    guesses.wrong += not right
    if not right:
        del logits, buffers  # not to be held next to the new ones
        logits, buffers, kept = _run_line(engine, prompts, {})
    else:
        _forget_copies(buffers, sizes, kept)
    guesses.learn(kept, counts[0])
    return logits, buffers


def _forget_copies(buffers: list[SegmentedBuffer], sizes: dict[int, int], kept: dict[int, int]) -> None:
    """Of one row's layers that ran on guesses, leaves what they have kept, with room as without a guess."""
    for layer, size in sizes.items():
        buffer, count = buffers[layer], kept[layer]
        if buffer.lengths == [size] and count < size:  # an MLP's layer stores all tokens
            buffer.lengths = [count]
            buffer.rearrange([0], [count + buffer.slack(count)])


def _run_line(
    engine: Engine, prompts: Prompts, guesses: dict[int, int]
) -> tuple[Tensor, list[SegmentedBuffer], dict[int, int]]:
    """The same with what the layers have kept, as far as packed layers go; `guesses` are tokens that layers
    run."""
    with contextlib.suppress(NotCompiled):  # which holds what it has run, and is gone when the block is
        return _run_line_once(engine, prompts, guesses)
    return _run_line_once(engine, prompts, guesses)  # as it is: what failed is noted


def _run_line_once(
    engine: Engine, prompts: Prompts, guesses: dict[int, int]
) -> tuple[Tensor, list[SegmentedBuffer], dict[int, int]]:
    ids_BT, real_BT, counts = prompts.ids_BT, prompts.real_BT, prompts.counts
    B, T = ids_BT.shape
    # A boolean index would ask the host how many there are; it knows.
    at_S = torch.nonzero_static(real_BT.flatten(), size=sum(counts))[:, 0]
    columns_S, rows_S = (at_S % T).to(torch.int32), at_S // T + prompts.first_row
    position_1S = (real_BT.long().cumsum(1) - 1).flatten()[at_S][None]
    bounds = F.pad(real_BT.sum(1).cumsum(0), (1, 0))
    ringed, ranges = engine.routed if engine.keep_recent else [], engine.ranges
    kinds = dict.fromkeys(ringed, RingBuffer) | dict.fromkeys(ranges, Int8Ring)
    buffers = [kinds.get(i, SegmentedBuffer)() for i in range(len(engine.layers))]
    places = bounds.int()
    deferred = DeferredLayouts(counts) if sum(counts) <= engine.defer_tokens else None
    layers = [
        LayerPrefill(b, counts, columns_S, places, varying=False, deferred=deferred, int8=ranges.get(i))
        for i, b in enumerate(buffers)
    ]
    assert engine.form is not None, "calls are refused before"
    blocks = LineBlocks(counts, engine.device)
    compiled = LineLayers(engine.line_compiler, sum(counts)) if engine.compile is True else None
    line = PrefillLine(engine.routing, bounds[1:] - 1, blocks, prompts.most_older, compiled, guesses)
    forwards = prefill_forwards(engine.form, engine.layers, layers, line)
    if compiled is not None:
        forwards |= norm_forwards([decoder_of(engine.model)], compiled.compiler)
    limits: dict[str, Any] = {} if compiled is None else {"recompile_limit": MAX_COMPILED}
    with (
        torch._dynamo.config.patch(limits) if limits else contextlib.nullcontext(),
        _flat_call(engine.routing, position_1S, rows_S, T),
        engine.forward_as(PREFILL),
        lent_values(engine.attention, "mod_prefill", layers),
        unrouted(m for m in engine.kept_keys if m not in forwards),
        lent(forwards),
        nothing_left_aside(),
    ):
        ids_1S = ids_BT.flatten()[at_S][None]
        # Where tokens leave, no others than the last ones are there in the end.
        asked = {} if engine.form.above else {"logits_to_keep": bounds[1:] - 1}
        logits = engine.run_model(ids_1S, position_1S, **asked)
    if logits.shape[0] * logits.shape[1] != B:
        raise CannotCapture("its forward does not take logits_to_keep")
    if deferred is not None:
        deferred.settle()
    _fill_empty(layers)
    kept = {layer: count for layer, count in line.kept.items() if isinstance(count, int)}
    if guesses:  # the host waits here, once
        counted = torch.stack([torch.as_tensor(line.kept[layer]) for layer in guesses])
        kept |= dict(zip(guesses, counted.tolist(), strict=True))
    return logits.flatten(0, 1), buffers, kept


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
        unpadded=True,
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
