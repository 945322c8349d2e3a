"""What a recipe aims at in one model: how its keys and values are stored, and what is left to routing.

Fewer bits are tried on the model itself, which is converted for it and reverted: no table of families says
which of them can store keys and values so, and how much that saves.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from modlab.cache.stored import keep_ratio_for_saving, recent_share, unbounded_keep_ratio
from modlab.config import KV_BITS, MoDConfig
from modlab.conversion.convert import convert, revert
from modlab.conversion.ranges import FEW_TOKENS, begin_rounding
from modlab.errors import ModlabError
from modlab.hf.model import context_length
from modlab.routing.kv_saving import Rounding, rounding_of
from modlab.routing.recent_tokens import SAVING_TEXT, recent_at
from modlab.warn import warn

COUNTED = 2
"""Bytes of a number in the models that the recipes' own savings were measured on."""


@dataclass(frozen=True)
class Aim:
    """What a recipe aims at in a model.

    Attributes:
        name: the recipe's.
        model: dense, and so again after whatever is asked here.
        savings: the recipe's own (`Recipe.kv_savings`).
        layers: how many are routed, and how many hold keys and values.
        keep_range: shares that routers are trained to keep.
        insists: how keys and values are stored was asked for; else the model's own type does where it must.
    """

    name: str
    model: Any
    savings: Mapping[Any, float]
    layers: tuple[int, int]
    keep_range: tuple[float, float]
    insists: bool

    def own(self, config: MoDConfig) -> tuple[MoDConfig, float | None]:
        """The conversion as this model can have it, and what routing saves by itself for the recipe's own
        saving; None if it has none.

        Raises:
            ModlabError: the model cannot be converted, or cannot store keys and values as was asked.
        """
        config, rounding = self._stored(config)
        if not self.savings:
            return config, None
        saving = self.savings.get(config.kv_cache_dtype)
        if saving is None:  # fewer bits save on top
            return config, self._reachable(self.savings["auto"], Rounding())
        # What was measured is a share that routing keeps: it does not change with the type of the weights.
        itemsize = self.model.dtype.itemsize
        if rounding.smaller > 1:
            rounding = replace(rounding, smaller=rounding.smaller * min(COUNTED, itemsize) / itemsize)
        return config, rounding.routed(self._reachable(saving, rounding))

    def asked(self, config: MoDConfig, kv_saving: float) -> tuple[MoDConfig, float]:
        """The same for a saving of both together that a user asked for.

        Raises:
            ModlabError: as `own`; the bits that were asked for save as much alone, or so few layers cannot.
        """
        keep_ratio_for_saving(kv_saving, *self.layers)  # which refuses in words of what was asked
        config, rounding = self._stored(config)
        by_routing = rounding.routed(kv_saving)
        bits = KV_BITS.get(config.kv_cache_dtype)
        alone = f"kv_saving={kv_saving:g}: {bits} alone save {rounding.total(1.0):.3g}x, which leaves"
        if not self.insists and rounding.smaller > 1 and self._keep(by_routing) > self.keep_range[1]:
            warn(
                f"{alone} less to routing than the recipe {self.name!r} trains it to: keys and values stay "
                "in the model's own type here (kv_cache_dtype='auto')."
            )
            return replace(config, kv_cache_dtype="auto"), kv_saving
        if by_routing <= 1:
            raise ModlabError(f"{alone} nothing to routing. Ask for more, or leave kv_cache_dtype out.")
        return config, by_routing

    def _stored(self, config: MoDConfig) -> tuple[MoDConfig, Rounding]:
        """The conversion as this model can have it, and what its bits save there."""
        if config.kv_cache_dtype == "auto":
            return config, Rounding()
        plain = replace(config, kv_cache_dtype="auto")
        with _converted(self.model, plain):
            try:
                begin_rounding(self.model, config.kv_cache_dtype, FEW_TOKENS)  # only the shapes are wanted
                return config, rounding_of(self.model)
            except ModlabError as error:
                if self.insists:
                    raise
                warn(
                    f"the recipe {self.name!r} stores keys and values in {KV_BITS[config.kv_cache_dtype]}, "
                    "which this model cannot have: they stay in its own type (kv_cache_dtype='auto'). "
                    f"{error}"
                )
                return plain, Rounding()

    def _reachable(self, saving: float, rounding: Rounding) -> float:
        """The recipe's own saving, or, with a word, three quarters of the way to what so few layers can
        save."""
        routed, holding = self.layers
        most = holding / (holding - routed) if routed < holding else math.inf
        if saving < most and self._keep(rounding.routed(saving)) > self.keep_range[0]:
            return saving
        aim = 1 + 0.75 * (most - 1)
        warn(
            f"{routed} of {holding} layers are routed (others hold a window alone), which saves less than "
            f"{most:.3g}x: the recipe {self.name!r} aims at {aim:.3g}x here instead of {saving:g}x "
            "(kv_saving=...)."
        )
        return aim

    def _keep(self, by_routing: float) -> float:
        return unbounded_keep_ratio(by_routing, *self.layers)


@contextlib.contextmanager
def _converted(model: Any, config: MoDConfig) -> Iterator[None]:
    """Inside this block the model is converted; afterwards it is dense again, and in fast generation if it
    was, which conversion ends."""
    engine = model.__dict__.get("mod_engine")
    convert(model, config)
    try:
        yield
    finally:
        revert(model)
        if engine is not None:
            from modlab.engine import enable_fast_generation  # brings Triton along, which most never need

            enable_fast_generation(model, engine.compile, check=False)


def at_one_saving(
    model: Any, config: MoDConfig, recent_range: tuple[int, int], saving: float, layers: tuple[int, int]
) -> tuple[MoDConfig, float]:
    """The conversion with the recent tokens that go with a saving, and the keep ratio that they leave."""
    length = min(context_length(model) or SAVING_TEXT, SAVING_TEXT)
    config = replace(config, keep_recent=recent_at(recent_range, saving, length))
    return config, unbounded_keep_ratio(saving, *layers, recent_share(config, length))
