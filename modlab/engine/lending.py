"""For the length of one forward a module runs a function of the engine's instead of its own forward."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import nn

from modlab.conversion.extend import extended_class, restore
from modlab.execution.routed import RoutedBranch, RoutedMLP, RoutedModule
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
    classes: dict[Any, Any] = {m: type(m) for m in forwards if isinstance(m, (RoutedBranch, RoutedMLP))}
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
