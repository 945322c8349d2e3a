"""Projections of layers that prompt tokens leave out, in closed form: two forwards a text, no gradient.

Above the point of leaving keys and values come from the state there, by copies of the layer's own projections
that have never seen it. What the copies should say is known: the dense model says it. So for each layer the
map from what its copies read to what they miss is a system of linear equations, and routers above, which
read that state too, are moved to what they said of their own layer's state the same way. Measured on smollm2
leaving after 20 of 30 layers, 16,384 tokens of Python, KL to the dense model at 512 to 1,023 of held-out
rows: 0.443 with copies, 0.229 fitted (docs/log.md). Distillation goes on from there.

Shape letters: T tokens of a text, S tokens, D features in, O features out.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modlab.errors import ModlabError
from modlab.execution.projections import PROJECTIONS, LowRankProjection
from modlab.hf.anatomy import attention_name, decoder_layers, decoder_of
from modlab.hf.arguments import hidden_name
from modlab.hf.model import device_of, eval_mode
from modlab.routing.router import ROUTER, Router
from modlab.routing.state import routing_of, routing_off
from modlab.training.regression import features, logits

RIDGE = 1e-2
"""What is added to the diagonal, in shares of its mean; a tenth of it did as well."""

NAMES = ("k_proj", "v_proj")


class _Equations:
    """Normal equations of what a map misses, on features with a constant behind them.

    Attributes:
        missed: its squares, summed.
    """

    def __init__(self, D: int, outputs: int, device: torch.device) -> None:
        kind = torch.float32 if device.type == "mps" else torch.float64  # MPS has no fp64
        self.xx = torch.zeros(D + 1, D + 1, dtype=kind, device=device)
        self.xy = torch.zeros(D + 1, outputs, dtype=kind, device=device)
        self.missed = 0.0

    def add(self, x_SD: Tensor, y_SO: Tensor) -> None:
        x, y = F.pad(x_SD.float(), (0, 1), value=1.0), y_SO.float()
        self.xx += x.T @ x
        self.xy += x.T @ y
        self.missed += float(y.square().sum())

    def solve(self, constant: bool) -> tuple[Tensor, Tensor, float]:
        """Weights [O, D] and constants [O] to be added, zeros without `constant`; the share of what was
        missed that they explain."""
        D = len(self.xx) - (0 if constant else 1)
        xx, xy = self.xx[:D, :D], self.xy[:D]
        held = torch.full_like(xx[0], RIDGE * float(xx.diagonal().mean()))
        if constant:
            held[-1] = 0.0
        found = torch.linalg.solve(xx + held.diag(), xy)
        left = self.missed - 2 * (found * xy).sum() + (found * (xx @ found)).sum()
        explained = 1 - float(left) / self.missed if self.missed else 1.0
        weight, rest = found[: len(self.xx) - 1].T.float(), torch.zeros_like(found[0]).float()
        return weight, found[-1].float() if constant else rest, explained


@torch.no_grad()
def fit_projections(model: Any, rows: Iterable[Any]) -> dict[int, float]:
    """Fits the projections of keys and values above the point of leaving, and the routers there if they have
    been trained, to what the dense model says of the same text. Nothing is trained.

    Memory: one forward, and (D + 1)² numbers a layer above, twice with routers.

    Args:
        model: converted with `skip="prompt"` or `"kv+prompt"`, not distilled yet; below the point of leaving
            it runs as it is routed.
        rows: token ids [T] each, or rows of `modlab.data.packed`; text like that of later use, 16 rows of
            1,024 are a start.

    Returns:
        by layer the share of what the copies missed that is there now, on these rows.

    Raises:
        ModlabError: no prompt token leaves this model, or there are no rows.
    """
    routing, device = routing_of(model), device_of(model)
    if routing.first_left >= routing.num_layers:
        raise ModlabError(f"skip={routing.skip.name!r} has no projections to fit: no token leaves early.")
    above = {i: layer for i, layer in enumerate(decoder_layers(model)) if i >= routing.first_left}
    heard: dict[tuple[int, str], _Equations] = {}
    with eval_mode(model):
        for row in rows:
            given = row["input_ids"] if isinstance(row, Mapping) else row
            ids = torch.as_tensor(given, dtype=torch.long)[None].to(device)
            with routing_off(model), _noted(_dense_outputs(above)) as wanted:
                decoder_of(model)(input_ids=ids, use_cache=False)
            with _noted(_copies(above)) as said:
                decoder_of(model)(input_ids=ids, use_cache=False)
            for key, (x, y) in said.items():
                if x.shape[:-1] != wanted[key][1].shape[:-1]:
                    raise ModlabError(
                        f"layer {key[0]} does not project keys and values of all tokens at once."
                    )
                missed = (wanted[key][1].float() - y.float()).flatten(0, -2)
                one = heard.setdefault(key, _Equations(x.shape[-1], missed.shape[-1], x.device))
                one.add(x.flatten(0, -2), missed)
    if not heard:
        raise ModlabError("there are no rows to fit projections to: give some text.")
    found: dict[int, list[float]] = {}
    for (index, name), equations in heard.items():
        where: Any = above[index].get_submodule(ROUTER if name == ROUTER else f"{PROJECTIONS}.{name}")
        explained = _put(where, equations)
        if name != ROUTER:
            found.setdefault(index, []).append(explained)
    return {index: sum(shares) / len(shares) for index, shares in sorted(found.items())}


Hooked = tuple[nn.Module, tuple[int, str], Callable[..., tuple[Tensor, Tensor]]]
"""A module, what is noted of it, and how: what it reads and what it says, of its input and output."""


def _dense_outputs(above: dict[int, nn.Module]) -> Iterator[Hooked]:
    """What each layer's own projections say, and its router of its own state."""
    for index, layer in above.items():
        attention = layer.get_submodule(attention_name(layer) or "")
        for name in NAMES:
            yield attention.get_submodule(name), (index, name), lambda x, y: (x, y)
        if _is_trained(layer):
            yield layer, (index, ROUTER), _router_said(layer)


