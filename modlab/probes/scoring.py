"""Many rows through a model: the loss of chosen tokens, whether each was the likeliest, and who was kept.

Shape letters: M rows in all, B rows of one forward, T tokens, C chosen columns, V vocabulary.
"""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from modlab.data.batches import check_vocabulary
from modlab.errors import ModlabError
from modlab.hf.arguments import forward_signature
from modlab.hf.logits import LOSS_CHUNK
from modlab.hf.model import device_of, eval_mode, vocabulary_size
from modlab.hf.ranks import over_ranks
from modlab.routing.record import kept_share
from modlab.routing.state import is_converted, record_routing

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass
class Scores:
    """What a model made of M rows; tensors are on the CPU.

    Attributes:
        loss: fp32 [M, C], nats of each chosen token given those before it; NaN past the end of a row.
        correct: bool [M, C], whether the token was the likeliest one, as greedy search picks it.
        real: bool [M, T], False past the end of a row.
        keep: share of each routed layer's gates that keep a token, [M, T]; empty for a dense model.
    """

    loss: Tensor
    correct: Tensor
    real: Tensor
    keep: dict[int, Tensor] = field(default_factory=dict)

    def keep_ratio_by_layer(self, rows: int | slice, columns: slice) -> dict[int, float]:
        """Share of the real tokens of these rows and columns that each routed layer kept."""
        count = max(1, int(self.real[rows, columns].sum()))
        return {layer: float(keep[rows, columns].sum()) / count for layer, keep in self.keep.items()}


def mean_keep_ratio(by_layer: dict[int, float]) -> float:
    """Mean over routed layers; 1.0 for a dense model."""
    return statistics.fmean(by_layer.values()) if by_layer else 1.0


def score(
    model: PreTrainedModel,
    rows: Sequence[Tensor],
    columns: Sequence[int],
    *,
    batch_size: int,
    bar: Any = None,
    accelerator: Any = None,
) -> Scores:
    """Runs rows through the model, padded on the right where their lengths differ.

    Args:
        model: causal LM, dense or converted; runs in eval mode, its mode is restored.
        rows: long [T], each of its own length.
        columns: which tokens of a row are scored, ascending, none of them 0: the first token of a row is
            predicted from nothing. Only their logits are made, where the model's class allows it.
        batch_size: rows of one forward.
        bar: a tqdm bar that counts rows.
        accelerator: an `accelerate.Accelerator`: its processes share the forwards, and each gets all scores.
    """
    if batch_size < 1:
        raise ModlabError(f"batch_size={batch_size}: at least one row a forward is needed.")
    check_vocabulary({"input_ids": torch.cat(list(rows))}, vocabulary_size(model), "what is asked")
    lengths_M = torch.tensor([len(row) for row in rows])
    T, column_C = int(lengths_M.max()), torch.tensor(columns)
    scores = Scores(
        loss=torch.full((len(rows), len(columns)), torch.nan),
        correct=torch.zeros(len(rows), len(columns), dtype=torch.bool),
        real=torch.arange(T) < lengths_M[:, None],
    )
    device = device_of(model)

    def judged(here: slice) -> tuple[Tensor, Tensor, dict[int, Tensor]]:
        ids_BT = pad_sequence(list(rows[here]), batch_first=True)
        width = ids_BT.shape[1]
        real_BT = scores.real[here, :width]
        column_c = column_C[column_C < width]
        with contextlib.ExitStack() as stack:
            stack.enter_context(eval_mode(model))
            stack.enter_context(torch.no_grad())
            recording = stack.enter_context(record_routing(model)) if is_converted(model) else None
            batch = {"input_ids": ids_BT.to(device)}
            if not bool(real_BT.all()):
                batch["attention_mask"] = real_BT.long().to(device)
            logits_BcV = _logits(model, batch, (column_c - 1).to(device))
        target_Bc = ids_BT[:, column_c]
        loss_Bc, correct_Bc = _judged(logits_BcV, target_Bc.to(logits_BcV.device))
        scored_Bc = real_BT[:, column_c]
        steps = recording.steps if recording else []
        kept = {layer: kept_share(keep_BT).cpu() for step in steps for layer, keep_BT in step.keep.items()}
        return loss_Bc.masked_fill(~scored_Bc, torch.nan), correct_Bc & scored_Bc, kept

    parts = [slice(i, min(i + batch_size, len(rows))) for i in range(0, len(rows), batch_size)]
    found = over_ranks(judged, parts, accelerator, bar=bar, size=lambda part: part.stop - part.start)
    for here, (loss_Bc, correct_Bc, kept) in zip(parts, found, strict=True):
        width = int(lengths_M[here].max())
        scores.loss[here, column_C < width] = loss_Bc
        scores.correct[here, column_C < width] = correct_Bc
        for layer, share_BT in kept.items():
            kept_NT = scores.keep.setdefault(layer, torch.zeros(scores.real.shape))
            kept_NT[here, :width] = share_BT
    scores.keep = dict(sorted(scores.keep.items()))
    return scores


def _logits(model: Any, batch: dict[str, Tensor], column_c: Tensor) -> Tensor:
    """Logits [B, c, V] of some columns; the model is asked for these only, since all may be gigabytes."""
    model_class: Any = type(model)
    asked = "logits_to_keep" in forward_signature(model_class).parameters
    only = {"logits_to_keep": column_c} if asked else {}
    logits: Tensor = model(**batch, use_cache=False, **only).logits
    return logits if logits.shape[1] == len(column_c) else logits[:, column_c]


def _judged(logits_BcV: Tensor, target_Bc: Tensor) -> tuple[Tensor, Tensor]:
    """Loss fp32 [B, c] and whether the target is the argmax, bool [B, c]; widened to fp32 piece by piece."""
    losses, correct = [], []
    pieces = zip(
        logits_BcV.flatten(0, 1).split(LOSS_CHUNK), target_Bc.flatten().split(LOSS_CHUNK), strict=True
    )
    for logits_nV, target_n in pieces:
        losses.append(nn.functional.cross_entropy(logits_nV.float(), target_n, reduction="none"))
        correct.append(logits_nV.argmax(-1) == target_n)
    shape = target_Bc.shape
    return torch.cat(losses).view(shape).cpu(), torch.cat(correct).view(shape).cpu()
