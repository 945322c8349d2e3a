"""Gates: one a KV head or one a layer, in all layers; what they say of a token, in three forms.

A gate is linear in the normalised state that enters its layer, plus a small hidden layer. `hard` keys are
kept or gone by a threshold; `soft` ones, for training, carry a log-weight with logistic noise.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.real_models.base import Shape
from modlab.routing.router import normalised

GONE = -1e4
"""The log-weight of a key that is not kept."""


@dataclass(frozen=True)
class GateForm:
    """What a gate is.

    Attributes:
        per_head: one gate a KV head; otherwise one a layer.
        hidden: units of the hidden layer, which all gates of a layer share; 0 for none.
        ahead: how many later tokens' states a gate sees as well, as their mean; the token is still in the
            window when they have come.
        first: the first tokens, always kept.
        temperature: of the noise.
    """

    per_head: bool = True
    hidden: int = 16
    ahead: int = 0
    first: int = 4
    temperature: float = 0.3


class GateWeights(nn.Module):
    """The gates of one layer; a gate's value is called z, and 0 is the threshold of training."""

    def __init__(self, shape: Shape, form: GateForm) -> None:
        super().__init__()
        self.A = shape.G if form.per_head else 1
        self.linear = nn.Parameter(torch.zeros(self.A, shape.D))
        self.bias = nn.Parameter(torch.full((self.A,), 3.0))
        K = form.hidden
        self.into_KD = nn.Parameter(torch.randn(K, shape.D) * shape.D**-0.5) if K else None
        self.out_AK = nn.Parameter(torch.zeros(self.A, K)) if K else None
        self.later = nn.Parameter(torch.zeros(self.A, shape.D)) if form.ahead else None

    def tensors(self) -> tuple[Tensor | None, ...]:
        return self.linear, self.bias, self.into_KD, self.out_AK, self.later


def gate_values(x_BTD: Tensor, weights: tuple[Tensor | None, ...], ahead: int = 0) -> Tensor:
    """z [B, A, T] in fp32."""
    linear, bias, into, out, later = weights
    assert linear is not None and bias is not None
    x = normalised(x_BTD)
    z_BTA = F.linear(x, linear, bias)
    if into is not None and out is not None:
        hidden = F.gelu(F.linear(x.to(x_BTD.dtype), into.to(x_BTD.dtype)))
        z_BTA = z_BTA + F.linear(hidden, out.to(x_BTD.dtype)).float()
    if later is not None:
        z_BTA = z_BTA + mean_of_next(F.linear(x, later), ahead)
    return z_BTA.transpose(1, 2)


def mean_of_next(x_BTA: Tensor, count: int) -> Tensor:
    """Mean over the `count` tokens that follow; near a row's end over fewer, zeros in place of the rest."""
    total = F.pad(x_BTA.cumsum(1), (0, 0, 1, count))
    T = x_BTA.shape[1]
    total[:, T + 1 :] = total[:, T : T + 1]
    return (total[:, count + 1 :][:, :T] - total[:, 1 : T + 1]) / count


def soft_log_weights(z_BAT: Tensor, noise_BAT: Tensor, form: GateForm) -> Tensor:
    """Log-weights of training: log sigmoid((z + logistic noise) / temperature), first tokens 0.

    Args:
        noise_BAT: uniform in (0, 1).
    """
    u = noise_BAT.clamp(1e-6, 1 - 1e-6)
    weight = F.logsigmoid((z_BAT + torch.log(u) - torch.log1p(-u)) / form.temperature)
    return weight.clamp(min=GONE).masked_fill(_first(z_BAT, form), 0.0)


def hard_log_weights(keep_BAT: Tensor, form: GateForm) -> Tensor:
    """0 for keys that are kept, first tokens among them, `GONE` for the others."""
    return torch.where(keep_BAT | _first(keep_BAT, form), 0.0, GONE)


def _first(x_BAT: Tensor, form: GateForm) -> Tensor:
    return torch.arange(x_BAT.shape[-1], device=x_BAT.device) < form.first


class Gates(nn.Module):
    """The gates of a model, layer by layer.

    Attributes:
        threshold: of `keep`; live.
    """

    def __init__(self, shape: Shape, form: GateForm) -> None:
        super().__init__()
        self.form, self.shape = form, shape
        self.layers = nn.ModuleList(GateWeights(shape, form) for _ in range(shape.L))
        self.threshold = 0.0

    def layer(self, i: int) -> GateWeights:
        """The gates of layer `i`."""
        return cast(GateWeights, self.layers[i])

    def of(self, i: int) -> tuple[Tensor | None, ...]:
        return self.layer(i).tensors()

    @torch.no_grad()
    def shift(self, by: float) -> None:
        """Adds to every gate, so that another share lies above 0."""
        for i in range(self.shape.L):
            self.layer(i).bias.add_(by)

    @torch.no_grad()
    def scale(self, by: float) -> None:
        """Multiplies every gate's value, so that noise weighs less."""
        for i in range(self.shape.L):
            for weight in (
                self.layer(i).linear,
                self.layer(i).bias,
                self.layer(i).out_AK,
                self.layer(i).later,
            ):
                if weight is not None:
                    weight.mul_(by)

    def save(self, path: Path, facts: dict[str, Any]) -> int:
        """Writes fp16 weights with their form and `facts`; returns the file's bytes."""
        from safetensors.torch import save_file

        state = {name: value.detach().half().cpu().contiguous() for name, value in self.state_dict().items()}
        words = {"form": asdict(self.form), "shape": asdict(self.shape), "facts": facts}
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(state, str(path), {"gates": json.dumps(words)})
        return path.stat().st_size
