"""The model's device, waiting for it, and the mode in which everything is measured."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def device_of(model: PreTrainedModel) -> torch.device:
    """Where its first parameter is."""
    return next(model.parameters()).device


def synchronize(device: torch.device) -> None:
    """Waits until the device has done all queued work, so that a host clock tells the truth."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


@contextlib.contextmanager
def eval_mode(model: PreTrainedModel) -> Iterator[None]:
    """Inside this block the model is in eval mode and records no gradients; its mode comes back."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)
