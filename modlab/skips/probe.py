"""Whether a part of a decoder layer can be routed: found out by running the layer on random numbers.

A routed branch gives zero for a skipped token. That skips it where the layer adds the branch's output to a
residual that it holds itself. A branch that adds the residual on its own (BLOOM, MPT, BERT) would lose the
token with it. No list says which those are; the layer tells.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from modlab.errors import ModlabError
from modlab.execution.given_keys import why_not_given_keys
from modlab.execution.masked_keys import with_gradient
from modlab.execution.masks import as_attention_mask, packed_mask
from modlab.hf import anatomy
from modlab.hf.arguments import LayerArguments, hidden_name
from modlab.hf.model import eval_mode
from modlab.hf.up_to import TOKENS, Reached, run_up_to
from modlab.skips.base import Part, Skip
from modlab.skips.heads import heads_of
from modlab.skips.plain import attends_plainly

if TYPE_CHECKING:
    from modlab.conversion.survey import LayerFacts, Survey

NOT_REACHED = "the layer does not run where the input is text alone"


@dataclass(frozen=True)
class PartForm:
    """How a layer uses one of its parts.

    Attributes:
        refusal: why the part cannot be routed on its own; "" if it can.
        in_tuple: whether it returns its output in a tuple.
        extra_outputs: how many further outputs that tuple has.
        kv_heads, query_heads, heads_here: as of `Heads`, where the part's KV heads were asked for.
        plain: whether it is an attention that may attend to keys where they lie (`skips/plain.py`).
    """

    refusal: str = ""
    in_tuple: bool = False
    extra_outputs: int = 0
    kv_heads: int = 1
    query_heads: int = 1
    heads_here: slice | None = None
    plain: bool = False


@torch.no_grad()
def part_forms(
    found: Survey, indices: Iterable[int], skip: Skip, by_head: bool = False
) -> dict[int, dict[Part, PartForm]]:
    """The form of each part that follows the decision in each of these layers: one forward of a few tokens up
    to the last of them, then a few of each layer alone.

    Args:
        found: the dense model; its layers have the parts.
        indices: the layers to look at.
        skip: what a token may skip.
        by_head: whether the KV heads of a part have gates of their own.
    """
    with eval_mode(found.model):
        calls = _layer_calls(found.model, found.layers, set(indices))
        return {
            index: {
                part: _form(found.facts[index], part, skip, calls.get(index), by_head) for part in skip.parts
            }
            for index in indices
        }


def _form(facts: LayerFacts, part: Part, skip: Skip, call: _Call | None, by_head: bool) -> PartForm:
    if call is None:
        return PartForm(NOT_REACHED)
    if part == "layer":
        return PartForm("", call.in_tuple, call.extra_outputs)
    layer, name, module = facts.layer, facts.name_of(part), facts.module(part)
    first = hidden_name(type(module))
    seen: list[tuple[Any, Any, Any]] = []

    def watch(_module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        seen.append((args, kwargs, output))

    y = call(layer, [module.register_forward_hook(watch, with_kwargs=True)])
    if len(seen) != 1:
        return PartForm(f"{name} runs {len(seen)} times in a forward")
    args, kwargs, output = seen[0]
    given = args[0] if args else kwargs.get(first)
    in_tuple = isinstance(output, (tuple, list))
    form = PartForm("", in_tuple, len(output) - 1 if in_tuple else 0)
    out = output[0] if in_tuple else output
    if not isinstance(given, Tensor) or given.dim() != 3 or given.shape[:2] != (1, TOKENS):
        return replace(form, refusal=f"{name} is not given one vector a token")
    if not isinstance(out, Tensor) or out.numel() != given.numel():
        return replace(form, refusal=f"{name} does not return one vector a token")
    if part == "mlp" and (others := _other_mlps(layer, facts.mlp or "")):
        return replace(form, refusal=f"the layer has a second MLP besides {name} ({', '.join(others)})")
    if in_tuple and not _same_without_extras(call, layer, y, module, form):
        needs = "in addition to the hidden states" if form.extra_outputs else f"as a {type(output).__name__}"
        return replace(form, refusal=f"the layer needs what {name} returns {needs}")
    asks = skip.probe(part)
    if asks.endswith("adds its mask") and not _adds_its_mask(module, args, kwargs):
        return replace(form, refusal=f"{name} does not add its mask to its scores, to weigh keys by")
    if asks.startswith("takes given keys") and (reason := why_not_given_keys(module, args, kwargs)):
        return replace(form, refusal=reason)
    if asks.endswith("gives zero") and not _gives_zero(module, args, kwargs):
        return replace(form, refusal=f"{name} adds the residual itself, not the layer")
    if asks.endswith("adds its mask"):
        form = replace(form, plain=attends_plainly(module, args, kwargs))
    if by_head:
        heads = heads_of(module, args, kwargs)
        return replace(
            form,
            refusal=heads.refusal,
            kv_heads=heads.kv,
            query_heads=heads.query,
            heads_here=heads.here,
        )
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
        causal = packed_mask(columns, columns)
        mask = as_attention_mask(causal, "additive", hidden.dtype)
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
    call: _Call, layer: nn.Module, wanted: Tensor, branch: nn.Module, form: PartForm
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
    """Zeros instead of all real numbers that a module returns."""
    if isinstance(output, (tuple, list)):
        return type(output)(_zero(_module, _args, part) for part in output)
    is_real = isinstance(output, Tensor) and output.is_floating_point()
    return torch.zeros_like(output) if is_real else output


@dataclass
class _Call:
    """What the model calls a layer with, random hidden states instead of its own.

    Attributes:
        hidden: random, of the shape and dtype that the model's own have.
        in_tuple, extra_outputs: the form of what the layer returned, as in `PartForm`.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    hidden_name: str
    in_tuple: bool = False
    extra_outputs: int = 0

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
        compiled = [(m, m._compiled_call_impl) for m in layer.modules() if m._compiled_call_impl is not None]
        try:
            for module, _ in compiled:  # a compiled module runs past hooks
                module._compiled_call_impl = None
            output = layer(*args, **kwargs)
        finally:
            for module, call in compiled:
                module._compiled_call_impl = call
            for hook in hooks:
                hook.remove()
        return output[0] if isinstance(output, (tuple, list)) else output


