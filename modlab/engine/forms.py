"""Which objects run a model's layers in the engine: one form for each thing that routers can decide about."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from torch import nn

from modlab.engine.attention import LayerPrefill
from modlab.engine.leaving_prefill import LeavingKeysPrefill, LeavingPrefill
from modlab.engine.leaving_step import LeavingKeysStep, LeavingStep
from modlab.engine.prefill_layers import (
    AttentionPrefill,
    DensePrefill,
    Forward,
    KeptKeysPrefill,
    MLPPrefill,
    PrefillLine,
    WholeLayerPrefill,
)
from modlab.engine.step_layers import (
    AttentionStep,
    DenseStep,
    KeptKeysStep,
    MLPStep,
    StepPass,
    WholeLayerStep,
)
from modlab.execution.routed import RoutedLayer
from modlab.routing.rule import BY_THRESHOLD
from modlab.routing.state import Routing
from modlab.skips.base import Part


@dataclass(frozen=True)
class Form:
    """How a routed layer runs: in a prefill, and in a decoding step.

    Attributes:
        above: how layers run that prompt tokens leave out; None where they leave out none.
        packs: whether something runs on the kept tokens of a prompt alone.
    """

    prefill: type[DensePrefill] = DensePrefill
    step: type[DenseStep] = DenseStep
    above: Form | None = None
    packs: bool = False

    def of(self, layer: nn.Module, index: int, routing: Routing | None) -> Form:
        """The form of one layer of the model."""
        if routing is None or not isinstance(layer, RoutedLayer):
            return Form()
        return self.above if self.above is not None and index >= routing.first_left else self


FORMS: dict[tuple[Part, ...], Form] = {
    ("layer",): Form(WholeLayerPrefill, WholeLayerStep, packs=True),
    ("attention",): Form(AttentionPrefill, AttentionStep, packs=True),
    ("mlp",): Form(MLPPrefill, MLPStep, packs=True),
}
"""By the parts of a layer that a skipped token leaves out."""

KEPT_KEYS = Form(KeptKeysPrefill, KeptKeysStep)
"""A token that is not kept passes the layer in full; the decision is about the cache alone."""

LEAVING = Form(above=Form(LeavingPrefill, LeavingStep))
"""Prompt tokens leave out the upper layers."""

LEAVING_KEYS = replace(KEPT_KEYS, above=Form(LeavingKeysPrefill, LeavingKeysStep))
"""The same, with a decision about the cache in all layers."""


def form_of(routing: Routing | None) -> Form | None:
    """The form of a converted model's routed layers, or of a dense model's; None if the engine has none for
    what this model skips (`Skip.why_no_engine` says why)."""
    if routing is None:
        return Form()
    if routing.skip.why_no_engine(routing.config):
        return None
    if routing.first_left < routing.num_layers:
        return LEAVING_KEYS if routing.skip.runs_all else LEAVING
    if routing.skip.decides_itself or routing.config.operator not in BY_THRESHOLD:
        return None  # decoding steps decide in a kernel, by the threshold
    return KEPT_KEYS if routing.skip.runs_all else FORMS.get(routing.skip.parts)


def prefill_forwards(
    form: Form, layers: list[nn.Module], parts: Iterable[LayerPrefill], line: PrefillLine
) -> dict[nn.Module, Forward]:
    """What the layers, their MLPs and routed attentions run in a prefill.

    Args:
        form: of the routed layers.
        parts: each layer's own; a routed layer's is filled in when it has decided.
        line: what they share.
    """
    forwards: dict[nn.Module, Forward] = {}
    for index, (layer, part) in enumerate(zip(layers, parts, strict=True)):
        kind = form.of(layer, index, line.routing).prefill
        forwards |= kind(layer, index, part, line).forwards()
    return forwards


def step_forwards(form: Form, layers: list[nn.Module], step: StepPass) -> dict[nn.Module, Forward]:
    """What the layers and their routed sublayers run in one decoding step."""
    forwards: dict[nn.Module, Forward] = {}
    for index, layer in enumerate(layers):
        kind = form.of(layer, index, step.routing).step
        forwards |= kind(layer, index, step).forwards()
    return forwards