def _copies(above: dict[int, nn.Module]) -> Iterator[Hooked]:
    """The same of the copies, and of routers on the state where tokens leave."""
    for index, layer in above.items():
        for name in NAMES:
            yield layer.get_submodule(f"{PROJECTIONS}.{name}"), (index, name), lambda x, y: (x, y)
        if _is_trained(layer):
            yield above[min(above)], (index, ROUTER), _router_said(layer)


def _is_trained(layer: nn.Module) -> bool:
    """Whether the layer has a router that tells tokens apart."""
    router = getattr(layer, ROUTER, None)
    return isinstance(router, Router) and bool(router.weight.any())


def _router_said(layer: Any) -> Callable[[Tensor, Any], tuple[Tensor, Tensor]]:
    router = layer.mod_router
    return lambda x, _: (features(router, x), logits(router, x))


@contextlib.contextmanager
def _noted(hooked: Iterable[Hooked]) -> Iterator[dict[tuple[int, str], tuple[Tensor, Tensor]]]:
    """Inside this block a forward leaves what is noted."""
    found: dict[tuple[int, str], tuple[Tensor, Tensor]] = {}

    def noting(key: tuple[int, str], note: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., None]:
        def hook(module: Any, args: Any, kwargs: Any, output: Any) -> None:
            x = args[0] if args else kwargs[hidden_name(getattr(module, "dense_class", type(module)))]
            found[key] = note(x, output)

        return hook

    handles = [
        module.register_forward_hook(noting(key, note), with_kwargs=True) for module, key, note in hooked
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _put(where: Any, equations: _Equations) -> float:
    """Adds the solution to a router, a copy or a low-rank addition; the share that it explains."""
    if isinstance(where, LowRankProjection):
        weight, _, explained = equations.solve(constant=False)
        U, size, V = torch.linalg.svd(weight, full_matrices=False)
        rank = min(len(where.down), len(size))
        up = where.up.float() @ where.down.float() @ V[:rank].T + U[:, :rank] * size[:rank]
        where.up.zero_()[:, :rank] = up  # what the map's own width leaves over of the rank stays random
        where.down[:rank] = V[:rank]
        return explained
    weight, constant, explained = equations.solve(constant=where.bias is not None)
    where.weight.add_(weight.reshape(where.weight.shape).to(where.weight.dtype))
    if where.bias is not None:
        where.bias.add_(constant.to(where.bias.dtype))
    return explained
