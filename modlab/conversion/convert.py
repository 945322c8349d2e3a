"""Dense model in, Mixture-of-Depths model out, in place; and back."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from transformers import PreTrainedModel

from modlab.config import MoDConfig
from modlab.conversion.extend import extend, foreign_forward, restore
from modlab.conversion.ranges import check_rounding, set_kv_cache_dtype
from modlab.conversion.routed_model import RoutedModel
from modlab.conversion.selection import Selection, select
from modlab.conversion.soundness import check_decoder
from modlab.conversion.survey import Survey, survey
from modlab.errors import ModlabError
from modlab.execution.routed import RoutedLayer, RoutedModule
from modlab.execution.site import Plan
from modlab.hf.model import device_of
from modlab.integrations.fsdp import is_sharded
from modlab.routing.forward import ForwardHooks
from modlab.routing.state import Routing, is_converted, routing_of
from modlab.saving.files import is_hub_id
from modlab.skips.probe import PartForm


def convert(model: PreTrainedModel, config: MoDConfig | None = None) -> PreTrainedModel:
    """Turns a causal LM of transformers into a Mixture-of-Depths model, in place.

    No weight changes and no layer body is copied: routed layers gain a router (`mod_router`) and a forward
    that asks it. With the default config the logits stay the dense model's, exactly; training then teaches
    the routers what to leave out. (With a ``kv_cache_dtype`` keys and values are rounded from here on.)

    Args:
        model: any decoder-only model with softmax attention, on any device, in any dtype.
        config: what to route and how; `MoDConfig()` by default.

    Returns:
        the same object, with `model.mod` (a `Routing`) added.

    Raises:
        ModlabError: not a causal LM, no routable layers, an index out of range, a branch that cannot be
            skipped on its own, already converted, or a model that is no causal decoder with a cache of keys;
            with a `kv_cache_dtype` what `set_kv_cache_dtype` refuses.
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

    if device_of(model).type == "meta":
        raise ModlabError(
            f"this {type(model).__name__} has no weights yet (they are on the meta device): load it first."
        )
    if is_sharded(model):
        raise ModlabError(
            "FSDP2 has sharded this model already, and weights that conversion added now would be in no "
            "group: convert first, then shard (fully_shard, accelerator.prepare)."
        )
    found = survey(model)
    check_decoder(found)
    selection = select(found, config)
    _refuse_foreign_forwards(selection)
    if config.kv_cache_dtype != "auto":
        check_rounding(model, config.kv_cache_dtype)

    # From here on nothing can fail but measuring, and that is undone: a refused conversion changes nothing.
    _end_fast_generation(model)
    _attach(found, selection, replace(config, kv_cache_dtype="auto"))
    model.mod_base_model = hub_id_of(model)  # type: ignore[assignment]
    if config.kv_cache_dtype != "auto":
        try:
            set_kv_cache_dtype(model, config.kv_cache_dtype)
        except BaseException:
            revert(model)
            raise
    return model


def _attach(found: Survey, selection: Selection, config: MoDConfig) -> None:
    """Gives the selected layers their routers and plans, the model its routing state and hooks."""
    model, decoder, skip = found.model, found.decoder, selection.skip
    gates = {index: skip.gates(facts, config) for index, facts in selection.facts.items()}
    routing = Routing(
        config,
        list(selection.facts),
        len(found.facts),
        {index: facts.window for index, facts in selection.facts.items()},
        gates,
        decoder.config,
        supports_flex=bool(getattr(decoder, "_supports_flex_attn", False)),
        gates_here={index: selection.gates_here(index, gates[index]) for index in gates},
    )
    for index, facts in selection.facts.items():
        device = device_of(facts.layer)
        own = set(facts.layer._modules)
        skip.add_modules(facts.layer, facts, config, device)
        added = [name for name in facts.layer._modules if name not in own]
        for name in added:
            facts.layer.get_submodule(name).train(facts.layer.training)
        for part in dict.fromkeys(("layer", *skip.parts)):
            form = selection.forms[index].get(part, PartForm())
            module: Any = facts.module(part)
            module.mod_plan = Plan(
                routing,
                index,
                part,
                branch_ends=selection.ends.get(index, []),
                needs_mask=facts.needs_mask,
                in_tuple=form.in_tuple,
                extra_outputs=form.extra_outputs,
                query_heads=form.query_heads,
                heads_here=form.heads_here,
                plain=form.plain,
                added=added if part == "layer" else [],
            )
            extend(module, skip.mixin(part) if part in skip.parts else RoutedLayer)
    routing.hooks = ForwardHooks(routing).register(model, decoder)
    model.mod = routing  # type: ignore[assignment]
    extend(model, RoutedModel)


def _refuse_foreign_forwards(selection: Selection) -> None:
    """A forward that another library put on an object would go on calling the dense one, past the router."""
    for index, facts in selection.facts.items():
        for part in dict.fromkeys(("layer", *selection.skip.parts)):
            if foreign_forward(facts.module(part)):
                raise ModlabError(
                    f"the {part} of layer {index} has a `forward` of its own on the object, put there by "
                    "another library: it would run past the router. Convert the model first, then let that "
                    "library wrap it."
                )


def revert(model: PreTrainedModel) -> PreTrainedModel:
    """Undoes `convert`: the same object is the dense model again, bit for bit (with today's weights)."""
    routing = routing_of(model)
    if is_sharded(model):
        raise ModlabError(
            "FSDP2 has sharded this model, routers included: save it, load it whole and revert that one."
        )
    _end_fast_generation(model)
    if not isinstance(model, RoutedModel):
        raise ModlabError(
            f"this {type(model).__name__} wraps the converted model: revert that one (PEFT: "
            "model.merge_and_unload() or model.unload() gives it back)."
        )
    for hook in routing.hooks:
        hook.remove()
    for module in list(model.modules()):
        if isinstance(module, RoutedModule):
            for name in module.mod_plan.added:
                delattr(module, name)
            del module.mod_plan
            restore(module)
    restore(model)
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
