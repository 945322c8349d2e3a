"""Models of a known shape with random weights, dense and converted on the same tensors; forced routing."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers

from modlab.bench.registry import Settings
from modlab.config import MoDConfig
from modlab.errors import ModlabError
from modlab.routing.table import RoutingTable


@dataclass(frozen=True)
class Shape:
    """Size of a Llama-architecture model with random weights."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocab: int
    tied: bool = False  # whether the output head is the embedding

    def config(self, context: int) -> transformers.LlamaConfig:
        """Its transformers config, for `context` tokens."""
        return transformers.LlamaConfig(
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            vocab_size=self.vocab,
            tie_word_embeddings=self.tied,
            max_position_embeddings=context,
        )


SHAPES = {
    "tiny": Shape(hidden=64, intermediate=128, layers=4, heads=4, kv_heads=2, vocab=256),
    "wide": Shape(hidden=1024, intermediate=2816, layers=8, heads=16, kv_heads=8, vocab=4096),
    "smollm2": Shape(576, intermediate=1536, layers=30, heads=9, kv_heads=3, vocab=49152, tied=True),
    "coder-1.5b": Shape(1536, intermediate=8960, layers=28, heads=12, kv_heads=2, vocab=151936, tied=True),
    "llama-3-8b": Shape(hidden=4096, intermediate=14336, layers=32, heads=32, kv_heads=8, vocab=128256),
    "llama-3-70b": Shape(hidden=8192, intermediate=28672, layers=80, heads=64, kv_heads=8, vocab=128256),
}


def routed_layers(which: str, num_layers: int) -> list[int]:
    """Indices of routed layers: "alternate" (1, 3, 5, ...), "most" (all but two at each end) or "all"."""
    choices = {
        "alternate": list(range(1, num_layers, 2)),
        "most": list(range(2, num_layers - 2)),
        "all": list(range(num_layers)),
    }
    if not choices.get(which):
        raise ModlabError(
            f"routed={which!r} names no layer of {num_layers}; choose one of {', '.join(choices)}."
        )
    return choices[which]


def depth(settings: Settings) -> int:
    """Number of decoder layers of the model that the settings ask for."""
    return settings.layers or SHAPES[settings.shape].layers


def dense_model(settings: Settings, context: int) -> Any:
    """A dense model with random weights, for `context` tokens, in eval mode and without gradients."""
    shape = dataclasses.replace(SHAPES[settings.shape], layers=depth(settings))
    torch.manual_seed(settings.seed)
    before = torch.get_default_dtype()
    torch.set_default_dtype(settings.dtype)
    try:
        with settings.device:
            dense: Any = transformers.LlamaForCausalLM(shape.config(context)).eval()
    finally:
        torch.set_default_dtype(before)
    return dense.requires_grad_(False)


def converted_twin(dense: Any, routed: list[int] | str, skip: str = "layer", **fields: Any) -> Any:
    """The dense model with routers for `skip` in the layers `routed` (as `MoDConfig.layers` takes them), on
    the same weight tensors; `fields` are other settings of its conversion."""
    from modlab.conversion.convert import convert

    twin = copy.deepcopy(dense, {id(p): p for p in dense.parameters()})
    return convert(twin, MoDConfig(layers=routed, skip=skip, **fields)).eval()


def random_routing(
    layers: list[int], batch: int, spans: Sequence[int], ratio: float, seed: int, device: torch.device
) -> RoutingTable:
    """Random tokens, in each row and layer exactly round(ratio x span) of each span.

    Args:
        layers: routed layers.
        batch: rows B.
        spans: lengths of consecutive stretches of positions (the prompt, then each stretch of decoding).
        ratio: share of tokens kept.
        seed: of the masks.
        device: where the masks live.
    """
    generator = torch.Generator().manual_seed(seed)
    masks: dict[int, torch.Tensor] = {}
    for layer in layers:
        pieces = [
            torch.rand(batch, span, generator=generator).argsort(1) < round(ratio * span) for span in spans
        ]
        masks[layer] = torch.cat(pieces, 1).to(device)
    return RoutingTable(masks)
