"""Static export: layers whose routers keep next to nothing become window layers of a plain folder.

What stock engines (vLLM, SGLang, transformers) serve needs no code of this package then: the config's
`layer_types` and `sliding_window` say which layers attend to the latest tokens alone. It is an approximation:
the few tokens that those routers keep are lost, first tokens included; all other layers keep everything.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from modlab.config import KV_BITS
from modlab.errors import ModlabError, check_number
from modlab.hf.anatomy import attention_windows
from modlab.hf.model import context_length, device_of, eval_mode, vocabulary_size
from modlab.routing.router import is_router
from modlab.routing.state import routing_of, routing_off, routing_override
from modlab.saving.atomic import atomic_directory
from modlab.saving.files import CONFIG_FILE, ROUTER_FILE, WEIGHT_PATTERNS

SERVED_AS = {
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "ministral": "ministral",
    "mistral": "ministral",
    "llama": "ministral",
}
"""Model types, and the type with the same weights whose layers may differ in their windows. Llama's own code
reads `layer_types` nowhere: under its own type the windows would be ignored without a word."""

LOGITS_OFF = {torch.float32: 1e-3}  # share of the logits' spread; half precisions: 5 %


def static_layers(keep_ratios: dict[int, float], below: float) -> list[int]:
    """The routed layers that need no past: those that keep at most the share `below` of the tokens.

    Raises:
        ModlabError: there are none, or no such share.
    """
    if not 0 <= check_number("below", below) <= 1:
        raise ModlabError(f"below={below:g}: give a share of the tokens, from 0 to 1.")
    found = [layer for layer, ratio in keep_ratios.items() if ratio <= below]
    if not found:
        shown = ", ".join(f"{layer}: {ratio:.2f}" for layer, ratio in keep_ratios.items())
        raise ModlabError(
            f"no routed layer keeps {below:g} of the tokens or fewer ({shown}): nothing can become a window "
            "layer. Name the layers yourself, or ask for another share."
        )
    return found


def as_static(layers: Iterable[int]) -> Callable[[int, torch.Tensor, torch.Tensor], torch.Tensor]:
    """For `routing_override`: what the exported model computes, in the routed one. The layers named keep
    nothing but their recent tokens, all others keep everything."""
    windows = set(layers)

    def keep(layer_idx: int, gate: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        return torch.full_like(gate, layer_idx not in windows, dtype=torch.bool)

    return keep


def export_static(model: Any, tokenizer: Any, folder: str | Path, layers: list[int]) -> None:
    """Writes a folder without routers in which these layers are window layers, whole or not at all.

    The folder is loaded again by transformers alone, and its logits are compared with those of `as_static`.

    Args:
        model: converted, with skip="kv".
        tokenizer: saved next to it; None for none.
        folder: where.
        layers: routed layers that get the window `keep_recent`.

    Raises:
        ModlabError: another skip, layers that are not routed, an architecture that would ignore windows or
            has its own, or a model that stores keys and values in fewer bits.
    """
    config = static_config(model, layers)
    state = {name: value for name, value in model.state_dict().items() if not is_router("." + name)}
    with atomic_directory(folder, replaces=(*WEIGHT_PATTERNS, CONFIG_FILE, ROUTER_FILE)) as temporary:
        _plain(model, config, state).save_pretrained(temporary)
        if tokenizer is not None:
            tokenizer.save_pretrained(temporary)
        _check_folder(model, temporary, layers)


def static_config(model: Any, layers: list[int]) -> Any:
    """The config of the exported model."""
    from transformers import AutoConfig

    routing, config = routing_of(model), model.config
    if routing.skip.name != "kv":
        raise ModlabError(
            f"a model that routes {routing.skip.words.routed} has no static form: window layers stand for "
            'dropped keys and values (skip="kv").'
        )
    if bits := KV_BITS.get(routing.config.kv_cache_dtype):
        raise ModlabError(
            f"this model stores keys and values in {bits}, which is no part of a static form: engines "
            "have settings of their own for it. Switch it off first: modlab.set_kv_cache_dtype(model, "
            "'auto'), or modlab export --kv-cache-dtype auto."
        )
    if missing := sorted(set(layers) - set(routing.layers)):
        raise ModlabError(f"layers {missing} are not routed; routed are {list(routing.layers)}.")
    served = SERVED_AS.get(config.model_type)
    if served is None:
        raise ModlabError(
            f"{type(model).__name__} ({config.model_type}) has no window for single layers in transformers "
            f"or vLLM: they would be ignored without a word. Types that have: {', '.join(SERVED_AS)}."
        )
    if any(window is not None for window in attention_windows(model, routing.num_layers).values()):
        raise ModlabError("this model has sliding windows of its own: a second one cannot be written.")
    biased = getattr(config, "attention_bias", False) or getattr(config, "mlp_bias", False)
    if biased and served != config.model_type:
        raise ModlabError(f"this {type(model).__name__} has biases, which {served} has not.")
    windows = {
        "layer_types": [
            "sliding_attention" if i in layers else "full_attention" for i in range(routing.num_layers)
        ],
        "sliding_window": routing.config.keep_recent,
        "use_sliding_window": True,
    }
    values = config.to_dict()
    for name in ("model_type", "architectures", "quantization_config", "transformers_version", *windows):
        values.pop(name, None)
    values = {name: value for name, value in values.items() if not name.startswith("_")}
    return AutoConfig.for_model(served, **values | windows)


def _plain(model: Any, config: Any, state: dict[str, torch.Tensor]) -> Any:
    """A dense model of that config around the same weights."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        plain = AutoModelForCausalLM.from_config(config, dtype=model.dtype)
    found = plain.load_state_dict(state, strict=False, assign=True)
    plain.tie_weights()
    left = [name for name, value in plain.named_parameters() if value.is_meta]
    if found.unexpected_keys or left:
        raise ModlabError(
            f"{config.model_type} does not have this model's weights ({(found.unexpected_keys + left)[:3]})."
        )
    plain.generation_config = model.generation_config
    return plain


@torch.no_grad()
def _check_folder(model: Any, folder: Path, layers: list[int]) -> None:
    from transformers import AutoModelForCausalLM

    window, device = routing_of(model).config.keep_recent, device_of(model)
    length = min(3 * window, context_length(model) or 3 * window)
    if length <= window:
        raise ModlabError(f"the context of {length} tokens is not longer than the window of {window}.")
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, vocabulary_size(model) or 2, (1, length), generator=generator).to(device)
    with eval_mode(model):
        with routing_override(model, as_static(layers)):
            wanted = model(ids, use_cache=False).logits.float()
        with routing_off(model):
            dense = model(ids, use_cache=False).logits.float()
    plain: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=model.dtype)
    found = plain.to(device).eval()(ids, use_cache=False).logits.float()
    off = float((found - wanted).abs().mean() / wanted.std())
    if off > LOGITS_OFF.get(model.dtype, 0.05) or torch.equal(found, dense):
        raise ModlabError(
            f"transformers does not compute from the exported folder what the masked reference does (off by "
            f"{off:.2%} of the logits' spread): its {type(plain).__name__} does not honour the windows."
        )
