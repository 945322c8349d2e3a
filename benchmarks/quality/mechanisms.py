"""What some arms change that modlab itself does not offer: controls, and ideas on trial.

A mechanism adds parameters to a converted model (before its optimiser is made) and holds hooks on it while it
is trained and scored. An idea that wins moves into modlab; one that loses stays here, with its numbers in
docs/log.md.

Shape letters: B rows, T tokens, D model dim.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modlab.routing.router import Router
from modlab.routing.state import masked_execution, routing_override

Mechanism = Callable[[Any, float], contextlib.AbstractContextManager[None]]
"""``mechanism(model, keep_ratio)``: active inside the context."""


def layers_of(model: Any) -> dict[int, Any]:
    """The routed layers of a converted Llama, by index."""
    return {i: model.model.layers[i] for i in model.mod.layers}


@contextlib.contextmanager
def static_drop(model: Any, keep_ratio: float) -> Iterator[None]:
    """No token but the protected first ones passes the routed layers: they are left out, or (`skip="kv"`) see
    recent tokens alone."""
    first = model.mod.config.keep_first
    with routing_override(model, lambda layer, gate, position: position < first):
        yield


@contextlib.contextmanager
def random_routing(model: Any, keep_ratio: float) -> Iterator[None]:
    """Every token is kept by chance, first tokens always."""
    first = model.mod.config.keep_first

    def keep(layer: int, gate: Tensor, position: Tensor) -> Tensor:
        return (torch.rand_like(gate) < keep_ratio) | (position < first)

    with routing_override(model, keep):
        yield


class TwoLayerRouter(Router):
    """Router with a hidden layer: logit = w·silu(W x) + b. The last layer starts at zero, as a linear one."""

    def __init__(self, hidden_size: int, init_gate: float, device: Any, inner: int = 64) -> None:
        super().__init__(inner, init_gate, device)
        self.inner = nn.Parameter(torch.randn(inner, hidden_size, device=device) * hidden_size**-0.5)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Router logits, fp32 [B, T]."""
        with torch.autocast(x_BTD.device.type, enabled=False):
            normed = F.rms_norm(x_BTD.float(), x_BTD.shape[-1:])
            return super().forward(F.silu(F.linear(normed, self.inner)))


@contextlib.contextmanager
def two_layer_router(model: Any, keep_ratio: float) -> Iterator[None]:
    """Each router becomes one with a hidden layer of 64."""
    for layer in layers_of(model).values():
        if not isinstance(layer.mod_router, TwoLayerRouter):
            weight = layer.mod_router.weight
            layer.mod_router = TwoLayerRouter(weight.numel(), model.mod.config.init_gate, weight.device)
    yield


class NormedRouter(Router):
    """Linear router on the RMS-normalised residual stream, whose length grows with depth."""

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Router logits, fp32 [B, T]."""
        return super().forward(F.rms_norm(x_BTD.float(), x_BTD.shape[-1:]))


@contextlib.contextmanager
def normed_router(model: Any, keep_ratio: float) -> Iterator[None]:
    """Each router reads the normalised residual stream."""
    for layer in layers_of(model).values():
        if not isinstance(layer.mod_router, NormedRouter):
            weight = layer.mod_router.weight
            layer.mod_router = NormedRouter(weight.numel(), model.mod.config.init_gate, weight.device)
    yield


class Adapter(nn.Module):
    """Low-rank map that a skipped token passes instead of its layer; zero at first."""

    def __init__(self, size: int, rank: int, device: Any) -> None:
        super().__init__()
        self.down = nn.Linear(size, rank, bias=False, device=device)
        self.up = nn.Linear(rank, size, bias=False, device=device)
        nn.init.zeros_(self.up.weight)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """[B, T, D] in and out."""
        return self.up(F.silu(self.down(F.rms_norm(x_BTD, x_BTD.shape[-1:]))))


@contextlib.contextmanager
def skip_adapter(model: Any, keep_ratio: float) -> Iterator[None]:
    """What a layer leaves of a skipped token is x + adapter(x), of rank 32."""
    with contextlib.ExitStack() as stack:
        for index, layer in layers_of(model).items():
            if not hasattr(layer, "mod_adapter"):
                weight = layer.mod_router.weight
                layer.mod_adapter = Adapter(weight.numel(), 32, weight.device)

            def add(module: Any, args: Any, kwargs: Any, output: Tensor, index: int = index) -> Tensor:
                x_BTD = args[0] if args else kwargs["hidden_states"]
                keep = model.mod.call.decisions[index].keep
                return output + module.mod_adapter(x_BTD) * (~keep)[..., None].to(output.dtype)

            stack.callback(layer.register_forward_hook(add, with_kwargs=True).remove)
        yield


class _WithPenalty(torch.autograd.Function):
    """Passes a tensor on; in the backward pass `penalty` gets the gradient that a loss term has."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, penalty: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        return gradient, gradient.new_ones((), dtype=torch.float32)


