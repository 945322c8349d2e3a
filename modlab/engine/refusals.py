"""What fast generation refuses: whole models, and single calls, which then run without it.

Forward hooks that are no reason to refuse are told apart here too.

Shape letters: B rows, T tokens in.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache

from modlab.cache.dtypes import RANGES
from modlab.config import KV_BITS
from modlab.hf.anatomy import attention_windows, decoder_layers, decoder_of, indexed
from modlab.hf.model import context_length
from modlab.hf.names import CACHE_ARGUMENTS
from modlab.hf.parts import parts
from modlab.hf.ranks import mesh_of
from modlab.routing.router import ROUTER
from modlab.routing.state import dtype_of, is_converted
from modlab.routing.table import RoutingTable

if TYPE_CHECKING:
    from modlab.engine.engine import Engine
    from modlab.routing.state import Routing


IDLE = ("output_capturing_hook", "make_inputs_require_grads")
"""Hooks that transformers leaves in a model: recorders of hidden states, there for good once somebody has
asked for some, and the one that gives embeddings a gradient. No generation here asks for either.
"""


def model_refusal(model: PreTrainedModel) -> str | None:
    """Why the engine cannot serve this model at all, or None."""
    if not isinstance(model, PreTrainedModel):
        return "it wraps the model: pass the one inside (of PEFT: peft_model.get_base_model())"
    if len({p.device for p in model.parameters()}) > 1 or getattr(model, "hf_device_map", None):
        return "its weights are spread over several devices (device_map)"
    if mesh_of(model) is not None:
        return "its weights are shared across ranks (tensor parallelism, FSDP2)"
    if getattr(model.config, "is_encoder_decoder", False):
        return "it is an encoder-decoder"
    windows = attention_windows(model, len(decoder_layers(model)))
    for index, window in windows.items():
        if window is not None:
            return f"layer {index}: " + (window if isinstance(window, str) else "it has a sliding window")
    routing: Any = model.mod if is_converted(model) else None
    has_form = routing is None or not routing.skip.why_no_engine(routing.config)
    for index, layer in enumerate(decoder_layers(model)):
        router = getattr(layer, ROUTER, None)
        if has_form and router is not None and not router.in_kernels:
            return f"layer {index}: the engine's kernels do not know its router ({type(router).__name__})"
    decoder_config = decoder_of(model).config.get_text_config(decoder=True)
    if any(indexed(layer) for layer in DynamicCache(config=decoder_config).layers):
        return "its sparse attention picks keys by an index of its own"
    return None


def call_refusal(
    model: Any,
    engine: Engine,
    generation_config: Any,
    synced_gpus: bool,
    ids_BT: Tensor,
    model_kwargs: dict[str, Any],
) -> str | None:
    """Why this call runs without the engine, or None."""
    return (
        _model_now_refusal(model, engine)
        or _settings_refusal(engine, generation_config, synced_gpus)
        or _inputs_refusal(ids_BT, model_kwargs)
        or _length_refusal(model, engine, generation_config.max_length or 0, *ids_BT.shape)
        or _routing_refusal(engine)
    )


def _model_now_refusal(model: Any, engine: Engine) -> str | None:
    """What has become of the model since fast generation was enabled."""
    if engine.routing is not None and engine.form is None:
        return engine.routing.skip.why_no_engine(engine.routing.config) or "the engine has no form for it"
    if why := rounding_refusal(engine.routing):
        return why
    if next(model.parameters()).device != engine.device:
        return "the model has moved to another device: enable fast generation again"
    if is_watched(model, set() if engine.routing is None else {hook.id for hook in engine.routing.hooks}):
        return "a forward hook is there (KVTracker has one), which would see all rows in one line, or nothing"
    if torch.is_autocast_enabled(engine.device.type):
        return "autocast is on, and a captured step would keep its types: cast the model instead"
    if model.training or any(_is_training(layer) for layer in engine.layers):
        return "the model, or a part of it, is in training mode"
    return None


def rounding_refusal(routing: Routing | None) -> str:
    """Why there is no engine for how keys and values are stored at present; "" if there is one."""
    kind = None if routing is None else RANGES.get(dtype_of(routing.ranges))
    if kind is None or kind.in_kernels:
        return ""
    dtype = kind.kv_cache_dtype
    return f"kv_cache_dtype={dtype!r}: it has no kernels for keys and values in {KV_BITS[dtype]} yet"


def _settings_refusal(engine: Engine, generation_config: Any, synced_gpus: bool) -> str | None:
    """Settings of `generate` that ask for more than tokens."""
    if synced_gpus:
        return "several processes generate in step"
    if generation_config.return_dict_in_generate:
        return "return_dict_in_generate asks for scores or a cache"
    if generation_config.use_cache is False:
        return "use_cache=False"
    if getattr(engine.caller, "own_cache", False):
        return "a cache was passed in"
    if generation_config.cache_implementation not in (None, "dynamic", "dynamic_full", "hybrid"):
        return f"cache_implementation={generation_config.cache_implementation!r}"
    if getattr(generation_config, "is_assistant", False):
        return "the model drafts for another one"
    return None


def _inputs_refusal(ids_BT: Tensor, model_kwargs: dict[str, Any]) -> str | None:
    """What comes with the tokens, and says of them what the engine does not read."""
    allowed = ("attention_mask", "position_ids", *CACHE_ARGUMENTS, "use_cache", "logits_to_keep")
    extra = sorted(name for name, value in model_kwargs.items() if value is not None and name not in allowed)
    if extra:
        return f"it was given {extra[0]}"
    mask = model_kwargs.get("attention_mask")
    if mask is not None and mask.dim() != 2:
        return "attention_mask is not two-dimensional"
    if mask is not None and not bool(mask[:, -1].all()):
        return "a row ends in padding (or is empty)"
    position_BT = model_kwargs.get("position_ids")
    if position_BT is not None:
        real_BT = torch.ones_like(ids_BT) if mask is None else mask
        wrong = (position_BT != real_BT.long().cumsum(1) - 1) & real_BT.bool()
        if bool(wrong.any()):
            return "position_ids are not those of the attention_mask"
    return None


def _length_refusal(model: Any, engine: Engine, most: int, rows: int, prompt: int) -> str | None:
    """Texts of up to `most` tokens that outgrow rotary frequencies, or prompts the model's context."""
    context = context_length(model)
    too_long = engine.routing is not None and context and prompt > context
    why = "the prompt is longer than the model's context" if too_long else None
    return _rotary_refusal(engine, most, rows, prompt) or why


