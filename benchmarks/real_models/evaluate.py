"""What routing loses with hard eviction, and what it stores: KL by position, copies, retrieval."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from benchmarks.real_models.base import Base
from benchmarks.real_models.decoder import KeepRule, dense_hidden, hard_hidden
from benchmarks.real_models.divergence import kl_and_agreement, logits
from benchmarks.real_models.gates import Gates
from benchmarks.real_models.probes import Probe
from benchmarks.real_models.texts import COUNTED, Data

FAR = 1024  # positions from here on are far
MEASURED = 8  # rows of a text; the others are for thresholds
BATCH = 32_768  # tokens of a pass


@dataclass
class Dense:
    """What the dense model itself does, measured once.

    Attributes:
        states: last states of the texts' rows, by text.
        copies: loss of each passage's copy, in nats a token [S].
        right: whether each question was answered [S].
    """

    states: dict[str, Tensor] = field(default_factory=dict)
    copies: np.ndarray = field(default_factory=lambda: np.zeros(0))
    right: np.ndarray = field(default_factory=lambda: np.zeros(0))


def batches(rows: np.ndarray, device: torch.device) -> Iterator[Tensor]:
    """The rows as [B, T] on the device, `BATCH` tokens at a time."""
    each = max(1, BATCH // rows.shape[1])
    for a in range(0, len(rows), each):
        yield torch.from_numpy(rows[a : a + each].astype(np.int64)).to(device)


@torch.no_grad()
def dense(base: Base, data: Data) -> Dense:
    """Runs the base over texts and probes."""
    found = Dense()
    for name, rows in data.texts.items():
        found.states[name] = torch.cat(
            [dense_hidden(base, ids) for ids in batches(rows[:MEASURED], base.device)]
        )
    for probe, name in ((data.recall, "copies"), (data.retrieval, "right")):
        hidden = torch.cat([dense_hidden(base, ids) for ids in batches(probe.rows, base.device)])
        setattr(found, name, asked(base, probe, hidden)[0 if name == "copies" else 1])
    return found


class Headed(Protocol):
    """What turns states into logits, and where."""

    @property
    def device(self) -> torch.device: ...

    @property
    def head_VD(self) -> Tensor: ...


def asked(base: Headed, probe: Probe, hidden_RTD: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Of each span the mean loss, and whether all of its tokens were the likeliest."""
    lengths = probe.spans[:, 2] - probe.spans[:, 1]
    row = np.repeat(probe.spans[:, 0], lengths)
    at = np.concatenate([np.arange(a, z) for _, a, z, _ in probe.spans])
    told = torch.from_numpy(probe.rows[row, at].astype(np.int64)).to(base.device)
    state = hidden_RTD[torch.from_numpy(row.astype(np.int64)), torch.from_numpy(at.astype(np.int64)) - 1]
    losses, right = [], []
    for a in range(0, len(state), 4096):
        said = logits(state[a : a + 4096], base.head_VD)
        losses.append(torch.nn.functional.cross_entropy(said, told[a : a + 4096], reduction="none"))
        right.append(said.argmax(-1) == told[a : a + 4096])
    begins = np.cumsum(lengths) - lengths
    loss = np.add.reduceat(torch.cat(losses).double().cpu().numpy(), begins) / lengths
    all_right = np.minimum.reduceat(torch.cat(right).cpu().numpy().astype(int), begins)
    return loss, all_right


def stored(kept_older: list[Tensor], T: int, window: int) -> float:
    """Keys allocated over keys of a dense cache, at a row's end: kept ones, and the window."""
    kept = torch.stack([layer.float().mean() for layer in kept_older]).mean().item()
    return (kept + min(window, T)) / T


