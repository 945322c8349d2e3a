"""KL to the dense model, loss on repeated passages, retrieval: by the product's cache, or by its whole rows.

Rows are those of the study: 8 of each text, 50 of each probe, in each of which many passages or questions
stand (`benchmarks/real_models/probes.py`). The dense side is run once a process, for all settings.

Shape letters: B rows, T tokens of a row, P tokens of a piece, G gates of a layer, D model dim.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.real_models import evaluate
from benchmarks.real_models.divergence import kl_and_agreement
from benchmarks.real_models.evaluate import MEASURED, asked, batches, gaps, shares
from benchmarks.real_models.measured import dense_side
from benchmarks.real_models.measured.product import Product, stored
from benchmarks.real_models.probes import Probe
from benchmarks.real_models.texts import COUNTED, Data
from modlab.routing.state import record_routing


@dataclass
class Curves:
    """What rows of a text have shown, a list entry a batch: KL and agreement [B, T], who is kept [B, T, G] by
    layer; and the bytes of their caches."""

    kl: list[Tensor] = field(default_factory=list)
    same: list[Tensor] = field(default_factory=list)
    keep: list[list[Tensor]] = field(default_factory=list)
    kv_bytes: int = 0
    dense_kv_bytes: int = 0


class Far:
    """The measures of a model at one setting after the other.

    Args:
        rows: of each text, at most `MEASURED`.
        dense: file of the dense side, which all routers of a model share (`dense_side.py`); without one it
            is run here.
    """

    def __init__(self, product: Product, data: Data, rows: int = MEASURED, dense: Path | None = None) -> None:
        self.product, self.data, self.rows = product, data, min(rows, MEASURED)
        run = self._dense
        self.dense = run() if dense is None else dense_side.shared(dense, product, data, self.rows, run)

    def _dense(self) -> evaluate.Dense:
        found = evaluate.Dense()
        with self.product.at(None):
            for name in COUNTED:
                found.states[name] = self._states(self.data.texts[name][: self.rows])
            found.copies = self._asked(self.data.recall)[0]
            found.right = self._asked(self.data.retrieval)[1]
        return found

    def by_cache(self) -> dict[str, Any]:
        """The record of the present thresholds, rows in pieces with the product's cache."""
        return self._record({name: self._in_pieces(name) for name in COUNTED}, retrieval=True)

    def by_rows(self, retrieval: bool = True) -> dict[str, Any]:
        """The same of what decides at present, whole rows without a cache: no bytes."""
        return self._record({name: self._whole(name) for name in COUNTED}, retrieval)

    def _states(self, rows: np.ndarray) -> Tensor:
        return torch.cat([self.product.states(ids) for ids in batches(rows, self.product.device)])

    def _asked(self, probe: Probe) -> tuple[np.ndarray, np.ndarray]:
        return asked(self.product, probe, self._states(probe.rows))

    def _in_pieces(self, name: str) -> Curves:
        found = Curves()
        ids = torch.from_numpy(self.data.texts[name][: self.rows].astype(np.int64)).to(self.product.device)
        at, cache = 0, None
        kl: list[Tensor] = []
        same: list[Tensor] = []
        keep: list[list[Tensor]] = []
        for states, filled, kept in self.product.pieces(ids):
            to = at + states.shape[1]
            k, s = self._apart(states, self.dense.states[name][:, at:to])
            kl.append(k)
            same.append(s)
            keep.append(kept)
            at, cache = to, filled
        held = stored(cache)
        found.kv_bytes, found.dense_kv_bytes = held.kv_bytes, held.dense_kv_bytes
        found.kl, found.same = [torch.cat(kl, 1)], [torch.cat(same, 1)]
        found.keep = [[torch.cat(layer, 1) for layer in zip(*keep, strict=True)]]
        return found

    def _whole(self, name: str) -> Curves:
        found, product, done = Curves(), self.product, 0
        for ids in batches(self.data.texts[name][: self.rows], product.device):
            with record_routing(product.model) as recording:
                states = product.states(ids)
            k, s = self._apart(states, self.dense.states[name][done : done + len(ids)])
            found.kl.append(k)
            found.same.append(s)
            found.keep.append(product.kept(recording.steps))
            done += len(ids)
        return found

    def _apart(self, states_BPD: Tensor, dense_BPD: Tensor) -> tuple[Tensor, Tensor]:
        shape = states_BPD.shape[:2]
        kl, same = kl_and_agreement(states_BPD.flatten(0, 1), dense_BPD.flatten(0, 1), self.product.head_VD)
        return kl.view(shape), same.view(shape)

    def _record(self, curves: dict[str, Curves], retrieval: bool) -> dict[str, Any]:
        far = evaluate.FAR
        record: dict[str, Any] = {
            "kl_far_by_text": {}, "kl_near_by_text": {}, "kl_end_by_text": {}, "top1_far_by_text": {},
            "keep_by_text": {},
        }  # fmt: skip
        by_gate = []
        for name, found in curves.items():
            kl, same = torch.cat(found.kl), torch.cat(found.same).float()
            record["kl_far_by_text"][name] = kl[:, far:].mean().item()
            record["kl_near_by_text"][name] = kl[:, :far].mean().item()
            # Settings of equal bytes at a row's end store other numbers of keys on the way there: the more
            # recent tokens, the more early on.
            record["kl_end_by_text"][name] = kl[:, kl.shape[1] * 3 // 4 :].mean().item()
            record["top1_far_by_text"][name] = same[:, far:].mean().item()
            older, share = self._stored_keys(found.keep)
            record["keep_by_text"][name] = share
            by_gate.append(older)
        record["kl_far"] = float(np.mean(list(record["kl_far_by_text"].values())))
        record["kl_end"] = float(np.mean(list(record["kl_end_by_text"].values())))
        record["keys"] = float(np.mean(list(record["keep_by_text"].values())))
        record["keep_by_gate"] = torch.stack(by_gate).mean(0).tolist()
        if all(found.kv_bytes for found in curves.values()):
            each = curves.values()
            record["ratio"] = sum(f.dense_kv_bytes for f in each) / sum(f.kv_bytes for f in each)
            record["ratio_by_text"] = {n: f.dense_kv_bytes / f.kv_bytes for n, f in curves.items()}
        record |= gaps(self._asked(self.data.recall)[0], self.dense.copies, self.data.recall.spans[:, 3])
        if retrieval:
            right = self._asked(self.data.retrieval)[1]
            record |= shares(right, self.dense.right, self.data.retrieval.spans[:, 3])
        return record

    def _stored_keys(self, keep: list[list[Tensor]]) -> tuple[Tensor, float]:
        """What each gate keeps of the keys that are no longer recent at a row's end, [L, G]; and the share of
        all keys that is stored then."""
        window = self.product.window
        layers = [torch.cat(layer).float() for layer in zip(*keep, strict=True)]
        T = layers[0].shape[1]
        older = torch.stack([layer[:, : T - window].mean((0, 1)) for layer in layers])
        return older, (older.mean().item() * max(T - window, 0) + min(window, T)) / T
