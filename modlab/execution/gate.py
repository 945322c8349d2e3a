"""How the gate enters a routed module's output: the gate forms, shared by reference and packed execution.

Shape letters: B rows, T tokens (all of them, or the kept ones), P parallel streams, D model dim.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from modlab.routing.rule import over


def gated_output(form: str, y: Tensor, skipped: Tensor | float, gate: Tensor, training: bool) -> Tensor:
    """Output of kept tokens.

    Args:
        form: ``"straight-through"``, ``"fused"``, ``"scaled"`` where the branches inside y carry the gate
            already, or ``"stored"`` where the gate decides about the cache alone.
        y: what the module computed, [B, T, D].
        skipped: what the token would be if skipped: the module's input [B, T, D], or 0.0 for a branch.
        gate: fp32 [B, T].
        training: whether the router needs a gradient.
    """
    if form in ("scaled", "stored"):
        return y
    g = over(gate.to(y.dtype), y)
    if form == "fused":
        return skipped + g * (y - skipped)
    return y + straight_through(g) * (y - skipped) if training else y


def straight_through(g: Tensor) -> Tensor:
    """Zero in value, the gate in gradient. A 0/1 mask plus this is exactly the mask, whatever is rounded."""
    return g - g.detach()


@contextlib.contextmanager
def scaled_branches(module: nn.Module, ends: list[str], weight_BT: Tensor | None) -> Iterator[None]:
    """Inside this block what the submodules `ends` of `module` return is multiplied by `weight_BT`.

    The ends are the last modules of the attention and the MLP branch before their residual additions, so this
    is the paper's form: u = x + g·Attn(Norm(x)), x' = u + g·MLP(Norm(u)). None leaves the outputs alone.
    """
    handles = []
    if weight_BT is not None:

        def scaled(y: Tensor) -> Tensor:  # [B, T, D], or [B·T, D] as Llama 4's experts return it
            return y * weight_BT.to(y.dtype).reshape(*y.shape[:-1], 1)

        mine = threading.get_ident()

        def scale(_module: nn.Module, _args: Any, output: Any) -> Any:
            if not torch.compiler.is_compiling() and threading.get_ident() != mine:
                return output  # another thread's forward passes this hook, with gates of its own
            return (scaled(output[0]), *output[1:]) if isinstance(output, tuple) else scaled(output)

        handles = [module.get_submodule(name).register_forward_hook(scale) for name in ends]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
