"""Routed modules: mixins that a layer's own class is extended with, one instance at a time.

`convert` changes the class of a routed layer (of that object only) to ``(RoutedLayer, OriginalClass)``, of
the same name. The original forward stays where it is, reached by `super()`; nothing is copied and nothing
global is patched.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from modlab.errors import ModlabError
from modlab.execution.masked_keys import run_masked_keys
from modlab.execution.packed import run_packed, run_packed_mlp
from modlab.execution.reference import run_masked
from modlab.hf.arguments import LayerArguments
from modlab.routing.router import Router
from modlab.routing.state import Decision, ForwardCall, Routing, eager

CALL = "mod_call"
"""Name under which a routed layer is handed the forward it is part of, beside its own arguments."""


@dataclass
class Site:
    """One routed module in one forward: the decision, and what executing it needs to know.

    Attributes:
        layer_idx: index of the decoder layer.
        decision: gate and keep of its tokens.
        call: the model's forward.
        attention: name of the attention implementation.
        window: sliding window that matters at this length, or None.
        needs_mask: whether a kernel's own causal flag will not do.
        form: ``"straight-through"``, ``"fused"``, ``"scaled"`` (the paper's, by hooks on the branch ends), or
            ``"stored"`` (the gate changes no output).
        residual: True if a skipped token passes through (a layer), False if it adds nothing (a branch).
        recent: None where a skipped token does not run; else it runs, and the number of latest tokens that
            every token may attend to, kept or not.
        branch_ends: submodules whose output the paper's gate multiplies.
        empty_rest: what stands in for the rest of the output tuple when no token ran.
    """

    routing: Routing
    layer_idx: int
    decision: Decision
    call: ForwardCall
    attention: str
    window: int | None
    needs_mask: bool
    form: str
    residual: bool
    recent: int | None
    branch_ends: list[str]
    empty_rest: tuple[None, ...]

    @property
    def runs(self) -> Tensor:
        """The tokens that the module runs for, bool [B, T]."""
        return self.decision.keep if self.recent is None else self.call.real


class RoutedModule(nn.Module):
    """What all routed modules share. Set by `convert`: routing state, layer index, and the dense class.

    (transformers evaluates the annotations of a model's bases, so their names must exist at run time.)
    """

    dense_class: type[nn.Module]
    mod_routing: Routing
    mod_index: int
    mod_branch_ends: list[str]
    mod_extra_outputs: int
    mod_in_tuple: bool
    mod_needs_mask: bool

    def make_site(self, decision: Decision, residual: bool) -> Site:
        """The site of this module in the forward in progress."""
        routing, call = self.mod_routing, self.mod_routing.require_call()
        window = routing.windows[self.mod_index]
        scaled = routing.config.gate == "paper" and residual
        fused = "fused" if routing.config.gate == "paper" else routing.config.gate
        stores = routing.config.skip == "kv"
        recent = routing.config.keep_recent if stores else None
        return Site(
            routing=routing,
            layer_idx=self.mod_index,
            decision=decision,
            call=call,
            attention=routing.attention,
            window=window if window is not None and window < call.num_columns else None,
            needs_mask=self.mod_needs_mask,
            form="stored" if stores else "scaled" if scaled else fused,
            residual=residual,
            recent=recent,
            branch_ends=self.mod_branch_ends,
            empty_rest=(None,) * self.mod_extra_outputs,
        )

    def dense_forward(self) -> Callable[..., Any]:
        """The forward of the dense class; compiled, where training asks for that (see train_compile.py)."""
        if self.mod_routing.compile_layers:
            dense_class: Any = self.dense_class
            return functools.partial(compiled_forward(dense_class), self)
        return super().forward

    def runs_masked(self) -> bool:
        """Whether this forward takes the masked path: the reference itself, or a what-if pass."""
        call = self.mod_routing.require_call()
        return call.masked or (self.training and call.what_if)

    def joined(self, out: Tensor, rest: tuple[Any, ...], in_tuple: bool | None = None) -> Any:
        """The output in the form the dense module returns it; `in_tuple` says whether it did so just now."""
        if len(rest) != self.mod_extra_outputs:  # assignment is slow on a module
            self.mod_extra_outputs = len(rest)
        if in_tuple is not None and in_tuple != self.mod_in_tuple:
            self.mod_in_tuple = in_tuple
        return (out, *rest) if rest or self.mod_in_tuple else out

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickles and copies as (dense class, mixin, state): the extended class cannot be imported."""
        return _rebuild, (self.dense_class, type(self).__bases__[0]), self.__dict__


class RoutedLayer(RoutedModule):
    """A decoder layer with a router: decides for every token, then runs itself or lets a branch follow the
    decision.
    """

    mod_router: Router

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # The call travels with the arguments: gradient checkpointing keeps them for its recompute in the
        # backward pass, by when the model may have begun other forwards.
        kwargs.setdefault(CALL, self.mod_routing.call)
        return super().__call__(*args, **kwargs)

    @eager
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with self.mod_routing.within(kwargs.pop(CALL, None)):
            routing = self.mod_routing
            rows, time = routing.require_call().real.shape
            arguments = LayerArguments(self.dense_class, args, kwargs, (rows, time))
            self._check(tuple(arguments.hidden.shape[:2]), (rows, time))
            decision = routing.decide(self.mod_index, self.mod_router, arguments.residual_BTD, self.training)
            if routing.config.skip != "layer":
                return self.dense_forward()(*args, **kwargs)
            run = run_masked if self.runs_masked() else run_packed
            site = self.make_site(decision, residual=True)
            out, rest = run(self, self.dense_forward(), arguments, site)
            return self.joined(arguments.as_given(out), rest, arguments.in_tuple)

    def _check(self, run: tuple[int, ...], given: tuple[int, ...]) -> None:
        """Refuses what routing by token and layer cannot describe."""
        if run != given:
            raise ModlabError(
                f"the layers of this architecture run on {list(run)} positions where the input has "
                f"{list(given)} tokens: it adds or merges some, so that routing has no token to decide for."
            )
        if self.mod_index in self.mod_routing.require_call().decisions and not self.training:
            raise ModlabError(
                f"layer {self.mod_index} ran twice in one forward: architectures that loop over their layers "
                "cannot be routed."
            )


class RoutedBranch(RoutedModule):
    """An attention module that runs for the tokens that its layer's router keeps, and adds nothing to the
    others.
    """

    mod_masked = staticmethod(run_masked)
    mod_packed = staticmethod(run_packed)

    @eager
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        arguments = LayerArguments(self.dense_class, args, kwargs)
        site = self.make_site(self.mod_routing.require_call().decisions[self.mod_index], residual=False)
        run = self.mod_masked if self.runs_masked() else self.mod_packed
        return self.joined(*run(self, self.dense_forward(), arguments, site), arguments.in_tuple)


class RoutedKeys(RoutedBranch):
    """An attention module that runs for every token; its layer's router decides whose keys and values
    stay.
    """

    mod_masked = staticmethod(run_masked_keys)

    def runs_masked(self) -> bool:
        """In training too: there is no token to leave out."""
        return self.training or super().runs_masked()


class RoutedMLP(RoutedBranch):
    """An MLP that runs for the tokens that its layer's router keeps, and adds nothing to the others."""

    mod_packed = staticmethod(run_packed_mlp)


@functools.cache
def compiled_forward(dense_class: Any) -> Callable[..., Any]:
    """`dense_class.forward` by torch.compile: one function for all modules of the class."""
    return torch.compile(dense_class.forward)


@functools.cache
def extended_class(dense_class: Any, mixin: Any) -> type[nn.Module]:
    """`dense_class` with `mixin` before it; keeps the name, by which accelerate and FSDP know layers."""
    namespace = {
        "__module__": dense_class.__module__,
        "__qualname__": dense_class.__qualname__,
        "__doc__": dense_class.__doc__,
        "dense_class": dense_class,
    }
    return type(dense_class.__name__, (mixin, dense_class), namespace)


def extend(module: Any, mixin: Any) -> None:
    """Gives this one object the class ``(mixin, its own class)``."""
    dense_class: Any = type(module)
    module.__class__ = extended_class(dense_class, mixin)


def restore(module: nn.Module) -> None:
    """Gives an extended object its own class back."""
    module.__class__ = type(module).dense_class  # type: ignore[attr-defined]


def _rebuild(dense_class: type[nn.Module], mixin: type[nn.Module]) -> nn.Module:
    module = dense_class.__new__(dense_class)
    extend(module, mixin)
    return module
