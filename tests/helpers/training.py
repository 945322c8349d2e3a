"""Short training runs and their comparison."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

import modlab

V, T = 64, 32  # tokens of the vocabulary, and of a row


def settings(**changes: Any) -> dict[str, Any]:
    """Short runs; those that end calibrated ask for it."""
    return {"steps": 10, "batch_size": 8, "lr": 3e-3, "log_every": 1, "calibrate": False, **changes}


def same_weights(a: Any, b: Any) -> bool:
    """Whether two models' weights are equal, bit for bit."""
    return all(
        torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    )


@contextlib.contextmanager
def changes(model: Any) -> Iterator[set[str]]:
    """Afterwards the names of the parameters that are not what they were before this block."""
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    changed: set[str] = set()
    yield changed
    parameters = dict(model.named_parameters())
    changed |= {name for name, old in before.items() if not torch.equal(parameters[name], old)}


def learnt(model: Any, ids_BT: torch.Tensor, **more: Any) -> set[str]:
    """The parameters that two steps on these rows change where the base stays as it is."""
    config = modlab.TrainConfig(
        steps=2, batch_size=len(ids_BT[:4]), freeze_base=True, calibrate=False, num_workers=0,
        mixed_precision="no", lr=0.05, **more,
    )  # fmt: skip
    with changes(model) as changed:
        result = modlab.train(model, [{"input_ids": row} for row in ids_BT], config)
    assert np.isfinite(result.history["loss"]).all()
    return changed


def added(model: Any) -> set[str]:
    """The parameters that conversion has added."""
    return {name for name, _ in model.named_parameters() if ".mod_" in name}
