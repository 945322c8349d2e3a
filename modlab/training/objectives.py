"""Training objectives: functions of logits and of what `record_routing(model, detach=False)` saw.

A forward often sees a part of a step's batch only: gradients are accumulated, or several processes share it.
What is averaged is then averaged over the whole batch: a loss is given the `count` of the whole, and a
routing objective its `Sums`, so that the parts' gradients add up to that of one forward over all of it.

Shape letters: B rows, T tokens, R routed layers, V vocabulary. Every mean is over real (not padding) tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from modlab.data.batches import IGNORE
from modlab.routing.record import by_gate

if TYPE_CHECKING:
    from modlab.routing.record import RoutingStep
    from modlab.training.config import Objective, TrainConfig

CHUNK_ELEMENTS = 2**28  # at most this many logits are held in fp32 at once (1 GiB)


@dataclass
class Sums:
    """What the routers did with a batch, summed over its real tokens; no gradient.

    Attributes:
        real: number of real tokens, scalar.
        kept: how many of them each routed layer kept, ascending [R].
        gate: sum of their gates by routed layer, ascending [R].
    """

    real: Tensor
    kept: Tensor
    gate: Tensor

    @classmethod
    def of(cls, step: RoutingStep) -> Sums:
        """Of a recorded forward."""
        return cls(step.real.sum().float(), _kept(step), _gates(step).detach())

    def __add__(self, other: Sums) -> Sums:
        return Sums(self.real + other.real, self.kept + other.kept, self.gate + other.gate)

    def over(self, summed: Callable[[Tensor], Tensor]) -> Sums:
        """The sum over processes, in one call of `summed`."""
        layers = len(self.kept)
        flat = summed(torch.cat([self.real[None], self.kept, self.gate]))
        return Sums(flat[0], flat[1 : 1 + layers], flat[1 + layers :])


def _kept(step: RoutingStep) -> Tensor:
    return _over_tokens({layer: keep.float() for layer, keep in step.keep.items()}, step.real)


def _gates(step: RoutingStep) -> Tensor:
    return _over_tokens(step.gate, step.real)


def _over_tokens(values: dict[int, Tensor], real: Tensor) -> Tensor:
    """Sum over real tokens of each layer's values [B, T], or of the mean of several gates' [B, T, G]."""
    sums = []
    for layer in sorted(values):
        value_BTG = by_gate(values[layer])
        sums.append((value_BTG * real.float()[..., None]).sum() / value_BTG.shape[-1])
    return torch.stack(sums)


def keep_ratios(step: RoutingStep, whole: Sums | None = None) -> Tensor:
    """Hard share of kept tokens by routed layer, ascending: fp32 [R], no gradient."""
    if whole is not None:
        return whole.kept / whole.real.clamp(min=1)
    return _kept(step) / step.real.sum().clamp(min=1)


def gate_means(step: RoutingStep, whole: Sums | None = None) -> Tensor:
    """Mean gate by routed layer, ascending: fp32 [R], with gradient if the recording has one."""
    gates = _gates(step)
    if whole is not None:  # the whole's value, this part's gradient
        return (whole.gate + gates - gates.detach()) / whole.real.clamp(min=1)
    return gates / step.real.sum().clamp(min=1)


def load_objective(step: RoutingStep, alpha: float = 0.01, whole: Sums | None = None) -> Tensor:
    """The paper's load term, R = alpha * sum over routed layers of F * G (arXiv 2410.14268).

    F is the hard share kept (no gradient), G the mean gate (gradient), as in the load-balancing loss of
    mixtures of experts. One-sided: it only ever pushes gates down, and it is bistable in `alpha`.

    Returns:
        scalar, fp32.
    """
    return alpha * (keep_ratios(step, whole) * gate_means(step, whole)).sum()


def ratios_through_gates(step: RoutingStep, whole: Sums | None = None) -> Tensor:
    """Keep ratios by layer whose gradient is that of the mean gates (straight-through)."""
    soft = gate_means(step, whole)
    return keep_ratios(step, whole) + soft - soft.detach()


def target_objective(
    step: RoutingStep,
    target: float,
    lam: float = 2.0,
    per_layer: bool = False,
    whole: Sums | None = None,
) -> Tensor:
    """Two-sided pull of the keep ratio towards `target`: lam * (ratio - target)^2.

    The value uses the hard share kept, the gradient goes through the mean gate (straight-through). By default
    the ratio is the mean over all routed layers, so that layers may differ; with `per_layer` each layer is
    pulled on its own and the squares are averaged.

    Returns:
        scalar, fp32.
    """
    ratio = ratios_through_gates(step, whole)
    if not per_layer:
        ratio = ratio.mean()
    return lam * (ratio - target).square().mean()


def pull_objective(
    step: RoutingStep,
    target: float,
    lam: float = 2.0,
    per_layer: bool = False,
    whole: Sums | None = None,
) -> Tensor:
    """One-sided pull of the keep ratio down to `target`: lam * (ratio - target) above it, a tenth of that
    slope below, where distillation needs no help to open gates that matter. Value and gradient as of
    `target_objective`.

    Returns:
        scalar, fp32.
    """
    ratio = ratios_through_gates(step, whole)
    over = (ratio if per_layer else ratio.mean()[None]) - target
    return lam * (over.clamp(min=0) + 0.1 * (-over).clamp(min=0)).mean()


def budget_objective(
    step: RoutingStep,
    target: float,
    lam: float = 2.0,
    per_layer: bool = False,
    whole: Sums | None = None,
) -> Tensor:
    """Holds the mean gate at `target` where thresholds see to the keep ratio: lam * (mean gate - target)^2.

    The loss alone would open every gate of a useful layer as far as it goes, and gates that are all alike
    rank no tokens. `per_layer` as in `target_objective`.

    Returns:
        scalar, fp32.
    """
    soft = gate_means(step, whole)
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
    terms = {
        layer: F.binary_cross_entropy_with_logits(logit, step.keep[layer].float(), reduction="none")
        for layer, logit in step.logit.items()
    }
    return _over_tokens(terms, step.real).mean() / step.real.sum().clamp(min=1)


def routing_objective(
    objective: Objective, step: RoutingStep, target: float, config: TrainConfig, whole: Sums | None = None
) -> Tensor:
    """The term that trains the routers, scalar fp32; 0 for the objective "none".

    Args:
        objective: as `choose_objective` settled it.
        step: a recorded forward, with gradient.
        target: the keep ratio asked for now, for "target" and "budget".
        config: weights of the terms.
        whole: of the batch that this forward is a part of; its value is then this part of the whole's term.
    """
    if objective == "distil":
        term = pull_objective(step, target, config.lam, config.per_layer, whole)
    elif objective == "target":
        term = target_objective(step, target, config.lam, config.per_layer, whole)
    elif objective == "budget":
        term = budget_objective(step, target, config.lam, config.per_layer, whole)
    elif objective == "load":
        term = load_objective(step, config.alpha, whole)
    elif objective == "bce":
        return config.bce * topk_bce(step) * _share(step, whole)
    else:
        return torch.zeros((), device=step.real.device)
    # All of the gradient is this part's, of the value it is as much as it has tokens.
    return term - (1 - _share(step, whole)) * term.detach()


def _share(step: RoutingStep, whole: Sums | None) -> Tensor | float:
    return 1.0 if whole is None else step.real.sum() / whole.real.clamp(min=1)


def next_token_loss(
    logits_BTV: Tensor,
    targets_BS: Tensor,
    count: Tensor | None = None,
    chunk_elements: int = CHUNK_ELEMENTS,
) -> Tensor:
    """Mean cross entropy in nats of predicting targets_BS[:, t] from logits_BTV[:, t]; -100 is left out.

    Computed in fp32, `chunk_elements` logits at a time. A batch without a single target gives 0.

    Args:
        targets_BS: S = T - 1 targets a row, as `measure.evaluation.targets_of` gives them.
        count: what the sum is divided by, if not by the number of these targets.
    """
    targets = F.pad(targets_BS, (0, 1), value=IGNORE).reshape(-1)

    def chunk_sum(logits: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(logits.float(), targets, ignore_index=IGNORE, reduction="sum")

    total = _chunked(chunk_sum, chunk_elements, logits_BTV.flatten(0, 1), targets)
    return total / ((targets != IGNORE).sum() if count is None else count).clamp(min=1)


def kl_to_teacher(
    logits_BTV: Tensor,
    teacher_BTV: Tensor,
    real_BT: Tensor,
    count: Tensor | None = None,
    chunk_elements: int = CHUNK_ELEMENTS,
) -> Tensor:
    """Mean over real tokens of KL(teacher || student) in nats; the dense model is the teacher.

    Computed in fp32, `chunk_elements` logits at a time: a large vocabulary never has all its logits in fp32
    at once, and the backward pass computes them again instead of keeping them.

    Args:
        count: what the sum is divided by, if not by the number of these real tokens.
    """

    def chunk_sum(student: Tensor, teacher: Tensor, real: Tensor) -> Tensor:
        log_t = F.log_softmax(teacher.float(), -1)
        per_token = (log_t.exp() * (log_t - F.log_softmax(student.float(), -1))).sum(-1)
        return (per_token * real).sum()

    real = real_BT.flatten().float()
    total = _chunked(
        chunk_sum, chunk_elements, logits_BTV.flatten(0, 1), teacher_BTV.detach().flatten(0, 1), real
    )
    return total / (real.sum() if count is None else count).clamp(min=1)


def _chunked(
    function: Callable[..., Tensor], chunk_elements: int, logits_NV: Tensor, *others: Tensor
) -> Tensor:
    """Sum of `function` over chunks of rows; the backward pass computes a chunk's intermediates again."""
    rows = max(1, chunk_elements // logits_NV.shape[-1])
    if rows >= len(logits_NV):
        return function(logits_NV, *others)
    total = logits_NV.new_zeros((), dtype=torch.float32)
    for start in range(0, len(logits_NV), rows):
        part = [t[start : start + rows] for t in (logits_NV, *others)]
        total = total + checkpoint(function, *part, use_reentrant=False)
    return total
