"""Where things are in a model of any architecture: decoder, layers, attention, MLP, ends of branches.

Found by structure, not by a list of architectures, so that the next release of transformers is not a
surprise.
"""

from __future__ import annotations

import inspect
import re
import sys
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.cache_utils import (
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionCacheLayerMixin,
)

from modlab.errors import ModlabError
from modlab.hf.arguments import MASK_NAMES, forward_signature
from modlab.hf.names import CACHE_ARGUMENTS

NO_ATTENTION = "it has no softmax attention"
NO_KEYS = "its layers take neither an attention mask nor a cache of keys and values"
ATTENTION = re.compile(r"attention|attn", re.IGNORECASE)
WRAPPED = ("_checkpoint_wrapped_module", "_orig_mod", "_fsdp_wrapped_module")
"""Names under which wrappers hold the module that they call."""

NORM = re.compile(r"norm(\d+d)?$", re.IGNORECASE)
TOWER = re.compile(r"vision|visual|image|audio", re.IGNORECASE)
"""Names of what reads something else than text; it may have as many layers."""
MLP = re.compile(r"mlp|feedforward|ffn|moe|expert", re.IGNORECASE)


def decoder_of(model: PreTrainedModel) -> PreTrainedModel:
    """The stack of decoder layers with its embeddings: what turns token ids into hidden states."""
    decoder = model.get_decoder()
    base: Any = model.base_model
    # ModernBERT's answer is its language model head.
    return decoder if isinstance(decoder, PreTrainedModel) else base


def decoder_layers(model: PreTrainedModel) -> list[nn.Module]:
    """The decoder's layers, found as the module list with `num_hidden_layers` entries; what wraps a layer
    (checkpointing, torch.compile) is looked through.

    Raises:
        ModlabError: there is no such list with attention in it.
    """
    decoder = decoder_of(model)
    count = getattr(decoder.config.get_text_config(decoder=True), "num_hidden_layers", None)
    for name, module in decoder.named_modules():
        if (
            isinstance(module, nn.ModuleList)
            and len(module) == count
            and not TOWER.search(name)
            and any(attention_name(m) for m in module)
        ):
            return [unwrapped(layer) for layer in module]
    if not any(
        re.search(ATTENTION.pattern + "|mla$", type(m).__name__, re.IGNORECASE) for m in decoder.modules()
    ):
        raise ModlabError(f"{type(model).__name__} has no routable layers: {NO_ATTENTION}.")
    raise ModlabError(
        f"{type(model).__name__} has no routable layers: no list of {count} decoder layers, each with one "
        "softmax attention and a forward of its own, was found."
    )


def unwrapped(module: nn.Module) -> nn.Module:
    """The module inside wrappers that call it as it is (`checkpoint_wrapper`, `torch.compile`, FSDP)."""
    inner = next((module._modules[name] for name in WRAPPED if module._modules.get(name) is not None), None)
    return module if inner is None else unwrapped(inner)


def attention_name(layer: nn.Module) -> str | None:
    """Name of the layer's self-attention submodule, or None."""
    return _child(layer, ATTENTION)


def attends(layer: nn.Module) -> bool:
    """Whether the layer takes a mask or a cache of keys. RWKV's attention, by name alone, takes neither."""
    layer_class: Any = type(layer)
    parameters = forward_signature(layer_class).parameters.values()
    return any(
        p.name in (*MASK_NAMES, *CACHE_ARGUMENTS) or p.kind is inspect.Parameter.VAR_KEYWORD
        for p in parameters
    )


def makes_masks(attention: nn.Module) -> bool:
    """Whether the attention module puts a mask of its own together (Doge's; one with an indexer of keys), for
    which it needs the causal one whether or not a kernel could do without."""
    return hasattr(attention, "indexer") or any(
        "mask" in name and callable(getattr(type(attention), name)) for name in dir(type(attention))
    )


def shares_keys(attention: nn.Module) -> bool:
    """Whether the attention module reads another layer's keys and values, or others read its (Gemma 3n)."""
    return bool(
        getattr(attention, "is_kv_shared_layer", False) or getattr(attention, "store_full_length_kv", False)
    )