@contextlib.contextmanager
def separate_mlp_router(model: Any, keep_ratio: float) -> Iterator[None]:
    """For skip="attention": the MLP of each routed layer has a router of its own, with the same target.

    In masked form (the MLP runs and is multiplied by 0 or 1): it answers what quality it gives, not how fast
    it would be. `mod_mlp_kept` of the model is the share of tokens kept in the latest forward, by layer.
    """
    model.mod_mlp_kept = {}
    with contextlib.ExitStack() as stack:
        for index, layer in layers_of(model).items():
            if not hasattr(layer, "mod_mlp_router"):
                weight = layer.mod_router.weight
                layer.mod_mlp_router = NormedRouter(weight.numel(), model.mod.config.init_gate, weight.device)

            def gate(
                module: Any, args: Any, output: Tensor, index: int = index, layer: Any = layer
            ) -> Tensor:
                soft = torch.sigmoid(layer.mod_mlp_router(args[0]))
                hard = (soft >= 0.5).float()
                model.mod_mlp_kept[index] = hard.mean().detach()
                through = hard + soft - soft.detach()
                output = output * through[..., None].to(output.dtype)
                if not module.training:
                    return output
                return _WithPenalty.apply(output, 2.0 * (through.mean() - keep_ratio).square())

            stack.callback(layer.mlp.register_forward_hook(gate).remove)
        yield


SHARED = "modlab_shared_kv"


@contextlib.contextmanager
def shared_kv(model: Any, keep_ratio: float) -> Iterator[None]:
    """A skipped token leaves behind the keys and values that the layer below holds for it.

    Kept tokens of a routed layer then attend to every token: to kept ones by this layer's K and V, to skipped
    ones by those of the layer below, which are cached there anyway: no memory is added, and no attention work
    is saved on the key side. In masked form, by an attention function of its own (registered in transformers
    under a name that only this model uses).
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    below: dict[str, tuple[Tensor, Tensor]] = {}

    def attend(
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Any,
        scaling: float,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        call = model.mod.call
        decision = call.decisions.get(module.layer_idx)
        if module.layer_idx in model.mod.layers and "kv" in below and decision is not None:
            keep = decision.keep[:, None, :, None]
            key, value = (
                torch.where(keep, own, other) for own, other in zip((key, value), below["kv"], strict=True)
            )
        below["kv"] = (key, value)
        groups = query.shape[1] // key.shape[1]
        if groups > 1:
            key, value = (t.repeat_interleave(groups, dim=1) for t in (key, value))
        out = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling)
        return out.transpose(1, 2).contiguous(), None

    AttentionInterface.register(SHARED, attend)
    AttentionMaskInterface.register(SHARED, sdpa_mask)
    before = model.config._attn_implementation
    model.set_attn_implementation(SHARED)
    try:
        with masked_execution(model):
            yield
    finally:
        model.set_attn_implementation(before)


MECHANISMS: dict[str, Mechanism] = {
    "static": static_drop,
    "random": random_routing,
    "two-layer": two_layer_router,
    "normed": normed_router,
    "adapter": skip_adapter,
    "separate-mlp": separate_mlp_router,
    "shared-kv": shared_kv,
}
