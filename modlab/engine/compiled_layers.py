"""Layers of a prefill by torch.compile: one graph for all of them and all lengths, whatever they keep.

Where a layer's keys go, and by which kernel its queries attend, follows from numbers that the host holds,
others in every layer and prompt. Traced, each number would be a graph of its own. So the attention is an
operator that torch.compile does not look into, and so is an MLP that runs in pieces: who runs a layer says,
for the thread, what these compute. The rest is one graph, of an unknown number of tokens: norms, rotary
embeddings, activations and sums in few kernels, launched by one call.

On an H200 a dense prompt of 4,096 tokens of the 8B shape spends 18 of 103 ms in what is fused here, in 28
kernels a layer (docs/log.md).

Shape letters: S tokens of a line, N query heads, G kv heads, H head dim, D model dim.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from modlab.engine.compiled import Compiler, is_lack_of_memory, reason_of
from modlab.errors import ModlabError
from modlab.execution.routed import RoutedModule
from modlab.hf.arguments import forward_signature

Function = Callable[..., Any]
Attend = Callable[[Tensor, Tensor, Tensor, float | None], Tensor]

LAYERS, MLPS = "layers of a prefill", "MLPs of a prefill"

LEAST_TOKENS = 512
"""Tokens of a line from which on its layers are compiled. Fewer run before the host has launched the next
layer, and a user of short prompts alone need not wait for a compilation."""


class NotCompiled(Exception):
    """A layer could not be compiled, which is noted: the line has to run again, as it is."""


class _OfThread(threading.local):
    """What the operators below compute, for the layer that this thread runs."""

    def __init__(self) -> None:
        self.attend: Attend | None = None
        self.mlp: Function | None = None


_of_thread = _OfThread()


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def compiles_a_layer() -> bool:
    """Whether what torch.compile traces is a layer that runs here; users compile modules of theirs, too."""
    return _of_thread.attend is not None


# Not by `torch.library.custom_op`, which looks for aliases and gradients around each call: 40 us of a CPU.
_operators = torch.library.Library("modlab", "FRAGMENT")
_EXACT = (torch.Tag.needs_exact_strides,)
_operators.define("line_attention(Tensor q, Tensor k, Tensor v, float? scaling) -> Tensor", tags=_EXACT)
_operators.define("line_mlp(Tensor x) -> Tensor", tags=_EXACT)


def _attend(q_1NSH: Tensor, k_1GSH: Tensor, v_1GSH: Tensor, scaling: float | None) -> Tensor:
    assert _of_thread.attend is not None, "a compiled layer runs outside of a prefill"
    return _of_thread.attend(q_1NSH, k_1GSH, v_1GSH, scaling).contiguous()


def _attended(q_1NSH: Tensor, k_1GSH: Tensor, v_1GSH: Tensor, scaling: float | None) -> Tensor:
    _, N, S, _ = q_1NSH.shape
    return q_1NSH.new_empty(1, S, N, v_1GSH.shape[3])


def _mlp(x_1SD: Tensor) -> Tensor:
    assert _of_thread.mlp is not None, "a compiled layer runs outside of a prefill"
    out = _of_thread.mlp(x_1SD)
    if not isinstance(out, Tensor):
        raise TypeError("its MLP returns more than a tensor")
    return out.contiguous()


_operators.impl("line_attention", _attend, "CompositeExplicitAutograd")
_operators.impl("line_mlp", _mlp, "CompositeExplicitAutograd")
torch.library.register_fake("modlab::line_attention", _attended, lib=_operators)
torch.library.register_fake(
    "modlab::line_mlp", lambda x: torch.empty_like(x, memory_format=torch.contiguous_format), lib=_operators
)


def line_attention(q_1NSH: Tensor, k_1GSH: Tensor, v_1GSH: Tensor, scaling: float | None) -> Tensor:
    """What the engine's attention function computes in the layer that runs, as an operator: [1, S, N, H]."""
    out: Tensor = torch.ops.modlab.line_attention(q_1NSH, k_1GSH, v_1GSH, scaling)
    return out


