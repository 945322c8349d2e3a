"""Attention in two passes: keys and values of all tokens are written, some of the tokens attend to them.

Both passes are the dense module's own forward, run by a twin: an object with the same weights, whose
projections are replaced. By which ones the pass says, in the view that stands where the cache was.

Shape letters: B rows, T tokens in, S tokens that attend (of the row that has the most), N query heads,
K keys.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from modlab.errors import ModlabError
from modlab.execution.masks import as_attention_mask, packed_mask
from modlab.execution.packed import attention_kernels, kept_first
from modlab.execution.projections import OWN, Projections, why_not_copied
from modlab.hf.arguments import LayerArguments, forward_signature
from modlab.hf.names import CACHE_ARGUMENTS
from modlab.routing.record import ForwardCall
from modlab.routing.rule import over

States = tuple[Tensor, Tensor]
"""Keys and values, as a layer's attention hands them to its cache and gets them back."""

Projection = Callable[[Tensor], Tensor]


class Written(Exception):
    """Raised once keys and values are written: the rest of the layer is not wanted."""


class View(Cache):
    """Stands where the cache was, in one pass of one layer.

    Args:
        projections: by name: what the attention module calls instead of its own.
        cache: the cache itself, or None in a forward without one.
    """

    def __init__(self, projections: dict[str, Projection], cache: Any) -> None:
        super().__init__(layers=[] if cache is None else cache.layers)
        self.projections = projections
        self.cache = cache


class WritingView(View):
    """Takes the keys and values of all tokens, and ends the pass."""

    states: States | None = None

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> States:
        """Stores them; never returns."""
        states = (key_states, value_states)
        self.states = states if self.cache is None else self.cache.update(*states, layer_idx, *args, **kwargs)
        raise Written

    def written_by(self, run: Callable[[], Any]) -> States | None:
        """What the pass `run` wrote; None if it wrote nothing."""
        with contextlib.suppress(Written):
            run()
        return self.states


class ReadingView(View):
    """Answers with what was written, whatever it is given."""

    def __init__(self, projections: dict[str, Projection], cache: Any, states: States) -> None:
        super().__init__(projections, cache)
        self.states = states

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> States:
        """All keys and values, cached ones included."""
        return self.states


def writing(attention: nn.Module, trained: Projections | None, cache: Any) -> WritingView:
    """The view of a writing pass. Without `trained` the module's own projections."""
    return WritingView(keys_alone(attention, trained), cache)


def reading(attention: nn.Module, trained: Projections | None, cache: Any, states: States) -> ReadingView:
    """The view of a reading pass."""
    return ReadingView(queries_alone(attention, trained), cache, states)


def keys_alone(attention: nn.Module, trained: nn.Module | None) -> dict[str, Projection]:
    """Projections with which no query is computed."""
    return {"q_proj": _nothing(attention, "q_proj"), **_called(attention, trained, ("k_proj", "v_proj"))}


def queries_alone(attention: nn.Module, trained: nn.Module | None) -> dict[str, Projection]:
    """Projections with which neither key nor value is computed."""
    nothing = {name: _nothing(attention, name) for name in ("k_proj", "v_proj")}
    return {**nothing, **_called(attention, trained, ("q_proj",))}


def write(view: WritingView, run: Callable[[], Any], layer_idx: int) -> States:
    """Runs a writing pass; the cache holds the new keys and values from here on.

    Returns:
        those of all tokens, cached ones included.

    Raises:
        ModlabError: the attention wrote nothing.
    """
    states = view.written_by(run)
    if states is None:
        raise ModlabError(
            f"the attention of layer {layer_idx} did not write to the cache that it was given: revert the "
            "model and convert it again."
        )
    return states


def read(
    arguments: LayerArguments,
    forward: Callable[..., Any],
    name: str,
    view: ReadingView,
    index_BS: Tensor,
    call: ForwardCall,
    attention: str,
) -> tuple[Tensor, tuple[Any, ...]]:
    """Runs a reading pass for the tokens `index_BS` alone.

    Args:
        name: of the argument that is the cache.

    Returns:
        their outputs [B, S, D], and in place of all else that the module returns Nones: it has no dense form.
    """
    x = arguments.hidden
    changes = arguments.select(_rows(index_BS), index_BS) | {name: view}
    if (mask_name := arguments.mask_name()) is not None:
        K = view.states[0].shape[-2]
        changes[mask_name] = rows_of(arguments.mask(), index_BS, K, call, attention, x.dtype)
    with attention_kernels(x):
        y_BSD, rest = arguments.run(forward, changes)
    return y_BSD, tuple(None for _ in rest)


def put_back(out_BTD: Tensor, y_BSD: Tensor, keep_BT: Tensor, index_BS: Tensor) -> Tensor:
    """`out_BTD` with y_BSD at the places `index_BS` of kept tokens. A row with fewer of them than the others
    has some in their place that are not kept: those stay as they are."""
    where = (_rows(index_BS).expand_as(index_BS), index_BS)
    y_BSD = torch.where(over(keep_BT[where], y_BSD), y_BSD, out_BTD[where])
    return out_BTD.index_put(where, y_BSD.to(out_BTD.dtype))


