"""What training asks of a model, and what it changes about it for a while."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from modlab.errors import ModlabError
from modlab.execution.projections import PROJECTIONS
from modlab.execution.routed import RoutedModule
from modlab.hf.anatomy import decoder_layers
from modlab.routing.router import is_router
from modlab.routing.state import is_converted
from modlab.training.config import TrainConfig
from modlab.training.loader import Batch
from modlab.training.sharding import is_part, whole

DISTIL_LR = 0.01
"""Of routers that are distilled: so high a rate was the largest find (docs/log.md)."""


def forward(model: Any, batch: Batch, **more: Any) -> Any:
    """What the model returns for a batch, without a cache and without a loss of its own.

    Args:
        model: dense or converted, maybe wrapped.
        batch: [B, T] tensors by name.
        more: further keywords of its forward.
    """
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    return model(**inputs, use_cache=False, **more)


def balancing_loss(model: Any, output: Any) -> Tensor | None:
    """What a mixture of experts adds to its loss to balance its experts, scalar; None if nothing.

    It does if `config.output_router_logits` is set.

    Raises:
        ModlabError: it has such a loss, but no weight for it that is known here; or it could not be
            computed, which transformers reports as the number 0.
    """
    loss = getattr(output, "aux_loss", None)
    if loss is None:
        return None
    if not isinstance(loss, Tensor):
        raise ModlabError(
            f"{type(model).__name__} returned no router logits to balance its experts by (aux_loss={loss}), "
            "as some types do in older versions of transformers: set config.output_router_logits=False to "
            "train without balancing, or take a newer version."
        )
    for place in (model, model.config.get_text_config()):
        for name in ("router_aux_loss_coef", "aux_loss_coef"):
            weight = getattr(place, name, None)
            if weight is not None:
                return loss * weight
    raise ModlabError(
        f"{type(model).__name__} returns a balancing loss (aux_loss) but has no router_aux_loss_coef to "
        "weigh it by: set config.output_router_logits=False to train without it."
    )


def real_of(batch: Batch) -> Tensor:
    """Which tokens are not padding, bool [B, T]."""
    return batch.get("attention_mask", torch.ones_like(batch["input_ids"])) != 0


def routers_learn(model: nn.Module) -> bool:
    """Whether training would change a router, or a weight of a skip's own."""
    return any(p.requires_grad and is_router(name) for name, p in model.named_parameters())


def fresh_routers(model: Any) -> list[int]:
    """Layers of a converted model whose routers were neither fitted nor trained: their gates are all alike.
    Where weights are sharded, every process has to ask."""
    found = []
    for i in model.mod.layers:
        router: Any = decoder_layers(model)[i].mod_router
        weights = [p for name, p in router.named_parameters() if name.endswith("weight")]
        # whole: with fewer gates than processes some of these hold no part, and would say otherwise
        if not any(bool(whole(p).any()) for p in weights):
            found.append(i)
    return found


