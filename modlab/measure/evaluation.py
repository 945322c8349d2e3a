"""One pass over batches: loss, keep ratio and allocated KV bytes.

Shape letters: B rows, T tokens, V vocabulary.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import statistics
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from modlab.cache.tracker import KVTracker
from modlab.data.batches import IGNORE, Batch
from modlab.errors import ModlabError, check_count
from modlab.hf.logits import LOSS_CHUNK
from modlab.hf.model import device_of, eval_mode
from modlab.measure.pieces import iter_batches_for
from modlab.routing.record import kept_share
from modlab.routing.state import is_converted, record_routing, routing_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass
class Evaluation:
    """One pass over batches.

    Attributes:
        loss: nats per predicted token, mean over all of them.
        predicted_tokens: how many tokens that mean is over.
        keep_ratio: share of real tokens kept, mean over routed layers (1.0 for a dense model).
        keep_ratio_by_layer: the same for each routed layer.
        kv_bytes: bytes allocated by the caches of all batches, each measured after its forward; 0 if they
            were not to be filled.
        dense_kv_bytes: bytes of dense caches for the same tokens.
        source: what a published figure carries, filled in by who knows it: data, command, date, device ...
    """

    loss: float = math.nan
    predicted_tokens: int = 0
    keep_ratio: float = 1.0
    keep_ratio_by_layer: dict[int, float] = field(default_factory=dict)
    kv_bytes: int = 0
    dense_kv_bytes: int = 0
    source: dict[str, Any] = field(default_factory=dict)

    @property
    def perplexity(self) -> float:
        """exp(loss)."""
        return math.exp(self.loss)

    @property
    def kv_saving(self) -> float:
        """How many times smaller the allocated caches are than dense ones."""
        return self.dense_kv_bytes / self.kv_bytes


def targets_of(batch: Batch) -> torch.Tensor:
    """What each token but the last has to predict: long [B, T-1], -100 where nothing counts.

    A prediction counts if its target is real, so is the token that it is made from, and the target's label
    is not -100. The target is the label, or the next token where the batch has no labels.
    """
    targets = batch.get("labels", batch["input_ids"])[:, 1:]
    mask = batch.get("attention_mask")
    if mask is None:
        return targets
    real = mask.bool()
    return targets.masked_fill(~(real[:, 1:] & real[:, :-1]), IGNORE)


def _summed_loss(logits_BTV: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Sum over the targets [B, T-1] that count of their losses in nats, scalar."""
    step = max(1, LOSS_CHUNK // len(targets))
    chunks = zip(logits_BTV[:, :-1].split(step, 1), targets.split(step, 1), strict=True)
    return sum(
        (
            nn.functional.cross_entropy(logits.flatten(0, 1).float(), target.flatten(), reduction="sum")
            for logits, target in chunks
        ),
        start=torch.zeros((), dtype=_summing_dtype(targets.device), device=targets.device),
    )


def _summing_dtype(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64  # MPS has no float64


def _share(batches: Iterable[Batch], rank: int, world: int) -> Iterator[tuple[Batch, bool]]:
    """This rank's batches, each with whether it counts.

    Batch i goes to rank i % world. Where the last round has too few, the ranks left over run one of them
    again without counting it: sharded models forward on all ranks together.
    """
    source = iter(batches)
    while group := list(itertools.islice(source, world)):
        yield (group[rank], True) if rank < len(group) else (group[0], False)


def evaluate_batches(
    model: PreTrainedModel,
    batches: Iterable[Batch],
    *,
    max_batches: int = 0,
    cache: bool = True,
    accelerator: Any = None,
    autocast: Callable[[], contextlib.AbstractContextManager[Any]] | None = None,
    forward: Callable[..., Any] | None = None,
) -> Evaluation:
    """As `evaluate`, over batches that are made already."""
    check_count("max_batches", max_batches, 0)
    routed = is_converted(model) and not routing_of(model).is_off
    layers: list[int] = list(routing_of(model).layers) if routed else []
    device = device_of(model)
    world, rank = (accelerator.num_processes, accelerator.process_index) if accelerator else (1, 0)
    # loss, predicted tokens, bytes, bytes of dense caches, real tokens, tokens kept by each routed layer
    sums = torch.zeros(5 + len(layers), dtype=_summing_dtype(device), device=device)
    for batch, counts in _share(itertools.islice(batches, max_batches or None), rank, world):
        batch = {name: value.to(device) for name, value in batch.items()}
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        with contextlib.ExitStack() as stack:
            stack.enter_context(eval_mode(model))
            stack.enter_context(torch.no_grad())
            stack.enter_context(autocast() if autocast else contextlib.nullcontext())
            recording = stack.enter_context(record_routing(model)) if layers else None
            kv = stack.enter_context(KVTracker(model)) if cache else None
            logits = (forward or model)(**inputs, use_cache=cache).logits
            if not counts:
                continue
            targets = targets_of(batch).to(logits.device)
            sums[0] += _summed_loss(logits, targets).to(device)
            sums[1] += (targets != IGNORE).sum().to(device)
        for row in kv.rows if kv else []:
            sums[2] += row["kv_bytes"]
            sums[3] += row["dense_kv_bytes"]
        for step in recording.steps if recording else []:
            sums[4] += step.real.sum()
            for i, layer in enumerate(layers, 5):
                sums[i] += kept_share(step.keep[layer]).sum()
    if world > 1:
        sums = accelerator.reduce(sums, "sum")
    return _evaluation(sums.tolist(), layers)


def _evaluation(sums: list[float], layers: list[int]) -> Evaluation:
    total, predicted, kv_bytes, dense_kv_bytes, real, *kept = sums
    if not predicted:
        raise ModlabError(
            "nothing to measure on: no batch has two real tokens in a row, or every label is -100."
        )
    result = Evaluation(
        loss=total / predicted,
        predicted_tokens=int(predicted),
        kv_bytes=int(kv_bytes),
        dense_kv_bytes=int(dense_kv_bytes),
    )
    if layers:
        result.keep_ratio_by_layer = {layer: n / real for layer, n in zip(layers, kept, strict=True)}
        result.keep_ratio = statistics.fmean(result.keep_ratio_by_layer.values())
    return result


def evaluate(
    model: PreTrainedModel,
    data: Any,
    tokenizer: Any = None,
    seq_len: int | None = None,
    *,
    batch_size: int | None = None,
    max_batches: int = 0,
    cache: bool = True,
    accelerator: Any = None,
    autocast: Callable[[], contextlib.AbstractContextManager[Any]] | None = None,
    forward: Callable[..., Any] | None = None,
) -> Evaluation:
    """Loss, keep ratio and cache bytes of a model, dense or converted, at its present thresholds.

    The one held-out loss: of every prediction whose target is real, made from a real token, and whose label
    (where the data has labels) is not -100.

    Args:
        model: causal LM; evaluated in eval mode, afterwards each of its modules is in its own mode again.
        data: texts or token batches, as `as_batches` takes them.
        tokenizer: for texts.
        seq_len: cut inputs into pieces of this many tokens; by default as `piece_length` says.
        batch_size: rows a forward: single rows are joined, larger batches split; None takes them as they are.
        max_batches: stop after so many batches, over all processes; 0 for all.
        cache: also fill the caches, and measure them; without, the two counts of bytes are 0.
        accelerator: an `accelerate.Accelerator`: its processes share the batches, and each gets the result of
            all of them. All have to pass the same data.
        autocast: gives the context that forwards run in.
        forward: called in place of the model, with its keywords: a wrapped or uncompiled forward.

    Raises:
        ModlabError: nothing in `data` to predict, or data that `as_batches` refuses.
    """
    return evaluate_batches(
        model,
        iter_batches_for(model, data, tokenizer, seq_len, batch_size),
        max_batches=max_batches,
        cache=cache,
        accelerator=accelerator,
        autocast=autocast,
        forward=forward,
    )


def loss(model: PreTrainedModel, tokenizer: Any, texts: Any, seq_len: int | None = None) -> float:
    """Mean next-token loss in nats; `texts` may be token batches, then `tokenizer` may be None."""
    return evaluate(model, texts, tokenizer, seq_len).loss
