"""Whether one branch of a decoder layer, its attention or its MLP, can be skipped on its own.

A routed branch gives zero for a skipped token. That skips it where the layer adds the branch's output to a
residual that it holds itself. A branch that adds the residual on its own (BLOOM, MPT, BERT) would lose the
token with it. No list says which those are; the layer is run on random numbers.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from modlab.execution.masked_keys import with_gradient
from modlab.execution.masks import as_attention_mask, packed_mask
from modlab.hf import anatomy
from modlab.hf.arguments import LayerArguments, hidden_name

Branch = Literal["attention", "mlp", "kv"]
"""What a token may skip alone: a branch, or the attention's storing of its keys and values."""
TOKENS = 3


@dataclass(frozen=True)
class BranchForm:
    """How a layer uses one of its branches.

    Attributes:
        cannot_skip: why the branch cannot be skipped on its own; "" if it can.
        in_tuple: whether it returns its output in a tuple.
        extra_outputs: how many further outputs that tuple has.
    """

    cannot_skip: str = ""
    in_tuple: bool = False
    extra_outputs: int = 0


@torch.no_grad()
def branch_forms(
    model: PreTrainedModel, layers: nn.ModuleList, indices: Iterable[int], branch: Branch
) -> dict[int, BranchForm]:
    """The form of a branch in each of the layers `indices`: one forward of three tokens up to the last of
    them, then a few of each layer alone.

    Args:
        model: the dense model.
        layers: its decoder layers.
        indices: the layers to look at; each has a module for the branch.
        branch: ``"attention"``, ``"mlp"``, or ``"kv"``: then the attention runs for every token, and need not
            give zero.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        calls = _layer_calls(model, layers, set(indices))
        return {index: _form(layers[index], branch, calls.get(index)) for index in indices}
    finally:
        for module, training in modes:
            module.training = training


def _form(layer: nn.Module, branch: Branch, call: _Call | None) -> BranchForm:
    name = anatomy.mlp_name(layer) if branch == "mlp" else anatomy.attention_name(layer)
    assert name is not None, "convert asks for layers that have the branch"
    if call is None:
        return BranchForm("the layer does not run where the input is text alone")
    module = layer.get_submodule(name)
    first = hidden_name(type(module))
    seen: list[tuple[Any, Any, Any]] = []

    def watch(_module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        seen.append((args, kwargs, output))

    y = call(layer, [module.register_forward_hook(watch, with_kwargs=True)])
    if len(seen) != 1:
        return BranchForm(f"{name} runs {len(seen)} times in a forward")
    args, kwargs, output = seen[0]
    given = args[0] if args else kwargs.get(first)
    in_tuple = isinstance(output, (tuple, list))
    form = BranchForm("", in_tuple, len(output) - 1 if in_tuple else 0)
    out = output[0] if in_tuple else output
    if not isinstance(given, Tensor) or given.dim() != 3 or given.shape[:2] != (1, TOKENS):
        return replace(form, cannot_skip=f"{name} is not given one vector a token")
    if not isinstance(out, Tensor) or out.numel() != given.numel():
        return replace(form, cannot_skip=f"{name} does not return one vector a token")
    if branch == "mlp" and (others := _other_mlps(layer, name)):
        return replace(form, cannot_skip=f"the layer has a second MLP beside {name} ({', '.join(others)})")
    if in_tuple and not _same_without_extras(call, layer, y, module, form):
        needs = "beside the hidden states" if form.extra_outputs else f"as a {type(output).__name__}"
        return replace(form, cannot_skip=f"the layer needs what {name} returns {needs}")
    if branch == "kv":
        if not _adds_its_mask(module, args, kwargs):
            return replace(form, cannot_skip=f"{name} does not add its mask to its scores, to weigh keys by")
    elif not _gives_zero(module, args, kwargs):
        return replace(form, cannot_skip=f"{name} adds the residual itself, not the layer")
    return form


def _adds_its_mask(attention: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether the attention has a gradient in the entries of an additive mask; training weighs keys by it."""
    arguments = LayerArguments(type(attention), args, kwargs)
    name = arguments.mask_name()
    if name is None:
        return False
    if "flash" in str(getattr(getattr(attention, "config", None), "_attn_implementation", "")):
        return True  # takes no mask at all, which a forward will say
    with torch.enable_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # bitsandbytes: "not registered to the Autograd key"
        hidden = with_gradient(arguments.hidden)
        columns = torch.arange(TOKENS, device=hidden.device)[None]
        mask = as_attention_mask(packed_mask(columns, columns), "additive", hidden.dtype)
        weights = torch.zeros_like(mask, requires_grad=True)

        def weighed(weights: Tensor) -> Tensor:
            out, _ = arguments.run(attention, {arguments.hidden_name: hidden, name: mask + weights - 0.5})
            return out.float()

        try:
            out = weighed(weights)
            # of the weights alone: nothing is left behind in the model's parameters
            (slope,) = torch.autograd.grad(out.square().sum(), weights, allow_unused=True)
            if slope is None:
                # Weights that bitsandbytes has packed for a CPU have no backward pass: the values must tell.
                return not torch.equal(out[:, -1], weighed(-columns.to(mask.dtype))[:, -1])
        except Exception:  # whatever it makes of such a mask
            return False
    return bool(slope[..., -1, :-1].any())


