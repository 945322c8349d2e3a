"""One pass over batches: loss, keep ratio and allocated KV bytes.

Shape letters: B rows, T tokens, V vocabulary.
"""

from __future__ import annotations

import contextlib
import math
import statistics
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from modlab.cache.tracker import KVTracker
from modlab.errors import ModlabError
from modlab.hf.model import device_of, eval_mode
from modlab.measure.pieces import Batch, as_batches, piece_length
from modlab.routing.state import is_converted, record_routing

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LOSS_CHUNK = 512  # tokens whose logits are widened to fp32 at once


@dataclass
class Evaluation:
    """One pass over batches.

    Attributes:
        loss: nats per predicted token, mean over all of them.
        predicted_tokens: how many tokens that mean is over.
        keep_ratio: share of real tokens kept, mean over routed layers (1.0 for a dense model).
        keep_ratio_by_layer: the same for each routed layer.
        kv_bytes: bytes allocated by the caches of all batches, each measured after its forward.
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


def _summed_loss(logits_BTV: torch.Tensor, batch: Batch) -> tuple[float, int]:
    """Sum of next-token losses in nats and how many there are; targets that are padding do not count."""
    targets = batch["input_ids"][:, 1:].to(logits_BTV.device)
    mask = batch.get("attention_mask")
    if mask is not None:  # a target counts if it is real and so is the token it is predicted from
        mask = mask.to(logits_BTV.device).bool()
        targets = targets.masked_fill(~(mask[:, 1:] & mask[:, :-1]), -100)
    total = torch.zeros((), dtype=torch.float64, device=logits_BTV.device)
    for logits, target in zip(
        logits_BTV[:, :-1].split(LOSS_CHUNK, 1), targets.split(LOSS_CHUNK, 1), strict=True
    ):
        # cross_entropy ignores the target -100, which padding was set to above
        total += nn.functional.cross_entropy(logits.flatten(0, 1).float(), target.flatten(), reduction="sum")
    return float(total), int((targets != -100).sum())


def evaluate_batches(model: PreTrainedModel, batches: Iterable[Batch]) -> Evaluation:
    """As `evaluate`, over batches that are made already."""
    result = Evaluation()
    converted = is_converted(model)
    summed, device = 0.0, device_of(model)
    kept: dict[int, int] = {}
    real = 0
    for batch in batches:
        with contextlib.ExitStack() as stack:
            stack.enter_context(eval_mode(model))
            stack.enter_context(torch.no_grad())
            recording = stack.enter_context(record_routing(model)) if converted else None
            kv = stack.enter_context(KVTracker(model))
            logits = model(**{k: v.to(device) for k, v in batch.items()}, use_cache=True).logits
            total, count = _summed_loss(logits, batch)
        summed += total
        result.predicted_tokens += count
        result.kv_bytes += sum(row["kv_bytes"] for row in kv.rows)
        result.dense_kv_bytes += sum(row["dense_kv_bytes"] for row in kv.rows)
        for step in recording.steps if recording else []:
            real += int(step.real.sum())
            for layer, keep in step.keep.items():
                kept[layer] = kept.get(layer, 0) + int(keep.sum())
    if not result.predicted_tokens:
        raise ModlabError("nothing to measure on: no batch has two real tokens in a row.")
    result.loss = summed / result.predicted_tokens
    if kept:
        result.keep_ratio_by_layer = {layer: n / real for layer, n in sorted(kept.items())}
        result.keep_ratio = statistics.fmean(result.keep_ratio_by_layer.values())
    return result


def evaluate(
    model: PreTrainedModel, data: Any, tokenizer: Any = None, seq_len: int | None = None
) -> Evaluation:
    """Loss, keep ratio and cache bytes of a model, dense or converted, at its present thresholds.

    Args:
        model: causal LM; evaluated in eval mode, its mode is restored.
        data: texts or token batches, as `as_batches` takes them.
        tokenizer: for texts.
        seq_len: cut inputs into pieces of this many tokens; by default as `piece_length` says.
    """
    return evaluate_batches(model, as_batches(data, tokenizer, piece_length(model, tokenizer, seq_len)))


def loss(model: PreTrainedModel, tokenizer: Any, texts: Any, seq_len: int | None = None) -> float:
    """Mean next-token loss in nats; `texts` may be token batches, then `tokenizer` may be None."""
    return evaluate(model, texts, tokenizer, seq_len).loss
