"""What the engine lends to a model for one forward: functions, linear maps, values for its attention."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from modlab.conversion.extend import extended_class, restore
from modlab.execution.routed import RoutedLayer, RoutedModule
from modlab.hf.anatomy import attention_name
from modlab.kernels.decode_linear import MOST_ROWS, decode_linear
from modlab.routing.state import eager

LENT = "mod_lent"
"""Name under which a routed sublayer holds the function that it runs."""


class LentSublayer(RoutedModule):
    """A routed attention or MLP while the engine runs.

    The class is exchanged, not the method, and its forward is closed to torch.compile: a layer is then
    compiled in two pieces, around the sublayer, once for all layers. A function of each object's own would
    cost a compilation each.
    """

    @eager
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.__dict__[LENT](*args, **kwargs)


@contextlib.contextmanager
def lent(forwards: dict[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Inside this block each module runs the given function: routed sublayers by their class, others by a
    `forward` of the object.
    """
    own = {module: module.__dict__.pop("forward") for module in forwards if "forward" in module.__dict__}
    classes: dict[Any, Any] = {m: type(m) for m in forwards if _is_sublayer(m)}
    try:
        for module, forward in forwards.items():
            if module in classes:
                module.__dict__[LENT] = forward
                module.__class__ = extended_class(classes[module].dense_class, LentSublayer)
            else:
                module.__dict__["forward"] = forward
        yield
    finally:
        for module in forwards:
            module.__dict__.pop("forward", None)
            module.__dict__.pop(LENT, None)
        for module, routed_class in classes.items():
            module.__class__ = routed_class
        for module, forward in own.items():
            module.__dict__["forward"] = forward


def _is_sublayer(module: nn.Module) -> bool:
    return isinstance(module, RoutedModule) and not isinstance(module, RoutedLayer)


@contextlib.contextmanager
def unrouted(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Inside this block each of these routed modules is of its own class, without a router to follow: where
    routing decides about the cache alone, the engine's attention function does what it decides."""
    routed: list[tuple[Any, Any]] = [(module, type(module)) for module in modules]
    try:
        for module, _ in routed:
            restore(module)
        yield
    finally:
        for module, routed_class in routed:
            module.__class__ = routed_class


def attention_modules(layer: nn.Module) -> list[nn.Module]:
    """The layer's attention with its submodules, any of which may be what calls the attention function."""
    return list(layer.get_submodule(attention_name(layer) or "").modules())


@contextlib.contextmanager
def lent_values(modules: list[list[nn.Module]], name: str, values: Sequence[Any]) -> Iterator[None]:
    """Inside this block each of `modules[i]` has the attribute `name` with value `values[i]`."""
    try:
        for group, value in zip(modules, values, strict=True):
            for module in group:
                module.__dict__[name] = value
        yield
    finally:
        for group in modules:
            for module in group:
                module.__dict__.pop(name, None)


class OneTokenLinear(nn.Linear):
    """An `nn.Linear` that is given one token of each row."""

    def forward(self, x_B1D: Tensor) -> Tensor:
        """[B, 1, D] in, [B, 1, E] out; what holds more vectors (one a head, say) runs as ever."""
        if x_B1D.numel() > MOST_ROWS * self.in_features:
            return super().forward(x_B1D)
        return decode_linear(x_B1D, self.weight, self.bias)


def as_one_token_linear(weight: Tensor, bias: Tensor | None, batch: int) -> nn.Linear:
    """A linear map of these weights as `one_token_linears` would have it."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear._parameters.update({"weight": weight, "bias": bias})  # type: ignore[dict-item]
    if batch <= MOST_ROWS and _is_plain(linear):
        linear.__class__ = OneTokenLinear
    return linear


@contextlib.contextmanager
def one_token_linears(model: nn.Module, batch: int) -> Iterator[None]:
    """Inside this block plain half-precision linear layers on a GPU are `OneTokenLinear`s, up to a `batch`
    of `MOST_ROWS`.

    The class is exchanged, not the method: torch.compile then has one graph for all layers, where a method of
    each object's own would cost a compilation each.
    """
    linears = [m for m in model.modules() if _is_plain(m)] if batch <= MOST_ROWS else []
    try:
        for linear in linears:
            linear.__class__ = OneTokenLinear
        yield
    finally:
        for linear in linears:
            linear.__class__ = nn.Linear


def _is_plain(module: nn.Module) -> bool:
    """Exactly `nn.Linear` (quantised and adapted ones know their own way), on a GPU, without hooks."""
    if type(module) is not nn.Linear or module._forward_hooks or module._forward_pre_hooks:
        return False
    weight = module.weight
    half = weight.dtype in (torch.bfloat16, torch.float16)
    return half and weight.is_cuda and type(weight.data) is Tensor and weight.stride(1) == 1