def _other_mlps(layer: nn.Module, name: str) -> list[str]:
    return [
        other
        for other, child in layer.named_children()
        if other != name.split(".")[0] and anatomy.is_mlp(child)
    ]


def _same_without_extras(
    call: _Call, layer: nn.Module, wanted: Tensor, branch: nn.Module, form: BranchForm
) -> bool:
    """Whether the layer does the same where the branch returns None for its further outputs, as a routed one
    does once it has skipped a token."""

    def hook(_module: nn.Module, _args: Any, output: Any) -> Any:
        return (output[0], *[None] * form.extra_outputs)

    try:
        return torch.equal(call(layer, [branch.register_forward_hook(hook)]), wanted)
    except Exception:  # whatever the layer makes of what is not there
        return False


def _gives_zero(branch: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether the branch returns zeros once its weights do nothing: else it passes on what it was given.

    Tried by silencing the modules inside that have weights, which works for weights of any kind (quantized
    ones), then with zeros for weights, which works for modules that are not called as such. Norms stay: one
    that returns something then was given a residual (or ends the branch with a bias).
    """
    weighted = [
        (name, module)
        for name, module in branch.named_modules()
        if list(module.parameters(recurse=False)) and not anatomy.NORM.search(type(module).__name__)
    ]

    def silent_modules() -> Any:
        hooks = [module.register_forward_hook(_zero) for _, module in weighted if module is not branch]
        try:
            return branch(*args, **kwargs)
        finally:
            for hook in hooks:
                hook.remove()

    def zero_weights() -> Any:
        zeros = {
            f"{name}.{key}".lstrip("."): torch.zeros_like(weight)
            for name, module in weighted
            for key, weight in module.named_parameters(recurse=False)
        }
        return torch.func.functional_call(branch, zeros, args, kwargs)

    for attempt in (silent_modules, zero_weights):
        try:
            output = attempt()
        except Exception:  # some class of its own that takes no zeros
            continue
        out = output[0] if isinstance(output, (tuple, list)) else output
        if not out.any():
            return True
    return False


def _zero(_module: nn.Module, _args: Any, output: Any) -> Any:
    """Zeros in the place of all real numbers that a module returns."""
    if isinstance(output, (tuple, list)):
        return type(output)(_zero(_module, _args, part) for part in output)
    is_real = isinstance(output, Tensor) and output.is_floating_point()
    return torch.zeros_like(output) if is_real else output


@dataclass
class _Call:
    """What the model calls a layer with, random hidden states in the place of its own.

    Attributes:
        hidden: random, of the shape and dtype that the model's own have.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    hidden_name: str

    def __post_init__(self) -> None:
        given = self.args[0] if self.args else self.kwargs[self.hidden_name]
        generator = torch.Generator().manual_seed(0)
        self.hidden = torch.randn(given.shape, generator=generator).to(given.device, given.dtype)

    def __call__(self, layer: nn.Module, hooks: list[Any]) -> Tensor:
        """The layer's hidden states with these hooks in place, which are removed then."""
        hidden = self.hidden.clone()
        args = (hidden, *self.args[1:])
        kwargs = self.kwargs
        if not self.args:
            args, kwargs = (), {**kwargs, self.hidden_name: hidden}
        try:
            output = layer(*args, **kwargs)
        finally:
            for hook in hooks:
                hook.remove()
        return output[0] if isinstance(output, (tuple, list)) else output


class _LastLayerReached(Exception):
    pass


def _layer_calls(model: PreTrainedModel, layers: nn.ModuleList, indices: set[int]) -> dict[int, _Call]:
    """The calls of these layers in one forward, by index."""
    calls: dict[int, _Call] = {}

    def noting(index: int) -> Callable[..., None]:
        def hook(layer: Any, args: Any, kwargs: Any) -> None:
            calls[index] = _Call(args, kwargs, hidden_name(type(layer)))
            if len(calls) == len(indices):
                raise _LastLayerReached

        return hook

    hooks = [layers[i].register_forward_pre_hook(noting(i), with_kwargs=True) for i in indices]
    device = next(layers.parameters()).device
    token = 1 if getattr(model.config, "pad_token_id", None) == 0 else 0  # padding makes some models warn
    try:
        model(input_ids=torch.full((1, TOKENS), token, device=device), use_cache=False)
    except _LastLayerReached:
        pass
    finally:
        for hook in hooks:
            hook.remove()
    return calls
