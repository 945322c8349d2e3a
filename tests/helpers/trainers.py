"""The gradient of the first step of a transformers Trainer with `MoDCallback`."""

from __future__ import annotations

from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook
from transformers import Trainer, TrainingArguments

from modlab.integrations.trainer import MoDCallback
from tests.helpers.steps import CASES, LENGTH, ROWS, VOCABULARY, model_of


class InOrder(Trainer):
    """Its rows come as they lie."""

    def _get_train_sampler(self, *args: Any) -> Any:
        return torch.utils.data.SequentialSampler(self.train_dataset)  # type: ignore[arg-type]


def first_gradient(out: str, rows: int, accumulated: int) -> dict[str, torch.Tensor]:
    """By name; labels are uneven, keys are weighed with noise."""
    ids = torch.randint(2, VOCABULARY, (ROWS, LENGTH), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    for row in range(ROWS):
        labels[row, : 20 if row % 2 else 2] = -100
    data = [{"input_ids": i, "labels": label} for i, label in zip(ids, labels, strict=True)]
    conversion, settings = CASES["cache, with noise"]
    model, seen = model_of(conversion), {}

    def note(optimizer: Any, args: Any, kwargs: Any) -> None:
        named = model.named_parameters()
        seen.update({name: p.grad.clone() for name, p in named if p.grad is not None})

    handle = register_optimizer_step_pre_hook(note)
    arguments = TrainingArguments(
        f"{out}/trainer",
        max_steps=1,
        per_device_train_batch_size=rows,
        gradient_accumulation_steps=accumulated,
        max_grad_norm=1e9,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
    )
    try:
        InOrder(model, arguments, train_dataset=data, callbacks=[MoDCallback(**settings)]).train()
    finally:
        handle.remove()
    return seen