def _rows(index_BS: Tensor) -> Tensor:
    return torch.arange(len(index_BS), device=index_BS.device)[:, None]


def _called(attention: nn.Module, trained: nn.Module | None, names: tuple[str, ...]) -> dict[str, Projection]:
    def projection(name: str) -> Projection:
        own = attention.get_submodule(name)
        if trained is None:
            return own
        one = trained.get_submodule(name)
        return lambda x: one(x, own)

    return {name: projection(name) for name in names}


def _nothing(attention: nn.Module, name: str) -> Projection:
    """A projection that costs nothing: zeros of its width, which nobody looks at."""
    width: int = attention.get_submodule(name).out_features  # type: ignore[assignment]
    return lambda x: x.new_zeros(()).expand(*x.shape[:-1], width)


def trained_projections(attention: nn.Module, trained: Projections) -> dict[str, Projection]:
    """All three, by name."""
    return _called(attention, trained, OWN)


def twin(attention: nn.Module, projections: dict[str, Projection]) -> nn.Module:
    """An object with the module's weights and submodules, but for these projections. The module itself stays
    as it is: another thread may run it."""
    dense_class: Any = getattr(attention, "dense_class", type(attention))
    other: nn.Module = object.__new__(dense_class)
    other.__dict__.update(attention.__dict__)
    other.__dict__.update(projections)
    return other


def cache_name(layer_class: Any, attention: nn.Module) -> str | None:
    """The name under which a layer takes its cache, or hands it on to its attention; None if it has none."""
    attention_class: Any = getattr(attention, "dense_class", type(attention))
    for module_class in (layer_class, attention_class):
        names = forward_signature(module_class).parameters
        if found := next((name for name in CACHE_ARGUMENTS if name in names), None):
            return found
    return None


def going_on(keep_BT: Tensor) -> Tensor | None:
    """Time positions [B, S] of the tokens that go on, each row's in order, filled up with others where a row
    has fewer; None where that is all tokens (one host sync)."""
    most = int(keep_BT.sum(1).max())
    return None if most == keep_BT.shape[1] else kept_first(keep_BT)[:, :most]


def can_gather(arguments: LayerArguments, index_BS: Tensor, attention: str) -> bool:
    """Whether the tokens can run without the others: what has no axis for rows wants the same ones in every
    row, flash attention the latest ones."""
    flash = "flash" in attention
    if not index_BS.shape[1] or not (flash or arguments.one_row_each):
        return True
    if not flash:
        return bool((index_BS == index_BS[:1]).all())
    return not isinstance(arguments.mask(), Tensor) and are_latest(index_BS, arguments.time)


def are_latest(index_BS: Tensor, T: int) -> bool:
    """Whether they are the last tokens of the forward in every row (one host sync)."""
    S = index_BS.shape[1]
    return bool((index_BS == torch.arange(T - S, T, device=index_BS.device)).all())


def rows_of(
    mask: Any, index_BS: Tensor, K: int, call: ForwardCall, attention: str, dtype: torch.dtype
) -> Any:
    """The model's own mask as these queries see it: [B, N or 1, S, K], or None where a kernel's own rule says
    the same."""
    if isinstance(mask, Tensor) and mask.dim() == 4:
        mask_BNTK = mask.expand(len(index_BS), -1, -1, -1)
        at = index_BS[:, None, :, None].expand(-1, mask_BNTK.shape[1], -1, mask_BNTK.shape[3])
        return mask_BNTK.gather(2, at)
    T, S = len(call.columns), index_BS.shape[1]
    if "flash" in attention or (S == 1 and are_latest(index_BS, T)):
        return mask
    columns_K = torch.arange(call.num_columns - K, call.num_columns, device=index_BS.device)
    allowed = packed_mask(call.columns[index_BS], columns_K.expand(len(index_BS), -1))
    return as_attention_mask(allowed, attention, dtype)


def why_not_given_keys(attention: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    """Why an attention module cannot attend to keys and values that it is given; "" if it can. Both passes
    are tried with its own projections: they have to say what the module says.

    Args:
        attention: dense.
        args, kwargs: what its layer called it with, on a few tokens and without a cache.
    """
    if reason := why_not_copied(attention, rank=1):
        return reason
    arguments = LayerArguments(type(attention), args, kwargs)
    name = cache_name(type(attention), attention)
    if name is None:
        return "its attention takes no cache of keys and values"

    def run(view: View) -> Tensor:
        module: Any = twin(attention, view.projections)
        return arguments.run(module.forward, {name: view})[0]

    try:
        wanted, _ = arguments.run(attention, {})
        writes = writing(attention, None, None)
        states = writes.written_by(lambda: run(writes))
        if states is None:
            return "its attention does not write to its cache"
        found = run(reading(attention, None, None, states))
    except Exception as problem:  # whatever it makes of projections that are no modules
        return f"its attention does not run on keys and values that it is given ({problem})"
    largest = wanted.abs().max().float()
    if not torch.allclose(found.float(), wanted.float(), rtol=0, atol=float(1e-3 * largest), equal_nan=True):
        return "its attention gives another result where it is given its keys and values"
    return ""
