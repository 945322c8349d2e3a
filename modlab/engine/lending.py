"""For the length of one forward a module runs a function of the engine's in the place of its own forward."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from modlab.layer import RoutedBranch, RoutedMLP, RoutedModule, extended_class
from modlab.routing import eager

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