def measure(
    base: Base, gates: Gates, data: Data, known: Dense, window: int, keep: KeepRule | None = None
) -> dict[str, Any]:
    """The record of one arm at one ratio, with the names of the result files."""
    far, near, same, held = {}, {}, {}, {}
    by_gate: list[Tensor] = []
    for name, rows in data.texts.items():
        kl, agree, share = [], [], []
        for i, ids in enumerate(batches(rows[:MEASURED], base.device)):
            hidden, routes = hard_hidden(base, gates, ids, window, keep)
            share.append(stored(routes.kept_older, ids.shape[1], window))
            if name in COUNTED:
                by_gate.append(torch.stack([layer.mean(0) for layer in routes.kept_older]) / ids.shape[1])
            teacher = known.states[name][i * len(ids) :][: len(ids)]
            for one, other in zip(hidden, teacher, strict=True):
                k, a = kl_and_agreement(one, other, base.head_VD)
                kl.append(k)
                agree.append(a)
        kl_RT, same_RT = torch.stack(kl), torch.stack(agree).float()
        far[name], near[name] = kl_RT[:, FAR:].mean().item(), kl_RT[:, :FAR].mean().item()
        same[name], held[name] = same_RT[:, FAR:].mean().item(), float(np.mean(share))
    record: dict[str, Any] = {
        "ratio": len(COUNTED) / sum(held[name] for name in COUNTED),
        "kl_far": _mean(far), "kl_far_by_text": far, "kl_near_by_text": near, "top1_far_by_text": same,
        "keep_by_text": held,
        "keep_by_gate": [[round(float(v), 3) for v in layer] for layer in torch.stack(by_gate).mean(0)],
    }  # fmt: skip
    copies, right = (
        _probe(base, gates, probe, window, keep)[j] for j, probe in enumerate((data.recall, data.retrieval))
    )
    record |= gaps(copies, known.copies, data.recall.spans[:, 3])
    record |= shares(right, known.right, data.retrieval.spans[:, 3])
    return record


def _probe(
    base: Base, gates: Gates, probe: Probe, window: int, keep: KeepRule | None
) -> tuple[np.ndarray, np.ndarray]:
    rows = [hard_hidden(base, gates, ids, window, keep)[0] for ids in batches(probe.rows, base.device)]
    return asked(base, probe, torch.cat(rows))


def _mean(by_text: dict[str, float]) -> float:
    return sum(by_text[name] for name in COUNTED) / len(COUNTED)


def gaps(loss_S: np.ndarray, dense_S: np.ndarray, distance_S: np.ndarray) -> dict[str, Any]:
    """Loss of copies above the base's, by distance, with the standard error of the paired difference."""
    out: dict[str, Any] = {"recall_gap": {}, "recall_gap_stderr": {}, "recall_dense": {}}
    for distance in sorted(set(distance_S.tolist())):
        gap = (loss_S - dense_S)[distance_S == distance]
        out["recall_gap"][str(distance)] = float(gap.mean())
        out["recall_gap_stderr"][str(distance)] = float(gap.std(ddof=1) / len(gap) ** 0.5)
        out["recall_dense"][str(distance)] = float(dense_S[distance_S == distance].mean())
    return out


def shares(right_S: np.ndarray, dense_S: np.ndarray, distance_S: np.ndarray) -> dict[str, Any]:
    """Questions answered, by distance: of all, and of those that the base answers."""
    out: dict[str, Any] = {"retrieval": {}, "retrieval_dense": {}, "retrieval_of_dense": {}}
    for distance in sorted(set(distance_S.tolist())):
        mine, base = (x[distance_S == distance].astype(bool) for x in (right_S, dense_S))
        out["retrieval"][str(distance)] = float(mine.mean())
        out["retrieval_dense"][str(distance)] = float(base.mean())
        out["retrieval_of_dense"][str(distance)] = float((mine & base).sum() / max(1, base.sum()))
    return out


def older_share(ratio: float, T: int, window: int, first: int) -> float:
    """Share of the keys that are neither first nor recent which may be kept for K/V `ratio` times smaller."""
    return max(0.0, (T / ratio - window - first) / (T - window - first))


@torch.no_grad()
def set_threshold(base: Base, gates: Gates, data: Data, ratio: float, window: int, rounds: int = 3) -> float:
    """Puts the threshold where the three texts together have the ratio, on rows that are not measured.

    What a gate says depends on what earlier layers have dropped; therefore the rounds.
    """
    rows = np.concatenate([data.texts[name][MEASURED:] for name in COUNTED])
    first, T = gates.form.first, rows.shape[1]
    share = older_share(ratio, T, window, first)
    for _ in range(rounds):
        values: list[Tensor] = []
        for ids in batches(rows, base.device):
            seen: list[Tensor] = []
            hard_hidden(base, gates, ids, window, None, seen)
            values += [z[:, :, first : T - window : 3].flatten() for z in seen]
        ordered = torch.cat(values).sort().values
        gates.threshold = ordered[min(len(ordered) - 1, int(len(ordered) * (1 - share)))].item()
    return gates.threshold
