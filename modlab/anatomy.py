"""Where things are in a model of any architecture: its decoder, layers, attention and MLP, and where branches
end.

Found by structure, not by a list of architectures, so that the next release of transformers is not a
surprise.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from modlab.errors import ModlabError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ATTENTION = re.compile(r"attention|attn", re.IGNORECASE)
MLP = re.compile(r"mlp|feedforward|ffn|moe|expert", re.IGNORECASE)


def decoder_of(model: PreTrainedModel) -> PreTrainedModel:
    """The stack of decoder layers with its embeddings: what turns token ids into hidden states."""
    return model.get_decoder()


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """The decoder's layers, found as the module list with `num_hidden_layers` entries.

    Raises:
        ModlabError: there is no such list with attention in it.
    """
    decoder = decoder_of(model)
    count = getattr(decoder.config, "num_hidden_layers", None)
    for module in decoder.modules():
        if (
            isinstance(module, nn.ModuleList)
            and len(module) == count
            and any(attention_name(m) for m in module)
        ):
            return module
    raise ModlabError(
        f"{type(model).__name__} has no routable layers: no list of {count} decoder layers with softmax "
        "attention was found. modlab.families.report() lists what can be converted."
    )


def attention_name(layer: nn.Module) -> str | None:
    """Name of the layer's self-attention child, or None."""
    return _child(layer, ATTENTION)


def mlp_name(layer: nn.Module) -> str | None:
    """Name of the layer's MLP (or mixture-of-experts) child, or None."""
    return _child(layer, MLP)


def _child(layer: nn.Module, pattern: re.Pattern[str]) -> str | None:
    for name, child in layer.named_children():
        class_name = type(child).__name__
        if pattern.search(class_name) and "norm" not in class_name.lower():
            return name
    return None


def attention_windows(model: PreTrainedModel, num_layers: int) -> dict[int, int | None | str]:
    """By layer: its sliding window in tokens, None for full attention, or a string saying why it cannot be
    routed.
    """
    config = decoder_of(model).config
    cache_layers = DynamicCache(config=config).layers
    types = getattr(config, "layer_types", None) or [None] * num_layers
    windows: dict[int, int | None | str] = {}
    for index in range(num_layers):
        layer = cache_layers[index] if index < len(cache_layers) else None
        if types[index] == "chunked_attention":
            windows[index] = "chunked attention is not supported"
        elif type(layer) is DynamicSlidingWindowLayer:
            windows[index] = int(layer.sliding_window)
        elif type(layer) is DynamicLayer:
            windows[index] = None
        else:
            windows[index] = f"its cache layer is a {type(layer).__name__}, not plain keys and values"
    return windows


class _LayerReached(Exception):
    pass


@torch.no_grad()
def branch_ends(model: PreTrainedModel, layer: nn.Module) -> list[str]:
    """Names of the last modules of the layer's attention and MLP branch before their residual additions.

    A branch goes on as long as the very tensor that one module returned is what the next one takes (a norm or
    dropout after the attention); the residual addition makes a new tensor. Checked: with both ends silenced
    the layer must be the identity.

    Raises:
        ModlabError: the layer is not of the form x + attention, + MLP.
    """
    device = next(layer.parameters()).device
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
        raise _LayerReached

    def probe(hooks: list[Any]) -> None:
        """Runs the model up to the end of the layer, with `hooks` in place."""
        hooks.append(layer.register_forward_hook(compare, with_kwargs=True))
        training = model.training
        model.eval()
        try:
            model(input_ids=torch.zeros(1, 3, dtype=torch.long, device=device), use_cache=False)
        except _LayerReached:
            pass
        finally:
            model.train(training)
            for hook in hooks:
                hook.remove()

    probe([c.register_forward_hook(watch(n), with_kwargs=True) for n, c in layer.named_children()])

    ends = []
    for start in (attention_name(layer), mlp_name(layer)):
        if start is None:
            raise ModlabError(_not_separable(layer))
        end, tensor = start, next(out for name, _, out in calls if name == start)
        for name, given, out in calls:
            if given is tensor:
                end, tensor = name, out
        ends.append(end)

    probe([layer.get_submodule(end).register_forward_hook(silence) for end in ends])
    x, y = inside["io"]
    if not torch.equal(x, y):
        raise ModlabError(_not_separable(layer))
    return ends


def _not_separable(layer: nn.Module) -> str:
    return (
        f"gate='paper' needs layers of the form x + attention, then + MLP; {type(layer).__name__} is not: "
        "use gate='straight-through' or 'fused', which work on any layer."
    )