def line_mlp(x_1SD: Tensor, *args: Any, **kwargs: Any) -> Any:
    """The forward that is lent to an MLP: its own in pieces, as an operator where the layer is compiled."""
    if torch.compiler.is_compiling() and not args and not kwargs:
        return torch.ops.modlab.line_mlp(x_1SD)
    assert _of_thread.mlp is not None
    return _of_thread.mlp(x_1SD, *args, **kwargs)


class LineLayers:
    """Runs the layers of one line compiled.

    Args:
        compiler: notes why they run as they are.
        tokens: of the line, S.

    Attributes:
        compiles: whether layers of this line are compiled.
    """

    def __init__(self, compiler: Compiler, tokens: int) -> None:
        self.compiler = compiler
        self.compiles = tokens >= LEAST_TOKENS and LAYERS not in compiler.eager

    def run(
        self,
        layer: Any,
        attend: Attend,
        mlp: Function | None,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """The forward of the layer as its family wrote it, compiled; of one token as it is.

        Args:
            attend: what its attention computes, of q [1, N, S, H], k and v [1, G, S, H].
            mlp: what an MLP computes that was lent `line_mlp`; None where none was.
            args, kwargs: what the model calls the layer with; S may be other than the line's.

        Raises:
            NotCompiled: torch.compile fails on the layer, or what it made does.
        """
        own, dense = _of_thread, as_dense(layer)
        forward = type(dense).forward
        hidden, others = by_name(type(dense), args, kwargs)
        own.attend, own.mlp = attend, mlp
        try:
            if not _marked(hidden, others):
                return forward(dense, hidden, **others)
            return self._compiled(forward, dense, hidden, others)
        finally:
            own.attend = own.mlp = None

    def _compiled(self, forward: Function, layer: nn.Module, hidden: Tensor, others: dict[str, Any]) -> Any:
        try:
            return self.compiler.graph(LAYERS, _run)(forward, layer, hidden, **others)
        except ModlabError:
            raise
        except Exception as error:  # what is wrong with the layer itself shows when it runs as it is
            if is_lack_of_memory(error):
                raise
            self.compiler.eager[LAYERS] = reason_of(error)
            raise NotCompiled from error

    def run_mlp(self, mlp: Any, x_1SD: Tensor) -> Any:
        """The forward of an MLP, of all tokens or a piece of them."""
        dense = as_dense(mlp)
        forward = type(dense).forward
        if x_1SD.dim() == 3 and len(x_1SD) == 1:
            x_1SD = x_1SD[0][None]  # the strides of a whole tensor, where it is a piece
        if not _marked(x_1SD, {}):
            return forward(dense, x_1SD)
        return self.compiler.whole(MLPS, _run)(forward, dense, x_1SD)


def as_dense(module: Any) -> Any:
    """The same module, with all that it holds, of the class that it has without a router: routed layers and
    others have one graph then."""
    if not isinstance(module, RoutedModule):
        return module
    dense = module.dense_class.__new__(module.dense_class)
    object.__setattr__(dense, "__dict__", module.__dict__)
    return dense


def by_name(layer_class: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
    """A layer's hidden states, and its other arguments by their names, however the model passed them."""
    names = list(forward_signature(layer_class).parameters)
    given = dict(zip(names, args, strict=False)) | kwargs
    hidden: Tensor = given.pop(names[0])
    return hidden, given


def _marked(hidden: Tensor, others: dict[str, Any]) -> bool:
    """Tells torch.compile which axes are as long as there are tokens, the first of them in each tensor.

    A graph that would hold for this number alone is then an error. False where there is no other: of one
    token, or of a state that is not [1, S, D].
    """
    tokens = hidden.shape[1] if hidden.dim() == 3 and len(hidden) == 1 else 0
    if tokens < 2:
        return False
    torch._dynamo.mark_dynamic(hidden, 1)
    for value in others.values():
        for tensor in value if isinstance(value, (tuple, list)) else (value,):
            if isinstance(tensor, Tensor) and tokens in tensor.shape:
                torch._dynamo.maybe_mark_dynamic(tensor, tensor.shape.index(tokens))
    return True


def _run(forward: Function, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return forward(module, *args, **kwargs)
