"""The cache alone: every token passes every layer, routers decide whose keys and values stay."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from modlab.errors import ModlabError
from modlab.skips.base import INDEX_BYTES, ROUTERS, GateForm, Part, Proof, Skip, Words

if TYPE_CHECKING:
    from transformers.cache_utils import CacheLayerMixin

    from modlab.cache.range import KVRange
    from modlab.config import MoDConfig
    from modlab.conversion.survey import LayerFacts
    from modlab.execution.routed import RoutedModule

KEPT_BYTES = 1
"""The cache notes of each token whether it is kept or only recent."""


class KeyValueSkip(Skip):
    """`skip="kv"`, the default: the keys and values of a token that is not kept are dropped once
    `MoDConfig.keep_recent` tokens have come, itself counted."""

    name = "kv"
    parts: ClassVar[tuple[Part, ...]] = ("attention",)
    words = Words(
        routed="keys and values",
        part="its place in the cache",
        title="Which layer keeps which token's keys and values",
        kept="kept",
        left="dropped",
        past="dropped",
        legend_kept="token kept",
        legend_left="dropped from the cache",
    )
    runs_all = True
    several_gates = True
    by_head = True
    settings: ClassVar[frozenset[str]] = ROUTERS | {"keep_recent", "gates", "kv_cache_dtype"}
    index_bytes = INDEX_BYTES + KEPT_BYTES

    def check(self, config: MoDConfig) -> None:
        """Keys and values are chosen by threshold, and there is no output for a gate to scale."""
        if config.operator != "threshold":
            raise ModlabError(
                f"MoDConfig(skip={config.skip!r}, operator={config.operator!r}): keys and values are chosen "
                "by threshold only. Use operator='threshold' (the default), or say what else is skipped: "
                "skip='layer', as in MoDConfig.topk() (--preset topk)."
            )
        if config.gate != "straight-through":
            raise ModlabError(
                f"MoDConfig(skip={config.skip!r}, gate={config.gate!r}): a token that is not kept passes "
                "the layer in full, there is no output for a gate to scale. Use gate='straight-through' (the "
                "default), or say what else is skipped: skip='layer', as in MoDConfig.paper() (--preset "
                "paper)."
            )

    def decides(self, config: MoDConfig) -> str:
        return (
            f"whether its keys and values stay in the cache beyond the latest {config.keep_recent} tokens. "
            "All tokens pass all layers"
        )

    def gate_form(self, config: MoDConfig, part: Part) -> GateForm:
        """The gate changes no output."""
        return "stored"

    def recent(self, config: MoDConfig) -> int | None:
        return config.keep_recent

    def gates(self, facts: LayerFacts, config: MoDConfig) -> int:
        """One, or one a KV head."""
        return facts.kv_heads if config.gates == "kv_head" else 1

    def cannot_route(self, facts: LayerFacts, config: MoDConfig) -> str:
        """A sliding window that is not longer than the recent past has nothing to drop."""
        if facts.window is not None and facts.window <= config.keep_recent:
            return f"all of its sliding window of {facts.window} tokens is recent (keep_recent)"
        return ""

    def probe(self, part: Part) -> Proof:
        """Training weighs keys by the mask; the attention runs for all tokens, so it need not give zero."""
        return "adds its mask"

    def mixin(self, part: Part) -> type[RoutedModule]:
        from modlab.execution.routed import RoutedKeys

        return RoutedKeys

    def cache_layer(
        self, config: MoDConfig, window: int | None, gates: int, range: KVRange | None = None
    ) -> CacheLayerMixin:
        from modlab.cache.heads import HeadsLayer
        from modlab.cache.recent import RecentLayer

        if gates == 1:
            return RecentLayer(config.keep_recent, window, range)
        return HeadsLayer(gates, config.keep_recent, window, range)

    def tokens_to_learn(self, config: MoDConfig) -> int:
        """The first token that may be dropped follows the protected ones; a recent past later one may miss
        it, and that one still has to predict another."""
        return config.keep_first + config.keep_recent + 2

    def why_no_engine(self, config: MoDConfig) -> str:
        return ""