def _layer_calls(model: PreTrainedModel, layers: list[nn.Module], indices: set[int]) -> dict[int, _Call]:
    """The calls of these layers in one forward, by index; layers that do not run have none."""
    calls: dict[int, _Call] = {}

    def begins(index: int) -> Callable[..., None]:
        def hook(layer: Any, args: Any, kwargs: Any) -> None:
            calls[index] = _Call(args, kwargs, hidden_name(type(layer)))

        return hook

    def ends(index: int) -> Callable[..., None]:
        def hook(_layer: Any, _args: Any, output: Any) -> None:
            if isinstance(output, (tuple, list)):
                calls[index].in_tuple, calls[index].extra_outputs = True, len(output) - 1
            if len(calls) == len(indices):
                raise Reached

        return hook

    before = [layers[i].register_forward_pre_hook(begins(i), with_kwargs=True) for i in indices]
    run_up_to(model, [*before, *(layers[i].register_forward_hook(ends(i)) for i in indices)])
    return calls


@torch.no_grad()
def branch_ends(model: PreTrainedModel, facts: LayerFacts) -> list[str]:
    """Names of the last modules of the layer's attention and MLP branch before their residual additions.

    A branch goes on as long as the very tensor that one module returned is what the next one takes (a norm or
    dropout after the attention); the residual addition makes a new tensor. Checked: with both ends silenced
    the layer must be the identity.

    Raises:
        ModlabError: the layer is not of the form x + attention, + MLP.
    """
    layer = facts.layer
    calls: list[tuple[str, Any, Any]] = []
    inside: dict[str, tuple[Tensor, Tensor]] = {}

    def watch(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            given = args[0] if args else next(iter(kwargs.values()), None)
            calls.append((name, given, output[0] if isinstance(output, tuple) else output))

        return hook

    def silence(_module: nn.Module, _args: Any, output: Any) -> Any:
        return (output[0] * 0, *output[1:]) if isinstance(output, tuple) else output * 0

    def compare(_module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        given = args[0] if args else next(iter(kwargs.values()))
        inside["io"] = (given, output[0] if isinstance(output, tuple) else output)
        raise Reached

    def run_layer(hooks: list[Any]) -> None:
        run_up_to(model, [*hooks, layer.register_forward_hook(compare, with_kwargs=True)])

    run_layer([c.register_forward_hook(watch(n), with_kwargs=True) for n, c in layer.named_children()])
    ends = []
    for start in (facts.attention, facts.mlp):
        if start is None or start not in [name for name, _, _ in calls]:
            raise ModlabError(_not_separable(layer))
        end, tensor = start, next(out for name, _, out in calls if name == start)
        for name, given, out in calls:
            if given is tensor:
                end, tensor = name, out
        ends.append(end)

    run_layer([layer.get_submodule(end).register_forward_hook(silence) for end in ends])
    x, y = inside["io"]
    if not torch.equal(x, y):
        raise ModlabError(_not_separable(layer))
    return ends


def _not_separable(layer: nn.Module) -> str:
    return (
        f"gate='paper' needs layers of the form x + attention, then + MLP; {type(layer).__name__} is not: "
        "use gate='straight-through' or 'fused', which work on any layer."
    )
