"""Short training runs and their comparison."""

from __future__ import annotations

from typing import Any

import torch

V, T = 64, 32  # tokens of the vocabulary, and of a row


def settings(**changes: Any) -> dict[str, Any]:
    """Short runs; those that end calibrated ask for it."""
    return {"steps": 10, "batch_size": 8, "lr": 3e-3, "log_every": 1, "calibrate": False, **changes}


def same_weights(a: Any, b: Any) -> bool:
    """Whether two models' weights are equal, bit for bit."""
    return all(
        torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    )
