"""The protocol of a skip: all that the rest of modlab asks about what a token leaves out.

A value of `MoDConfig.skip` names one object of a class from this folder. It says which part of a layer
follows the routers' decision, how many gates that takes, how the part runs, what stays in the KV cache, what
work and bytes that leaves, and in which words people read about it. Nothing else compares the name.

The module is light: settings and the command line's help ask here before torch is needed. What runs (modules,
cache layers, routers) is imported by the methods that give it.

Shape letters: B rows, T tokens, R routed layers, G gates of a layer (one a layer, unless a skip says more).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray
    from torch import Tensor, nn
    from transformers.cache_utils import CacheLayerMixin

    from modlab.cache.range import KVRange
    from modlab.config import MoDConfig
    from modlab.conversion.survey import LayerFacts
    from modlab.execution.routed import RoutedModule
    from modlab.routing.record import Decision, ForwardCall

Part = Literal["layer", "attention", "mlp"]
"""A module of a decoder layer that can follow a decision: the layer itself, its attention, its MLP."""

GateForm = Literal["straight-through", "fused", "scaled", "stored"]
"""How a gate enters the output of a kept token, see `execution/gate.py`."""

Proof = Literal[
    "gives zero",
    "adds its mask",
    "takes given keys",
    "takes given keys, gives zero",
    "takes given keys, adds its mask",
    "nothing",
]
"""What a part has to show on random numbers before it is routed, see `skips/probe.py`."""

ROUTERS = frozenset({"operator", "p", "gate", "capacity", "keep_first", "init_gate", "router_hidden"})
"""Fields of `MoDConfig` that say how routers decide and what their gates do."""

INDEX_BYTES = 4
"""A ragged cache notes the column of every key that it stores."""


@dataclass(frozen=True)
class Words:
    """How people read about a skip.

    Attributes:
        routed: what is routed, as in a table: "whole layers".
        part: what follows the decision, in a sentence: "the layer's attention".
        title: heads the picture of token by layer.
        kept, left: what a cell of that picture says of a token that is kept, and of one that is not.
        past: the same of a token that is not kept, as a participle.
        legend_kept, legend_left: the two in the legend of a still picture.
    """

    routed: str
    part: str
    title: str = "Which layer runs which token"
    kept: str = "runs"
    left: str = "skips"
    past: str = "skipped"
    legend_kept: str = "token runs"
    legend_left: str = "token skips the layer"


class Skip:
    """One thing that a token may leave out. Subclasses are stateless; one object of each is registered.

    Attributes:
        name: the value of `MoDConfig.skip`.
        parts: the parts of a layer that follow its decision, in the order in which they run.
        words: for cards, pictures and tables.
        stores_all: whether every token's keys and values stay, so that nothing is saved in the cache.
        runs_all: whether a token that is not kept passes the layer in full all the same.
        all_or_none: whether each layer that is asked for has to be routable, named one by one or not.
        several_gates: whether a layer may have more than one gate (`gates`).
        by_head: whether each KV head may have a gate of its own (`MoDConfig.gates`).
        settings: fields of `MoDConfig` that it asks for, next to `layers`; others mean nothing to it and are
            refused.
        index_bytes: bytes that a routed layer's cache holds for a token next to its keys and values.
    """

    name: ClassVar[str]
    parts: ClassVar[tuple[Part, ...]]
    words: ClassVar[Words]
    stores_all: ClassVar[bool] = False
    runs_all: ClassVar[bool] = False
    several_gates: ClassVar[bool] = False
    by_head: ClassVar[bool] = False
    all_or_none: ClassVar[bool] = False
    settings: ClassVar[frozenset[str]] = ROUTERS
    index_bytes: ClassVar[int] = INDEX_BYTES

    # Settings

    def check(self, config: MoDConfig) -> None:
        """Refuses settings that this skip cannot have.

        Raises:
            ModlabError: says which, and what to choose.
        """

    def gate_form(self, config: MoDConfig, part: Part) -> GateForm:
        """How the gate enters the output of `part`. The paper's form multiplies the branches inside a layer;
        where one branch alone is routed, that is the fused form."""
        return "fused" if config.gate == "paper" else config.gate

    def recent(self, config: MoDConfig) -> int | None:
        """How many of the latest tokens, itself counted, each token attends to whether they are kept or not;
        None where only kept tokens are attended to."""
        return None

    def recent_stored(self, config: MoDConfig) -> int:
        """How many of the latest tokens are in the cache between two forwards, kept or not: what the next
        token may attend to besides itself."""
        recent = self.recent(config)
        return 0 if recent is None else recent - 1

    def decides(self, config: MoDConfig) -> str:
        """What a router decides about a token, in half a sentence after "decides for each token"."""
        left = "" if self.stores_all else ". A skipped token leaves no keys and values there"
        return f"whether it runs through {self.words.part} or skips it{left}"

    # Conversion

    def layers(self, config: MoDConfig, num_layers: int) -> list[int]:
        """Ascending indices of the layers that are asked for, in a model of `num_layers` decoder layers."""
        return config.resolve_layers(num_layers)

    def first_left(self, config: MoDConfig, num_layers: int) -> int | None:
        """Index of the first layer that prompt tokens leave out, by position; None where they run all."""
        return None

    def gates(self, facts: LayerFacts, config: MoDConfig) -> int:
        """Gates of one layer. With more than one, gates and decisions are [B, T, G]."""
        return 1

    def cannot_have(self, model: Any) -> str:
        """Why this model cannot have the skip, whatever its layers are; "" if it can."""
        return ""

    def cannot_route(self, facts: LayerFacts, config: MoDConfig) -> str:
        """Why this layer cannot be routed, beyond what holds for every skip; "" if it can."""
        return ""

    def probe(self, part: Part) -> Proof:
        """What the part must prove on random numbers before it is routed, see `skips/probe.py`."""
        return "nothing" if part == "layer" else "gives zero"

    def add_modules(
        self, layer: nn.Module, facts: LayerFacts, config: MoDConfig, device: torch.device
    ) -> None:
        """Adds the layer's router, and whatever weights of its own the skip trains next to it. Their names
        inside the layer begin with ``mod_``: by that they are trained, saved and taken away again."""
        from modlab.routing.router import ROUTER, make_router

        router = make_router(config, facts.hidden_size, self.gates(facts, config), device)
        layer.add_module(ROUTER, router)

    def mixin(self, part: Part) -> type[RoutedModule]:
        """The class that the part's own class is extended with: how it runs in the ordinary path."""
        raise NotImplementedError

    # Decisions

    def decide(self, gate: Tensor, logit: Tensor, call: ForwardCall, layer_idx: int) -> Tensor:
        """Which tokens are kept, by this skip's own rule instead of the gate's; bool, of the gate's shape.

        Called only where `decides_itself`.
        """
        raise NotImplementedError

    decides_itself: ClassVar[bool] = False

    def decision_for(self, part: Part, decision: Decision) -> Decision:
        """What the layer's decision means for one of its parts, for skips with a gate for each part."""
        return decision

    # The cache

    def cache_layer(
        self, config: MoDConfig, window: int | None, gates: int, range: KVRange | None = None
    ) -> CacheLayerMixin | None:
        """The cache layer of one routed layer; None for the one that the dense model has.

        Args:
            window: sliding window in tokens, or None.
            gates: of this layer, as `gates` said.
            range: how its keys and values are coded in fewer bits; None where they are not stored so,
                 as always where `settings` do not name `kv_cache_dtype`.
        """
        if self.stores_all:
            return None
        from modlab.cache.layer import RaggedLayer

        return RaggedLayer(window)

    # Arithmetic: what is stored, what runs

    def stored_share(self, keep_ratio: float, recent_share: float) -> float:
        """Share of a context in a routed layer's cache where routers keep `keep_ratio` of it and a share
        `recent_share` of it is recent."""
        return 1.0 if self.stores_all else keep_ratio + (1 - keep_ratio) * recent_share

    def stored(self, keep_RT: NDArray[Any], recent: int) -> NDArray[Any]:
        """Which tokens are in the cache at the end of a text, bool [R, T]."""
        stored = keep_RT.copy()
        if self.stores_all:
            stored[:] = True
        elif recent:
            stored[:, -recent:] = True
        return stored

    def runs(self, keep_ratio: float) -> tuple[float, float]:
        """Shares of the tokens that attention and MLP run for where routers keep `keep_ratio`."""
        if self.runs_all:
            return 1.0, 1.0
        attention = keep_ratio if {"layer", "attention"} & set(self.parts) else 1.0
        mlp = keep_ratio if {"layer", "mlp"} & set(self.parts) else 1.0
        return attention, mlp

    def pairs(self, length: float, keep_ratio: float, config: MoDConfig) -> float:
        """Pairs of a query and a key that it sees, in a row of `length` tokens."""
        attended, _ = self.runs(keep_ratio)
        recent = self.recent(config)
        if recent is None:  # what does not run is neither a query nor a key
            return (attended * length) ** 2 / 2
        older = max(length - recent, 0) ** 2 / 2
        return length**2 / 2 - (1 - keep_ratio) * older

    def tokens_to_learn(self, config: MoDConfig) -> int:
        """The least length of a row of training in which a decision changes any token's loss."""
        return 2

    # Fast generation

    def why_no_engine(self, config: MoDConfig) -> str:
        """Why fast generation cannot run this skip; "" if it can."""
        return f"skip={self.name!r} has no form in the engine yet"
