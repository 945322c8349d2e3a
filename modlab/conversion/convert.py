"""Dense model in, Mixture-of-Depths model out, in place; and back."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn
from transformers import PreTrainedModel

from modlab.config import MoDConfig
from modlab.conversion.routed_model import RoutedModel
from modlab.errors import ModlabError
from modlab.execution.routed import (
    RoutedBranch,
    RoutedKeys,
    RoutedLayer,
    RoutedMLP,
    RoutedModule,
    extend,
    restore,
)
from modlab.hf import anatomy
from modlab.routing.router import ROUTER, Router
from modlab.routing.state import Routing, is_converted, routing_of
from modlab.saving.files import is_hub_id
from modlab.skips.probe import BranchForm, branch_forms

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle

def convert(model: PreTrainedModel, config: MoDConfig | None = None) -> PreTrainedModel:
    """Turns a causal LM of transformers into a Mixture-of-Depths model, in place.

    No weight changes and no layer body is copied: routed layers gain a router (`mod_router`) and a forward
    that asks it. With the default config the logits stay the dense model's, exactly; training then teaches
    the routers what to leave out.

    Args:
        model: any decoder-only model with softmax attention, on any device, in any dtype.
        config: what to route and how; `MoDConfig()` by default.

    Returns:
        the same object, with `model.mod` (a `Routing`) added.

    Raises:
        ModlabError: not a causal LM, no routable layers, an index out of range, a branch that cannot be
            skipped on its own, or already converted.
    """
    config = MoDConfig() if config is None else config
    if is_converted(model):
        raise ModlabError(
            "the model is converted already: modlab.revert(model) first, or modlab.set_threshold."
        )
    if hasattr(model, "peft_config") and not isinstance(model, PreTrainedModel):
        raise ModlabError(
            "convert the model before it gets adapters: modlab.convert(base), then "
            "peft.get_peft_model(base, modlab.integrations.peft.lora_config(base))."
        )
    if not isinstance(model, PreTrainedModel) or not model.can_generate():
        raise ModlabError(
            f"modlab.convert needs a causal language model of transformers (AutoModelForCausalLM); this is a "
            f"{type(model).__name__}."
        )
    if model.config.is_encoder_decoder:
        raise ModlabError(
            f"{type(model).__name__} is an encoder-decoder; only decoder-only models can be converted."
        )

    layers = anatomy.decoder_layers(model)
    indices, windows, forms = routable(model, layers, config)
    ends = {i: anatomy.branch_ends(model, layers[i]) for i in indices} if _needs_branch_ends(config) else {}

    # From here on nothing can fail: a refused conversion has changed nothing.
    _end_fast_generation(model)
    decoder = anatomy.decoder_of(model)
    supports_flex = bool(getattr(decoder, "_supports_flex_attn", False))
    routing = Routing(config, indices, len(layers), windows, decoder.config, supports_flex)
    for index in indices:
        layer = layers[index]
        anchor = next(layer.parameters())
        layer.add_module(ROUTER, Router(decoder.config.hidden_size, config.init_gate, device=anchor.device))
        _attach(layer, RoutedLayer, routing, index, ends.get(index, []))
        if config.skip != "layer":
            branch = layer.get_submodule(_require(layer, config.skip))
            mixins = {"attention": RoutedBranch, "mlp": RoutedMLP, "kv": RoutedKeys}
            _attach(branch, mixins[config.skip], routing, index, [], forms[index])
    routing.hooks = [
        decoder.register_forward_pre_hook(routing.enter, with_kwargs=True),
        decoder.register_forward_hook(routing.leave, always_call=True),
        model.register_forward_pre_hook(routing.enter_model, with_kwargs=True),
        model.register_forward_hook(routing.leave_model, always_call=True),
    ]
    model.mod = routing  # type: ignore[assignment]
    _attach(model, RoutedModel, routing, -1, [])
    model.mod_base_model = hub_id_of(model)  # type: ignore[assignment]
    return model


def revert(model: PreTrainedModel) -> PreTrainedModel:
    """Undoes `convert`: the same object is the dense model again, bit for bit (with its weights as they are
    now).
    """
    routing = routing_of(model)
    _end_fast_generation(model)
    if not isinstance(model, RoutedModel):
        raise ModlabError(
            f"this {type(model).__name__} wraps the converted model: revert that one (PEFT: "
            "model.merge_and_unload() or model.unload() gives it back)."
        )
    hooks: list[RemovableHandle] = routing.hooks
    for hook in hooks:
        hook.remove()
    for module in list(model.modules()):
        if isinstance(module, RoutedModule):
            if isinstance(module, RoutedLayer):
                delattr(module, ROUTER)
            for name in (
                "mod_routing",
                "mod_index",
                "mod_branch_ends",
                "mod_extra_outputs",
                "mod_in_tuple",
                "mod_needs_mask",
            ):
                delattr(module, name)
            restore(module)
    del model.mod, model.mod_base_model
    return model


def hub_id_of(model: PreTrainedModel) -> str | None:
    """Where the model came from, if that was the hub and not a folder of this machine."""
    name = str(getattr(model, "name_or_path", "") or "")
    return name if is_hub_id(name) else None


def _end_fast_generation(model: PreTrainedModel) -> None:
    """The engine knows the layers as they were."""
    if "mod_engine" in model.__dict__:
        from modlab.engine import disable_fast_generation  # brings Triton along, which most never need

        disable_fast_generation(model)


def _attach(
    module: nn.Module,
    mixin: type[RoutedModule],
    routing: Routing,
    index: int,
    ends: list[str],
    form: BranchForm | None = None,
) -> None:
    module.mod_routing, module.mod_index, module.mod_branch_ends = routing, index, ends  # type: ignore[assignment]
    form = form or BranchForm()
    module.mod_extra_outputs, module.mod_in_tuple = form.extra_outputs, form.in_tuple  # type: ignore[assignment]
    name = anatomy.attention_name(module) if mixin is RoutedLayer else ""
    module.mod_needs_mask = name is not None and anatomy.makes_masks(module.get_submodule(name))  # type: ignore[assignment]
    extend(module, mixin)


def _needs_branch_ends(config: MoDConfig) -> bool:
    return config.gate == "paper" and config.skip == "layer"


def _skippable(
    model: PreTrainedModel, layers: nn.ModuleList, indices: list[int], config: MoDConfig
) -> dict[int, BranchForm]:
    """The form of the branch that `config` skips in each layer where it can be skipped alone; an error if
    that is none of them, or not one that was named."""
    if config.skip == "layer":
        return dict.fromkeys(indices, BranchForm())
    for index in indices:
        _require(layers[index], config.skip)
    forms = branch_forms(model, layers, indices, config.skip)
    refused = {index: form.cannot_skip for index, form in forms.items() if form.cannot_skip}
    if isinstance(config.layers, str) and len(refused) < len(forms):
        return {index: form for index, form in forms.items() if index not in refused}
    for index, reason in refused.items():
        others = "" if len(refused) == len(forms) else f", or leave layers {sorted(refused)} out"
        raise ModlabError(
            f"skip={config.skip!r}: the {'MLP' if config.skip == 'mlp' else 'attention'} of layer {index} "
            f"({type(layers[index]).__name__}) cannot be {'routed' if config.skip == 'kv' else 'skipped'} on "
            f"its own: {reason}. Use MoDConfig(skip='layer') (--skip layer, --recipe speed){others}."
        )
    return forms


def _require(layer: nn.Module, branch: str) -> str:
    name = anatomy.mlp_name(layer) if branch == "mlp" else anatomy.attention_name(layer)
    if name is None:
        module = "MLP" if branch == "mlp" else "attention"
        raise ModlabError(f"skip={branch!r}: {type(layer).__name__} has no {module} module of its own.")
    return name


def routable(
    model: PreTrainedModel, layers: nn.ModuleList, config: MoDConfig
) -> tuple[list[int], dict[int, int | None], dict[int, BranchForm]]:
    """Indices to route, their sliding windows, and how they use the branch that is skipped. Layers named one
    by one must be routable, names such as 'inner' mean what can be.
    """
    windows = anatomy.attention_windows(model, len(layers))
    wanted = config.resolve_layers(len(layers))
    reasons = {}
    for index in range(len(layers)):
        name, window = anatomy.attention_name(layers[index]), windows[index]
        if name is None:
            reasons[index] = anatomy.NO_ATTENTION
        elif anatomy.shares_keys(layers[index].get_submodule(name)):
            reasons[index] = "it shares its keys and values with other layers"
        elif not anatomy.attends(layers[index]):
            reasons[index] = anatomy.NO_KEYS
        elif isinstance(window, str):
            reasons[index] = window
        elif config.skip == "kv" and window is not None and window <= config.keep_recent:
            reasons[index] = f"all of its sliding window of {window} tokens is recent (keep_recent)"
    if not isinstance(config.layers, str):
        for index in (i for i in wanted if i in reasons):
            raise ModlabError(f"layer {index} of {type(model).__name__} cannot be routed: {reasons[index]}.")
    indices = [index for index in wanted if index not in reasons]
    if not indices:
        # In a hybrid the layers asked for may all be recurrent ones: those with attention are routed then.
        indices = [index for index in range(len(layers)) if index not in reasons]
    if not indices:
        # What the layers with attention lack says more than that others have none.
        why = [r for r in dict.fromkeys(reasons.values()) if r != anatomy.NO_ATTENTION] or [
            anatomy.NO_ATTENTION
        ]
        raise ModlabError(f"{type(model).__name__} has no routable layers: {', '.join(why)}.")
    forms = _skippable(model, layers, indices, config)
    return list(forms), {index: windows[index] for index in forms}, forms  # type: ignore[misc]