def parameter_groups(model: nn.Module, config: TrainConfig) -> list[dict[str, Any]]:
    """AdamW's groups: matrices with weight decay, vectors without, routers with a rate of their own; a skip's
    projections, copies of the base's, with the base's rate and no decay.

    Raises:
        ModlabError: nothing to train.
    """
    groups: dict[str, list[nn.Parameter]] = {"matrix": [], "vector": [], "router": [], "projection": []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            kind = "router" if is_router(name) else "matrix" if parameter.dim() > 1 else "vector"
            if f".{PROJECTIONS}." in name:
                kind = "projection"
            groups[kind].append(parameter)
    if not any(groups.values()):
        raise ModlabError("No parameter of the model requires a gradient: there is nothing to train.")
    router_lr = config.router_lr
    if router_lr is None:
        router_lr = DISTIL_LR if config.objective == "distil" else config.lr
    return [
        {
            "params": parameters,
            "peak_lr": router_lr if kind == "router" else config.lr,
            "weight_decay": config.weight_decay if kind == "matrix" else 0.0,
        }
        for kind, parameters in groups.items()
        if parameters
    ]


@contextlib.contextmanager
def lent_to_training(model: Any, config: TrainConfig) -> Iterator[None]:
    """Inside, the model is in train mode with the dtypes and frozen weights that a run needs; afterwards it
    has its own back, is in eval mode, and its thresholds are plain numbers.
    """
    with contextlib.ExitStack() as stack:
        stack.callback(model.eval)
        if is_converted(model):
            stack.enter_context(_routing_lent(model.mod))
        distils = config.objective == "distil"
        if config.freeze_base or (distils and not hasattr(model, "disable_adapter")):
            stack.enter_context(_base_frozen(model))
        elif is_converted(model):
            model.mod.base_trained = True
        if config.freeze_below:
            stack.enter_context(_frozen(model, _routers_below(model)))
        stack.enter_context(_trained_in_fp32(model, config.freeze_base or distils))
        model.train()
        yield


@contextlib.contextmanager
def _routing_lent(routing: Any) -> Iterator[None]:
    what_if = routing.what_if
    try:
        yield
    finally:
        routing.what_if, routing.noise = what_if, None
        routing.row_shift = routing.row_recent = None
        # a run that failed between two steps leaves tensors, which nothing can save
        routing.thresholds.update({layer: float(p) for layer, p in routing.thresholds.items()})


def _base_frozen(model: Any) -> contextlib.AbstractContextManager[None]:
    return _frozen(model, {n for n, p in model.named_parameters() if p.requires_grad and not is_router(n)})


def _routers_below(model: Any) -> set[str]:
    """Names of what conversion added below the point where prompt tokens leave, as far as it would learn."""
    below = {id(p) for layer in decoder_layers(model)[: model.mod.first_left] for p in layer.parameters()}
    parameters = model.named_parameters()
    return {name for name, p in parameters if p.requires_grad and id(p) in below and is_router(name)}


@contextlib.contextmanager
def _frozen(model: Any, frozen: set[str]) -> Iterator[None]:
    """Inside, parameters of these names, all of which would learn, do not."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter.requires_grad and name not in frozen)
    try:
        yield
    finally:
        for name, parameter in model.named_parameters():  # FSDP2 has put others in the place of some
            parameter.requires_grad_(parameter.requires_grad or name in frozen)


@contextlib.contextmanager
def _trained_in_fp32(model: Any, freeze_base: bool) -> Iterator[None]:
    """AdamW's steps are too small for bf16 weights. Those of a frozen base take none and stay as they are.

    Weights that FSDP2 shards meanwhile stay in fp32.
    """
    dtypes = {
        name: parameter.dtype
        for name, parameter in model.named_parameters()
        if parameter.is_floating_point()
        and parameter.dtype != torch.float32
        and (parameter.requires_grad or not freeze_base)
        and not is_part(parameter)
    }
    for name, parameter in model.named_parameters():
        if name in dtypes:
            parameter.data = parameter.data.float()
    try:
        yield
    finally:
        for name, parameter in model.named_parameters():
            if name in dtypes and not is_part(parameter):
                parameter.data = parameter.data.to(dtypes[name])


class Compilation:
    """Switches torch.compile for a model's training forwards on and off; off until `on` is called.

    A converted model cannot be compiled as a whole: how many tokens a routed layer keeps shapes its tensors,
    and is read on the host. Its layers' own forwards can. All layers of one class share one compiled
    function; packed steps make a second one, with a dynamic number of tokens.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.layers: list[nn.Module] = (
            [layer for layer in decoder_layers(model) if not isinstance(layer, RoutedModule)]
            if is_converted(model)
            else []
        )

    def on(self) -> None:
        """From here on forwards run compiled."""
        if not is_converted(self.model):
            self.model.compile(dynamic=False)
            return
        self.model.mod.compile_layers = True
        for layer in self.layers:
            layer.compile()

    def off(self) -> None:
        """From here on they run as they are. What layers were compiled to is kept for the next `on`."""
        if not is_converted(self.model):
            self.model._compiled_call_impl = None
            return
        self.model.mod.compile_layers = False
        for layer in self.layers:
            layer._compiled_call_impl = None

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Inside, forwards run as they are: for eval mode it would be compiled a second time."""
        if not is_converted(self.model):
            yield  # its `forward` is called past the compiled call
            return
        self.off()
        try:
            yield
        finally:
            self.on()
