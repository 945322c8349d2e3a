"""Which layers a conversion routes, and how each uses the parts that follow the decision."""

from __future__ import annotations

from dataclasses import dataclass, replace

from modlab import skips
from modlab.config import MoDConfig
from modlab.conversion.survey import LayerFacts, Survey
from modlab.errors import ModlabError
from modlab.hf import anatomy
from modlab.skips.base import Part, Skip
from modlab.skips.probe import PartForm, branch_ends, part_forms

NAMES: dict[Part, str] = {"layer": "layer", "attention": "attention", "mlp": "MLP"}


@dataclass(frozen=True)
class Selection:
    """The layers to route.

    Attributes:
        skip: what a token may skip there.
        facts: by layer index, ascending.
        forms: how a layer uses a part, by layer index and part.
        ends: last modules of the branches that the paper's gate multiplies, by layer index.
    """

    skip: Skip
    facts: dict[int, LayerFacts]
    forms: dict[int, dict[Part, PartForm]]
    ends: dict[int, list[str]]

    def gates_here(self, index: int, gates: int) -> int:
        """How many of a layer's gates are about heads of this process."""
        here = (form.heads_here for form in self.forms[index].values())
        return next((len(range(gates)[part]) for part in here if part is not None), gates)


def select(found: Survey, config: MoDConfig) -> Selection:
    """The layers that `config` routes. Layers named one by one must be routable, names such as 'inner' mean
    what can be.

    Raises:
        ModlabError: a named layer, or every layer, cannot be routed; says why.
    """
    skip = skips.named(config.skip)
    if reason := skip.cannot_have(found.model):
        raise ModlabError(
            f"{type(found.model).__name__} cannot be converted with skip={skip.name!r}: {reason}."
        )
    indices = _routable(found, skip, config)
    forms = _forms(found, indices, skip, config)
    facts = {index: replace(found.facts[index], kv_heads=_kv_heads(forms[index])) for index in forms}
    scaled = any(skip.gate_form(config, part) == "scaled" for part in skip.parts)
    ends = {i: branch_ends(found.model, f) for i, f in facts.items()} if scaled else {}
    return Selection(skip, facts, forms, ends)


def _kv_heads(forms: dict[Part, PartForm]) -> int:
    """Heads of a layer's keys and values, where that was asked; else 1."""
    return max((form.kv_heads for form in forms.values()), default=1)


def _routable(found: Survey, skip: Skip, config: MoDConfig) -> list[int]:
    """Indices of the layers that are asked for and may be routed by their facts."""
    kind = type(found.model).__name__
    reasons = {f.index: f.refusal or skip.cannot_route(f, config) for f in found.facts}
    reasons = {index: reason for index, reason in reasons.items() if reason}
    wanted = skip.layers(config, len(found.facts))
    if _each_must(skip, config):
        for index in (i for i in wanted if i in reasons):
            raise ModlabError(f"layer {index} of {kind} cannot be routed: {reasons[index]}.")
    # In a hybrid the layers asked for may all be recurrent ones: those with attention are routed then.
    every = [f.index for f in found.facts if f.index not in reasons]
    indices = [index for index in wanted if index not in reasons] or every
    if not indices:
        # What the layers with attention lack says more than that others have none.
        why = [r for r in dict.fromkeys(reasons.values()) if r != anatomy.NO_ATTENTION]
        raise ModlabError(f"{kind} has no routable layers: {', '.join(why or [anatomy.NO_ATTENTION])}.")
    return indices


def _forms(
    found: Survey, indices: list[int], skip: Skip, config: MoDConfig
) -> dict[int, dict[Part, PartForm]]:
    """The form of each part in each layer where all of them can be routed alone; an error if that is no
    layer, or not one that was named."""
    for index in indices:
        for part in skip.parts:
            if found.facts[index].name_of(part) is None:
                kind = type(found.layers[index]).__name__
                raise ModlabError(f"skip={skip.name!r}: {kind} has no {NAMES[part]} module of its own.")
    forms = part_forms(found, indices, skip, by_head=config.gates == "kv_head")
    refused = {i: (p, f.refusal) for i, parts in forms.items() for p, f in parts.items() if f.refusal}
    if not _each_must(skip, config) and len(refused) < len(forms):
        return {index: parts for index, parts in forms.items() if index not in refused}
    for index, (part, reason) in refused.items():
        others = "" if len(refused) == len(forms) else f", or leave layers {sorted(refused)} out"
        verb = "routed" if skip.runs_all else "skipped"
        instead = "" if part == "layer" else " Use MoDConfig(skip='layer') (--skip layer, --recipe layers)"
        if config.gates == "kv_head":
            instead = " Use one gate a layer, MoDConfig(gates='layer') (--gates layer)"
        what = f"layer {index}" if part == "layer" else f"the {NAMES[part]} of layer {index}"
        raise ModlabError(
            f"skip={skip.name!r}: {what} ({type(found.layers[index]).__name__}) cannot be {verb} on its own: "
            f"{reason}.{instead or ' Leave it out'}{others}."
        )
    return forms


def _each_must(skip: Skip, config: MoDConfig) -> bool:
    """Whether each layer that is asked for has to be routable."""
    return skip.all_or_none or not isinstance(config.layers, str)
