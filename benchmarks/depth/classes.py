"""Which kinds of tokens a real model's routers keep, and what each kind loses by it.

A row a text and class of `modlab.traces.token_classes`: its tokens, the share that routers keep (or, where
layers are skipped, that they run), the loss of these tokens by the dense model, what is lost beyond that, and
the KL at the positions that predict them.

Shape letters: T tokens of a row, C classes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

import modlab
from benchmarks.depth.model import head, states
from benchmarks.real_models.divergence import logits
from benchmarks.real_models.texts import Data
from modlab.data.pieces import encode
from modlab.traces.token_classes import CLASSES, classify

FEATURES = ("kept", "dense_loss", "loss", "kl")


@torch.no_grad()
def losses_by_class(
    model: Any, tokenizer: Any, data: Data, texts: list[str], rows: int
) -> list[dict[str, Any]]:
    """Rows of the record.

    Args:
        model: converted, at the setting that is measured.
        texts: names of the texts that are run.
        rows: of each text.

    Returns:
        `text`, `token_class`, `tokens`, the means of `FEATURES`, and `loss_excess` with its standard error
        over tokens.
    """
    found = []
    for name in texts:
        seen = [_measured(model, tokenizer, row) for row in data.texts[name][:rows]]
        classes_S = np.concatenate([classes for classes, _ in seen])
        values = {key: np.concatenate([one[key] for _, one in seen]) for key in FEATURES}
        for index, label in enumerate(CLASSES):
            of_class = classes_S == index
            if not of_class.any():
                continue
            excess = (values["loss"] - values["dense_loss"])[of_class]
            error = float(excess.std(ddof=1)) / len(excess) ** 0.5 if len(excess) > 1 else None
            found.append(
                {"text": name, "token_class": label, "tokens": int(of_class.sum())}
                | {key: float(value[of_class].mean()) for key, value in values.items()}
                | {"loss_excess": float(excess.mean()), "loss_excess_stderr": error}
            )
    return found


def _measured(model: Any, tokenizer: Any, row: np.ndarray) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Classes of a row's tokens but the first, and of each of them the `FEATURES`, [T - 1]."""
    ids = torch.from_numpy(row.astype(np.int64)).to(next(model.parameters()).device)
    with modlab.routing_off(model):
        told = logits(states(model, ids[None])[0, :-1], head(model)).log_softmax(-1)
    with modlab.record_routing(model) as recording:
        said = logits(states(model, ids[None])[0, :-1], head(model)).log_softmax(-1)
    keep = recording.steps[-1].keep.values()
    kept_T = torch.stack([one[0].float().reshape(len(ids), -1).mean(1) for one in keep]).mean(0)
    values = {
        "kept": kept_T[1:],
        "dense_loss": _loss(told, ids),
        "loss": _loss(said, ids),
        "kl": (told.exp() * (told - said)).sum(-1),
    }
    classes = np.array(classify(encode(tokenizer, ids.tolist())[1]))[1:]
    return classes, {key: value.float().cpu().numpy() for key, value in values.items()}


def _loss(log_TV: Tensor, ids: Tensor) -> Tensor:
    return -log_TV.gather(1, ids[1:, None])[:, 0]
