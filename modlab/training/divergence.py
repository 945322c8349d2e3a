"""KL between two passes of one model, with its gradient, a few thousand tokens' logits at a time.

Shape letters: S tokens in one line, D model dim, V vocabulary.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from modlab.data.batches import IGNORE
from modlab.training.head import Head

ON_GPU, ON_CPU = 2**28, 2**24
"""Logits that are in memory at once, in each of a few tensors."""


def divergence(
    head: Head, student_SD: Tensor, teacher_SD: Tensor, weight_S: Tensor, targets_S: Tensor,
    chunk_elements: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Sum over tokens of weight · KL(teacher || student), in nats.

    The gradient by the student's states is computed along the way: of the logits it is softmax(student) -
    softmax(teacher), and the head hands it on. So no logits wait for a backward pass.

    Args:
        head: of both; its weights get no gradient.
        student_SD: hidden states, with gradient.
        teacher_SD: hidden states.
        weight_S: of each token, fp32.
        targets_S: next tokens, -100 where nothing is predicted.
        chunk_elements: logits at once.

    Returns:
        the sum (scalar, with gradient to the student's states); KL of each token [S]; the student's loss in
        nats at each target [S], 0 where there is none. The last two without gradient.
    """
    on_gpu = student_SD.is_cuda
    vocabulary = head.model.config.get_text_config().vocab_size
    rows = max(1, (chunk_elements or (ON_GPU if on_gpu else ON_CPU)) // vocabulary)
    total, kl_S, loss_S = _Divergence.apply(student_SD, teacher_SD, weight_S, targets_S, head, rows)
    return total, kl_S, loss_S


class _Divergence(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        student_SD: Tensor,
        teacher_SD: Tensor,
        weight_S: Tensor,
        targets_S: Tensor,
        head: Head,
        rows: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        slope_SD = torch.empty_like(student_SD)
        kl_S = torch.empty(len(student_SD), device=student_SD.device)
        loss_S = torch.empty_like(kl_S)
        compare = _compare(student_SD.is_cuda)
        for a in range(0, len(student_SD), rows):
            part = slice(a, a + rows)
            with torch.enable_grad():
                states = student_SD[part].detach().requires_grad_()
                logits = head(states)
            with torch.no_grad():
                taught = head(teacher_SD[part])
                kl_S[part], loss_S[part], by_logits = compare(
                    logits.detach(), taught, weight_S[part], targets_S[part]
                )
            (slope_SD[part],) = torch.autograd.grad(logits, states, by_logits)
        ctx.save_for_backward(slope_SD)
        ctx.mark_non_differentiable(kl_S, loss_S)
        return (kl_S * weight_S).sum(), kl_S, loss_S

    @staticmethod
    def backward(ctx: Any, by_total: Tensor, *_: Any) -> Any:  # type: ignore[override]
        (slope_SD,) = ctx.saved_tensors
        return by_total.to(slope_SD.dtype) * slope_SD, None, None, None, None, None


def _compared(
    student_SV: Tensor, teacher_SV: Tensor, weight_S: Tensor, targets_S: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """KL and loss of each token, and the gradient of weight · KL by the student's logits."""
    log_s, log_t = student_SV.float().log_softmax(-1), teacher_SV.float().log_softmax(-1)
    t = log_t.exp()
    kl_S = (t * (log_t - log_s)).sum(-1)
    slope = ((log_s.exp() - t) * weight_S[:, None]).to(student_SV.dtype)
    predicted = targets_S != IGNORE
    chosen = log_s.gather(-1, targets_S.clamp(min=0)[:, None])[:, 0]
    return kl_S, torch.where(predicted, -chosen, 0.0), slope


@functools.cache
def _compare(on_gpu: bool) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    """Fused on a GPU, where the passes over the logits are what takes the time."""
    return torch.compile(_compared, dynamic=True) if on_gpu else _compared
