"""What an arm loses against its dense self: KL by position, copies and retrieval over distances."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import modlab
from benchmarks.depth import compute
from benchmarks.depth.arms import Arm
from benchmarks.depth.distil import recorded
from benchmarks.depth.model import head, states
from benchmarks.real_models.divergence import CHUNK, kl_and_agreement, logits
from benchmarks.real_models.evaluate import FAR, MEASURED, Dense, gaps, shares
from benchmarks.real_models.probes import Probe
from benchmarks.real_models.texts import COUNTED, Data
from modlab.routing.kv_saving import rounding_of


def _on(model: Any, rows: np.ndarray) -> Tensor:
    return torch.from_numpy(rows.astype(np.int64)).to(next(model.parameters()).device)


@torch.no_grad()
def dense(model: Any, data: Data, measured: int = MEASURED) -> Dense:
    """Runs the dense model over texts and probes."""
    found = Dense()
    for name, rows in data.texts.items():
        found.states[name] = torch.cat([states(model, _on(model, row[None])) for row in rows[:measured]])
    found.copies, found.right = asked(model, data.recall)[0], asked(model, data.retrieval)[1]
    return found


@torch.no_grad()
def asked(model: Any, probe: Probe) -> tuple[np.ndarray, np.ndarray]:
    """Of each span the mean loss, and whether all of its tokens were the likeliest."""
    loss, right = np.zeros(len(probe.spans)), np.zeros(len(probe.spans), dtype=int)
    weight = head(model)
    for row, ids in enumerate(probe.rows):
        own = np.flatnonzero(probe.spans[:, 0] == row)
        if not len(own):
            continue
        state = states(model, _on(model, ids[None]))[0]
        for span in own:
            _, a, z, _ = probe.spans[span]
            said = logits(state[a - 1 : z - 1], weight)
            told = _on(model, ids[a:z])
            loss[span] = F.cross_entropy(said, told).item()
            right[span] = int(bool((said.argmax(-1) == told).all()))
    return loss, right


@torch.no_grad()
def measure(model: Any, arm: Arm, data: Data, known: Dense, removed: list[int]) -> dict[str, Any]:
    """The record of one arm, with the names of the result files."""
    T = data.recall.rows.shape[1]
    far_from = FAR if T >= 2 * FAR else T // 2  # the second half of short rows
    far, near, same, work, kept, loss, dense_loss = {}, {}, {}, {}, {}, {}, {}
    for name, rows in data.texts.items():
        kl, agree, shares_by_row, losses = [], [], [], []
        for row, teacher in zip(rows, known.states[name], strict=False):
            with recorded(model) as steps:
                state = states(model, _on(model, row[None]))[0]
            k, a = kl_and_agreement(state, teacher, head(model))
            kl.append(k)
            agree.append(a)
            shares_by_row.append(_kept(steps))
            losses.append([_loss(one, _on(model, row), head(model)) for one in (state, teacher)])
        kl_RT, same_RT = torch.stack(kl), torch.stack(agree).float()
        far[name], near[name] = kl_RT[:, far_from:].mean().item(), kl_RT[:, :far_from].mean().item()
        same[name] = same_RT[:, far_from:].mean().item()
        loss[name], dense_loss[name] = np.mean(losses, 0).tolist()
        by_layer = {
            index: np.mean([row[index] for row in shares_by_row], axis=0).tolist()
            for index in shares_by_row[0]
        }
        kept[name] = by_layer
        work[name] = _compute(model, arm, T, by_layer, removed)
    record: dict[str, Any] = {
        "kl_far": sum(far[name] for name in COUNTED) / len(COUNTED), "far_from": far_from, "length": T,
        "kl_far_by_text": far, "kl_near_by_text": near, "top1_far_by_text": same,
        "loss_by_text": loss, "dense_loss_by_text": dense_loss,
        "compute": sum(work[name] for name in COUNTED) / len(COUNTED), "compute_by_text": work,
        "keep_by_layer": kept, "ratio": len(COUNTED) / sum(_stored(model, kept[name], T) for name in COUNTED),
    }  # fmt: skip
    record |= gaps(asked(model, data.recall)[0], known.copies, data.recall.spans[:, 3])
    record |= shares(asked(model, data.retrieval)[1], known.right, data.retrieval.spans[:, 3])
    return record


def _loss(state_TD: Tensor, ids_T: Tensor, head_VD: Tensor) -> float:
    """Mean loss of a row's next tokens, in nats."""
    states, told = state_TD[:-1].split(CHUNK), ids_T[1:].split(CHUNK)
    parts = [
        F.cross_entropy(logits(some, head_VD), ids, reduction="sum")
        for some, ids in zip(states, told, strict=True)
    ]
    return torch.stack(parts).sum().item() / (len(ids_T) - 1)


def _kept(steps: list[Any]) -> dict[int, list[float]]:
    """Share of kept tokens by layer, of each gate."""
    if not steps:
        return {}
    return {
        index: keep.float().reshape(-1, keep.shape[-1] if keep.dim() == 3 else 1).mean(0).tolist()
        for index, keep in steps[-1].keep.items()
    }


def _stored(model: Any, kept: dict[int, list[float]], T: int) -> float:
    """Share of a dense cache's bytes that is held at the end of a row, without indices."""
    if not modlab.is_converted(model) or model.mod.skip.stores_all:
        return 1.0
    recent = min(1.0, model.mod.skip.recent_stored(model.mod.config) / T)
    shares = [model.mod.skip.stored_share(float(np.mean(gates)), recent) for gates in kept.values()]
    held = (sum(shares) + model.mod.num_layers - len(kept)) / model.mod.num_layers
    return 1 / rounding_of(model).total(1 / held)


def _compute(model: Any, arm: Arm, T: int, kept: dict[int, list[float]], removed: list[int]) -> float:
    config = model.config
    if arm.removes:
        layers, attentions = (len(removed), 0) if arm.removes == "layer" else (0, len(removed))
        return compute.removed(config, T, layers, attentions)
    if not modlab.is_converted(model):
        return 1.0
    if "prompt" in arm.mod["skip"]:
        return compute.leaving(config, T, model.mod.first_left)
    return compute.routed(config, T, arm.mod["skip"], kept)
