"""What conversion knows about a dense model: each layer is looked at once, its facts are handed down."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import nn
from transformers import PreTrainedModel

from modlab.hf import anatomy
from modlab.skips.base import Part


@dataclass(frozen=True)
class LayerFacts:
    """One decoder layer.

    Attributes:
        index: its place.
        layer: the module.
        attention, mlp: names of these submodules, or None.
        window: sliding window in tokens, or None.
        refusal: why it cannot be routed, whatever is skipped; "" if it can.
        needs_mask: whether its attention needs a mask where a kernel's own causal flag would do.
        hidden_size: D of the residual stream.
        depth: decoder layers of the model.
        kv_heads: heads of its keys and values in the cache, G; 1 unless it was asked (`gates="kv_head"`).
    """

    index: int
    layer: nn.Module
    attention: str | None
    mlp: str | None
    window: int | None
    refusal: str
    needs_mask: bool
    hidden_size: int
    depth: int
    kv_heads: int = 1

    def name_of(self, part: Part) -> str | None:
        """Name of a part inside the layer, "" for the layer itself; None if it has no such part."""
        return {"layer": "", "attention": self.attention, "mlp": self.mlp}[part]

    def module(self, part: Part) -> nn.Module:
        """The module of a part that the layer has."""
        name = self.name_of(part)
        assert name is not None, "asked for after the layer was seen to have it"
        return self.layer.get_submodule(name)


@dataclass(frozen=True)
class Survey:
    """A dense model, looked at once.

    Attributes:
        model: the causal LM.
        decoder: its stack of layers with embeddings.
        layers: the list of layers.
        facts: one entry a layer.
    """

    model: PreTrainedModel
    decoder: PreTrainedModel
    layers: list[nn.Module]
    facts: list[LayerFacts] = field(default_factory=list)

    @property
    def holding_keys(self) -> int:
        """Layers that hold keys and values: all, but in hybrids."""
        return sum(facts.attention is not None for facts in self.facts)


def survey(model: PreTrainedModel) -> Survey:
    """Looks at every decoder layer of a dense model.

    Raises:
        ModlabError: no list of decoder layers with softmax attention is found.
    """
    decoder, layers = anatomy.decoder_of(model), anatomy.decoder_layers(model)
    windows = anatomy.attention_windows(model, len(layers))
    hidden_size: int = decoder.config.hidden_size
    found = Survey(model, decoder, layers)
    for index, layer in enumerate(layers):
        name, window = anatomy.attention_name(layer), windows[index]
        attention = None if name is None else layer.get_submodule(name)
        found.facts.append(
            LayerFacts(
                index=index,
                layer=layer,
                attention=name,
                mlp=anatomy.mlp_name(layer),
                window=window if isinstance(window, int) else None,
                refusal=_refusal(layer, attention, window),
                needs_mask=attention is not None and anatomy.makes_masks(attention),
                hidden_size=hidden_size,
                depth=len(layers),
            )
        )
    return found


def _refusal(layer: nn.Module, attention: nn.Module | None, window: int | None | str) -> str:
    """Why the layer cannot be routed, whatever is skipped; "" if it can."""
    if attention is None:
        return anatomy.NO_ATTENTION
    if anatomy.shares_keys(attention):
        return "it shares its keys and values with other layers"
    if not anatomy.attends(layer):
        return anatomy.NO_KEYS
    return window if isinstance(window, str) else ""
