"""Training objectives: pure functions of logits and of what `record_routing(model, detach=False)` saw in a
forward.

Shape letters: B rows, T tokens, R routed layers, V vocabulary. Every mean is over real (not padding) tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

if TYPE_CHECKING:
    from modlab.routing.state import RoutingStep

CHUNK_ELEMENTS = 2**28  # at most this many logits are held in fp32 at once (1 GiB)
IGNORE = -100


def keep_ratios(step: RoutingStep) -> Tensor:
    """Hard share of kept tokens by routed layer, ascending: fp32 [R], no gradient."""
    real = step.real
    count = real.sum().clamp(min=1)
    kept = torch.stack([(step.keep[layer] & real).sum() for layer in sorted(step.keep)])
    return kept.float() / count


def gate_means(step: RoutingStep) -> Tensor:
    """Mean gate by routed layer, ascending: fp32 [R], with gradient if the recording has one."""
    real = step.real.float()
    count = real.sum().clamp(min=1)
    return torch.stack([(step.gate[layer] * real).sum() for layer in sorted(step.gate)]) / count


def load_objective(step: RoutingStep, alpha: float = 0.01) -> Tensor:
    """The paper's load term, R = alpha * sum over routed layers of F * G (arXiv 2410.14268; DESIGN section
    1).

    F is the hard share kept (no gradient), G the mean gate (gradient), as in the load-balancing loss of
    mixtures of experts. One-sided: it only ever pushes gates down, and is bistable in `alpha` (DESIGN,
    failure modes).

    Returns:
        scalar, fp32.
    """
    return alpha * (keep_ratios(step) * gate_means(step)).sum()


def target_objective(step: RoutingStep, target: float, lam: float = 2.0, per_layer: bool = False) -> Tensor:
    """Two-sided pull of the keep ratio towards `target`: lam * (ratio - target)^2 (DESIGN section 5).

    The value uses the hard share kept, the gradient goes through the mean gate (straight-through). By default
    the ratio is the mean over all routed layers, so that layers may differ; with `per_layer` each layer is
    pulled on its own and the squares are averaged.

    Returns:
        scalar, fp32.
    """
    soft = gate_means(step)
    ratio = keep_ratios(step) + soft - soft.detach()
    if not per_layer:
        ratio = ratio.mean()
    return lam * (ratio - target).square().mean()


def budget_objective(step: RoutingStep, target: float, lam: float = 2.0, per_layer: bool = False) -> Tensor:
    """Holds the mean gate at `target` where thresholds see to the keep ratio: lam * (mean gate - target)^2.

    The loss alone would open every gate of a useful layer as far as it goes, and gates that are all alike
    rank no tokens. `per_layer` as in `target_objective`.

    Returns:
        scalar, fp32.
    """
    soft = gate_means(step)
    if not per_layer:
        soft = soft.mean()
    return lam * (soft - target).square().mean()


def topk_bce(step: RoutingStep) -> Tensor:
    """Auxiliary BCE for top-k routing: predicts membership in the top k from a token's own logit.

    Mixture-of-Depths (Raposo et al. 2024, arXiv 2404.02258, section 3.5): top-k looks at the whole row, which
    a decoding model cannot do; trained with this term, the sign of the logit (a gate against 0.5) tells the
    same causally.

    Returns:
        scalar, fp32, the mean over routed layers.
    """
    real = step.real.float()
    count = real.sum().clamp(min=1)
    terms = [
        (
            F.binary_cross_entropy_with_logits(step.logit[layer], step.keep[layer].float(), reduction="none")
            * real
        ).sum()
        for layer in sorted(step.logit)
    ]
    return torch.stack(terms).mean() / count


def next_token_loss(logits_BTV: Tensor, labels_BT: Tensor, chunk_elements: int = CHUNK_ELEMENTS) -> Tensor:
    """Mean cross entropy in nats of predicting labels_BT[:, t + 1] from logits_BTV[:, t]; label -100 is left
    out.

    Computed in fp32, `chunk_elements` logits at a time. A batch without a single label gives 0.
    """
    labels = F.pad(labels_BT[:, 1:], (0, 1), value=IGNORE).reshape(-1)

    def chunk_sum(logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits.float(), labels, ignore_index=IGNORE, reduction="sum")

    total = _chunked(chunk_sum, chunk_elements, logits_BTV.flatten(0, 1), labels)
    return total / (labels != IGNORE).sum().clamp(min=1)


def kl_to_teacher(
    logits_BTV: Tensor, teacher_BTV: Tensor, real_BT: Tensor, chunk_elements: int = CHUNK_ELEMENTS
) -> Tensor:
    """Mean over real tokens of KL(teacher || student) in nats; the dense model is the teacher (DESIGN section
    5).

    Computed in fp32, `chunk_elements` logits at a time: a large vocabulary never has all its logits in fp32
    at once, and the backward pass computes them again instead of keeping them.
    """

    def chunk_sum(student: Tensor, teacher: Tensor, real: Tensor) -> Tensor:
        log_t = F.log_softmax(teacher.float(), -1)
        per_token = (log_t.exp() * (log_t - F.log_softmax(student.float(), -1))).sum(-1)
        return (per_token * real).sum()

    real = real_BT.flatten().float()
    total = _chunked(
        chunk_sum, chunk_elements, logits_BTV.flatten(0, 1), teacher_BTV.detach().flatten(0, 1), real
    )
    return total / real.sum().clamp(min=1)


def _chunked(
    function: Callable[..., Tensor], chunk_elements: int, logits_NV: Tensor, *others: Tensor
) -> Tensor:
    """Sum of `function` over chunks of rows; each chunk's intermediates are recomputed in the backward
    pass."""
    rows = max(1, chunk_elements // logits_NV.shape[-1])
    if rows >= len(logits_NV):
        return function(logits_NV, *others)
    total = logits_NV.new_zeros((), dtype=torch.float32)
    for start in range(0, len(logits_NV), rows):
        part = [t[start : start + rows] for t in (logits_NV, *others)]
        total = total + checkpoint(function, *part, use_reentrant=False)
    return total
