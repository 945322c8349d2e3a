"""torch.compile for parts of a decoding step and of a prefill; what it cannot take runs as it is.

Shape letters: S tokens of all rows in one line, D model dim.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from modlab.hf.anatomy import NORM

Function = Callable[..., Any]

MAX_COMPILED = 64
"""Variants of a layer that torch.compile may make (batch sizes, layer types) before it gives up."""

LONG_LINE = 4096
"""Tokens from which on norms outside of compiled layers are compiled. A norm written in Python moves some 36
bytes an element through memory where one kernel moves 4; a short line is bound by the host, to which a
compiled call may cost more. Where exactly to draw the line has not been measured on a GPU.
"""


class Compiler:
    """Makes functions fast.

    Args:
        enabled: False gives every function back as it is.

    Attributes:
        graphs: by name, what is compiled in one piece.
        whole_functions: the same, and runs as it is where that fails.
        eager: by name, why one of them runs as it is.
    """

    def __init__(self, enabled: bool) -> None:
        self.enabled = enabled
        self.eager: dict[str, str] = {}
        self.graphs: dict[str, Function] = {}
        self.whole_functions: dict[str, Function] = {}

    def layer(self, function: Function) -> Function:
        """`function`, which may run uncompiled in between where it has to."""
        return torch.compile(function, dynamic=False) if self.enabled else function

    def graph(self, name: str, function: Function) -> Function:
        """`function` compiled in one piece, once for all who ask by this name; it fails where that fails."""
        if name not in self.graphs:
            self.graphs[name] = torch.compile(function, dynamic=False, fullgraph=True)
        return self.graphs[name]

    def whole(self, name: str, function: Function) -> Function:
        """`function` compiled in one piece, or as it is if that fails: it is small, and no reason to go
        without the rest. `name` tells the functions of a step apart, from one pass over it to the next.
        """
        if self.enabled and name not in self.whole_functions:
            self.whole_functions[name] = self._tried(name, function)
        return self.whole_functions.get(name, function)

    def _tried(self, name: str, function: Function) -> Function:
        fast = self.graph(name, function)

        def run(*args: Any, **kwargs: Any) -> Any:
            if name not in self.eager:
                try:
                    return fast(*args, **kwargs)
                except Exception as error:  # what is wrong with the function itself shows below
                    if is_lack_of_memory(error):
                        raise
                    self.eager[name] = reason_of(error)
            return function(*args, **kwargs)

        return run


def reason_of(error: Exception) -> str:
    """The first two lines of an error: torch.compile's begin with which backend failed."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:2]) or type(error).__name__


def is_lack_of_memory(error: BaseException | None) -> bool:
    """Whether a GPU without room is behind an error; that says nothing of what was to be compiled."""
    while error is not None:
        if isinstance(error, torch.OutOfMemoryError):
            return True
        error = error.__cause__ or error.__context__
    return False


def outside_layers(decoder: nn.Module, layers: Iterable[nn.Module]) -> dict[str, nn.Module]:
    """The decoder's own modules that compute something in every step: rotary tables, the final norm.

    Not the list of layers, nor embeddings and linear maps, which are one kernel each, nor what has neither
    weights nor tables (dropout).
    """
    inner = set(layers)
    return {
        name: child
        for name, child in decoder.named_children()
        if not isinstance(child, (nn.Embedding, nn.Linear))
        and any(True for _ in (*child.parameters(), *child.buffers()))
        and inner.isdisjoint(child.modules())
    }


def norm_forwards(modules: Iterable[nn.Module], compiler: Compiler) -> dict[nn.Module, Function]:
    """What the norms among the children of `modules` run in a prefill: one compiled function for all of them
    and for all lengths. torch's own norms are one kernel already.
    """
    run = compiler.whole("norms of a prefill", _run_norm)
    norms = (norm for module in modules for norm in python_norms(module))
    return {norm: partial(_long_norm, run, type(norm).forward, norm) for norm in norms}


def python_norms(module: nn.Module) -> list[nn.Module]:
    """The norms among a module's children that are written in Python, and so are several kernels."""
    return [
        norm
        for norm in module.children()
        if NORM.search(type(norm).__name__)
        and not type(norm).__module__.startswith("torch.")
        and "forward" not in norm.__dict__
    ]


def _long_norm(run: Function, forward: Function, norm: nn.Module, x_1SD: Tensor, *args: Any) -> Any:
    if x_1SD.dim() != 3 or x_1SD.shape[1] < LONG_LINE or args:
        return forward(norm, x_1SD, *args)
    torch._dynamo.maybe_mark_dynamic(x_1SD, 1)
    return run(forward, norm, x_1SD)


def _run_norm(forward: Function, norm: nn.Module, x_1SD: Tensor) -> Any:
    return forward(norm, x_1SD)