def _routing_refusal(engine: Engine) -> str | None:
    """What is asked of routing in this thread at present."""
    routing = engine.routing
    if routing is None:
        return None
    if routing.is_off:
        return "routing is off"
    if routing.of_thread.recordings:
        return "routing is being recorded"
    if routing.masked:
        return "the masked reference was asked for"
    if routing.override is not None and routing.skip.decides_itself:
        return "routing_override decides instead of the skip itself"
    if routing.override is not None and not isinstance(routing.override, RoutingTable):
        return "routing_override's function is not a RoutingTable"
    return None


def _is_training(layer: nn.Module) -> bool:
    """Whether a layer, or anything in it but what routing has added, is in training mode."""
    return layer.training or any(
        part.training
        for name, child in layer.named_children()
        if not name.startswith("mod_")
        for part in parts(child)
    )


def _rotary_refusal(engine: Engine, max_length: int, rows: int, columns: int) -> str | None:
    """Why a text of up to `max_length` tokens outgrows rotary frequencies that depend on its length.

    Phi-3 starts again with other frequencies where a text crosses its first context length, which no captured
    step does. The frequencies of a forward follow its longest row, so that all rows have to be in one line.
    """
    config: Any = decoder_of(engine.model).config
    parameters = getattr(config.get_text_config(decoder=True), "rope_parameters", None) or {}
    nested = all(isinstance(value, dict) for value in parameters.values())
    for rope in parameters.values() if nested else [parameters]:
        kind = rope.get("rope_type")
        first = rope.get("original_max_position_embeddings") or config.max_position_embeddings
        if kind not in ("longrope", "dynamic") or max_length <= first:
            continue
        if kind == "longrope" and columns <= first:
            return f"the text may grow beyond {first} tokens, where the model's rotary frequencies change"
        if rows > 1 and rows * columns > engine.line_tokens:
            return (
                "the model's rotary frequencies follow the longest row, and these rows run in several lines"
            )
    return None


def is_watched(model: nn.Module, own: set[int]) -> bool:
    """Whether somebody has a forward hook on any part of the model: a recorder, `KVTracker`, a probe.

    Args:
        own: ids of the hooks by which modlab routes.
    """
    return any(
        key not in own and not _is_idle(hook)
        for module in parts(model)
        for hooks in (module._forward_hooks, module._forward_pre_hooks)
        for key, hook in hooks.items()
    )


@contextlib.contextmanager
def idle_aside(model: nn.Module) -> Iterator[None]:
    """Inside this block idle hooks are not in the model: a layer with one is compiled in pieces."""
    hooks: Any
    taken = [
        (hooks, key, hook)
        for module in parts(model)
        for hooks in (module._forward_hooks,)
        for key, hook in hooks.items()
        if _is_idle(hook)
    ]
    try:
        for hooks, key, _ in taken:
            del hooks[key]
        yield
    finally:
        for hooks, key, hook in taken:
            hooks[key] = hook


def _is_idle(hook: Any) -> bool:
    name = getattr(hook, "__qualname__", "").rpartition(".")[2]
    return name in IDLE and getattr(hook, "__module__", "").startswith("transformers.")