def mlp_name(layer: nn.Module) -> str | None:
    """Name of the layer's MLP (or mixture-of-experts) submodule, or None."""
    return _child(layer, MLP, other=ATTENTION)  # Qwen2MoeAttention is named after its model


def is_mlp(module: nn.Module) -> bool:
    """Whether the module's class is named after an MLP or a mixture of experts."""
    return _fits(module, MLP, other=ATTENTION)


def _child(layer: nn.Module, pattern: re.Pattern[str], other: re.Pattern[str] = NORM) -> str | None:
    """Name of the first fitting child that is no norm and not `other`; else of a child's child (DBRX)."""
    children = list(layer.named_children())
    deeper = [(f"{name}.{n}", c) for name, child in children for n, c in child.named_children()]
    return next((name for name, module in children + deeper if _fits(module, pattern, other)), None)


def _fits(module: nn.Module, pattern: re.Pattern[str], other: re.Pattern[str]) -> bool:
    class_name = type(module).__name__
    return bool(pattern.search(class_name) and not NORM.search(class_name) and not other.search(class_name))


def attention_windows(model: PreTrainedModel, num_layers: int) -> dict[int, int | None | str]:
    """By layer: its sliding window in tokens, None for full attention, or why it cannot be routed."""
    config = decoder_of(model).config.get_text_config(decoder=True)
    cache_layers = DynamicCache(config=config).layers
    types = getattr(config, "layer_types", None) or [None] * num_layers
    local = config.attention_layers if slides_by_itself(config) else [None] * num_layers
    # Sparse attention: "full" layers pick their keys themselves, "shared" ones take the pick of the layer
    # before.
    picks = [*(getattr(config, "indexer_types", None) or [None] * num_layers), None]
    windows: dict[int, int | None | str] = {}
    slides = masks_slide(decoder_of(model))
    for index in range(num_layers):
        layer = cache_layers[index] if index < len(cache_layers) else None
        if types[index] == "chunked_attention":
            windows[index] = "its attention is chunked"
        elif "shared" in picks[index : index + 2]:
            windows[index] = "its sparse attention shares its pick of keys with a neighbour"
        elif type(layer) is DynamicSlidingWindowLayer:
            slides = masks_slide(decoder_of(model))
            windows[index] = (
                int(layer.sliding_window) if slides else "its sliding window is the cache's, not the mask's"
            )
        elif type(layer) is DynamicLayer or (
            indexed(layer) and not hasattr(config, "indexer_compress_ratio")
        ):
            windows[index] = int(config.window_size) if local[index] == "local" else None
        else:
            windows[index] = _no_plain_cache(layer)
    return windows


def slides_by_itself(config: Any) -> bool:
    """Whether local attentions of a decoder with this config hide keys by themselves, as GPT-Neo's do (which
    has a name of its own for layer types), and no mask tells of it."""
    return bool(getattr(config, "attention_layers", None))


def masks_slide(decoder: nn.Module) -> bool:
    """Whether the decoder can make masks of a sliding window, as far as its module imports what makes them.

    Moshi has a window in its config, hence a cache that forgets, and masks that know nothing of it: what it
    computes depends on where a text is cut.
    """
    modules = [sys.modules.get(base.__module__) for base in type(decoder).__mro__]
    return any("sliding" in name for module in modules if module is not None for name in vars(module))


def indexed(cache_layer: Any) -> bool:
    """Whether a cache layer of transformers is that of a sparse attention whose indexer picks single keys."""
    return hasattr(cache_layer, "update_indexer")


def _no_plain_cache(layer: Any) -> str:
    """Why a layer with this cache cannot be routed."""
    name = type(layer).__name__
    if isinstance(layer, LinearAttentionCacheLayerMixin):
        with_keys = isinstance(layer, DynamicLayer)
        return "it keeps a recurrent state next to its keys and values" if with_keys else NO_ATTENTION
    if indexed(layer) or hasattr(layer, "update_index"):
        return "its attention is sparse: an indexer picks blocks of keys"
    return f"its cache layer is a {name}, not plain keys and values"
