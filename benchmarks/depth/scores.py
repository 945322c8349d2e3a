"""Gates that start from scores: who is changed least by a part of a layer may skip it.

One pass of the dense model accumulates, for each routed part, normal equations of the logarithm of its
update's norm over its state's; ridge regression on the normalised state solves them. The linear part of the
layer's router (which reads that state normalised: `router_hidden` above 0) becomes the prediction, around one
threshold for all gates, so that the largest scores are kept.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

import modlab
from benchmarks.depth.model import states
from modlab.errors import ModlabError
from modlab.hf.anatomy import attention_name, decoder_layers, mlp_name
from modlab.routing.router import HiddenRouter, normalised

RIDGE = 100.0
GAIN = 4.0  # logits a unit of the score's logarithm


class _Normal:
    """Normal equations of one gate; float64 where the device has it cheaply."""

    def __init__(self, D: int, device: torch.device) -> None:
        self.xx = torch.zeros(D + 1, D + 1, dtype=torch.float64, device=device)
        self.xy = torch.zeros(D + 1, dtype=torch.float64, device=device)
        self.yy, self.y, self.count = 0.0, 0.0, 0

    def add(self, features_SD: Tensor, score_S: Tensor) -> None:
        x = torch.cat([features_SD, torch.ones_like(features_SD[:, :1])], 1).double()
        y = score_S.double()
        self.xx += x.T @ x
        self.xy += x.T @ y
        self.yy, self.y, self.count = self.yy + float(y @ y), self.y + float(y.sum()), self.count + len(y)

    def solve(self) -> tuple[Tensor, float]:
        """Weights [D + 1], the constant last, and R² on the rows it was made of."""
        eye = torch.eye(len(self.xy), dtype=torch.float64, device=self.xy.device)
        eye[-1, -1] = 0  # the constant is free
        w = torch.linalg.solve(self.xx + RIDGE * eye, self.xy)
        left = self.yy - 2 * float(w @ self.xy) + float(w @ self.xx @ w)
        return w, 1 - left / max(self.yy - self.y**2 / self.count, 1e-12)


@torch.no_grad()
def start_from_scores(model: Any, rows: Iterable[Tensor], keep: float) -> dict[str, float]:
    """Sets the routers of a converted model.

    Args:
        model: converted with `router_hidden` above 0; `skip` of "mlp", "written" or "sublayers".
        rows: ids [B, T] each.
        keep: share of the predicted scores that stays above the threshold.

    Returns:
        R² by "layer.gate".
    """
    routing, layers = model.mod, decoder_layers(model)
    routers = {index: layers[index].mod_router for index in routing.layers}
    if not all(isinstance(router, HiddenRouter) for router in routers.values()):
        raise ModlabError("scores are regressed on normalised states: convert with router_hidden=16 or so.")
    parts = [part for part in ("attention", "mlp") if part in routing.skip.parts]
    gates = routers[routing.layers[0]].bias.numel()
    normal: dict[tuple[int, int], _Normal] = {}
    features: dict[int, Tensor] = {}
    update: dict[int, list[Tensor]] = {}
    scores: list[Tensor] = []

    def note_state(index: int) -> Any:
        def hook(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            state = args[0] if args else kwargs["hidden_states"]
            features[index], update[index] = state.flatten(0, 1), []

        return hook

    def note_update(index: int) -> Any:
        def hook(module: Any, args: Any, output: Any) -> None:
            out = output[0] if isinstance(output, tuple) else output
            update[index].append(out.float().norm(dim=-1).flatten())

        return hook

    hooks = []
    for index in routing.layers:
        layer = layers[index]
        hooks.append(layer.register_forward_pre_hook(note_state(index), with_kwargs=True))
        names = {"attention": attention_name(layer), "mlp": mlp_name(layer)}
        hooks += [
            layer.get_submodule(names[part] or "").register_forward_hook(note_update(index)) for part in parts
        ]
    kept_rows = []
    try:
        with modlab.routing_off(model):
            for ids in rows:
                states(model, ids)
                for index in routing.layers:
                    state = features[index].float()
                    size = state.norm(dim=-1)
                    by_gate = update[index] if gates > 1 else [torch.stack(update[index]).norm(dim=0)]
                    for gate, norm in enumerate(by_gate):
                        score = (norm / size).clamp(min=1e-6).log()
                        one = normal.setdefault((index, gate), _Normal(state.shape[-1], state.device))
                        one.add(normalised(state), score)
                kept_rows.append(ids)
        solved = {key: one.solve() for key, one in normal.items()}
        for index, router in routers.items():
            w = torch.stack([solved[index, gate][0] for gate in range(gates)]).float()
            router.weight.copy_(w[:, :-1].reshape(router.weight.shape))
            router.bias.copy_(w[:, -1])
        with modlab.routing_off(model):  # one threshold for all: the quantile of the predictions
            for ids in kept_rows:
                states(model, ids)
                scores += [router(features[i][None]).flatten().cpu() for i, router in routers.items()]
        middle = np.quantile(torch.cat(scores).numpy(), 1 - keep) if keep < 1 else None
        for router in routers.values():
            router.weight.mul_(GAIN)
            router.bias.sub_(0.0 if middle is None else float(middle)).mul_(GAIN)
    finally:
        for hook in hooks:
            hook.remove()
    return {f"{index}.{gate}": round(r2, 3) for (index, gate), (_, r2) in solved.items()}
