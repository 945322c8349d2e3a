"""KV saving of a model as a whole: what routing saves, and what fewer bits save on top.

    modlab.set_kv_saving(model, 4)  # thresholds for a cache a quarter of the dense one

Routers are trained, and what is known of them is kept (`Routing.trained`), by what routing saves alone: the
same routers serve both ways to store a number. Everybody who asks for a saving, or tells one, comes through
here, where one is counted from the other.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from modlab.cache.dtypes import token_bytes
from modlab.errors import ModlabError, check_number
from modlab.hf.anatomy import attention_name, decoder_layers
from modlab.routing.state import gated_routing_of, routing_of, set_keep_recent, set_threshold
from modlab.routing.trained import Trained
from modlab.warn import warn

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Rounding:
    """What storing numbers in fewer bits saves.

    Attributes:
        smaller: bytes of a token in a routed layer in the model's own type, over those that it takes there;
            1: nothing is rounded.
        elsewhere: share of the layers with keys and values that are not routed, whose bytes stay.
    """

    smaller: float = 1.0
    elsewhere: float = 0.0

    def total(self, routed: float) -> float:
        """The KV saving of both, where routing alone gives `routed`."""
        if self.smaller == 1:
            return routed
        return 1 / (self.elsewhere + (1 / routed - self.elsewhere) / self.smaller)

    def routed(self, total: float) -> float:
        """What routing has to give for a KV saving of both: below 1 where rounding alone gives more.

        Raises:
            ModlabError: so few layers are routed that nothing gives as much.
        """
        if self.smaller == 1:
            return total
        left = self.elsewhere + (1 / total - self.elsewhere) * self.smaller
        if left <= self.elsewhere:
            raise ModlabError(
                f"kv_saving={total:g}: the layers that are not routed take {self.elsewhere:.3g} of the dense "
                f"bytes, so less than {1 / self.elsewhere:.3g}x can be saved. Route more of them "
                "(MoDConfig(layers='all')), or ask for less."
            )
        return 1 / left


def rounding(
    kv_cache_dtype: str, sizes: tuple[int, int, int], itemsize: int, elsewhere: float = 0.0
) -> Rounding:
    """That of a `kv_cache_dtype`.

    Args:
        sizes: KV heads of a layer, and the numbers of a key and of a value of each.
        itemsize: bytes of a number in the model's own type.
        elsewhere: as of `Rounding`.

    Raises:
        ModlabError: such heads cannot be stored so.
    """
    dense, stored = (token_bytes(dtype, *sizes, itemsize) for dtype in ("auto", kv_cache_dtype))
    return Rounding(dense / stored, elsewhere)


def rounding_of(model: Any) -> Rounding:
    """That of a converted model as it stores keys and values now."""
    routing = routing_of(model)
    if not routing.ranges:
        return Rounding()
    found = next(iter(routing.ranges.values()))
    rest = elsewhere(model, len(routing.layers))
    return rounding(found.kv_cache_dtype, found.sizes, model.dtype.itemsize, rest)


def elsewhere(model: Any, routed: int) -> float:
    """Share of a model's layers with keys and values that are not among so many routed ones."""
    holding = sum(attention_name(layer) is not None for layer in decoder_layers(model))
    return (holding - routed) / holding


def known_of(model: Any) -> Trained:
    """What is known of the model's routers, by KV savings of its cache as it is stored now."""
    found = rounding_of(model)
    trained = routing_of(model).trained or Trained()
    return trained if found.smaller == 1 else trained.counted(found.total)


def threshold_for(model: Any, kv_saving: float) -> tuple[float, int | None]:
    """The threshold of a KV saving, and how many recent tokens go with it (None: those that the model has).

    With fewer bits that is 0, everything kept, up to what they save alone (eight: 1.94x with heads of 64 in
    16 bit), and estimated from there to the smallest saving known (`Trained.threshold_below`).

    Raises:
        ModlabError: no thresholds are known, or the saving lies outside their range.
    """
    check_number("kv_saving", kv_saving)
    known, found = known_of(model), rounding_of(model)
    if found.smaller > 1 and known.range is not None and 1 <= kv_saving < known.range[0]:
        if kv_saving <= found.total(1.0):
            return 0.0, None
        trained = routing_of(model).trained
        assert trained is not None
        return trained.threshold_below(found.routed(kv_saving)), known.recent_for(known.range[0])
    return known.threshold_for(kv_saving), known.recent_for(kv_saving)


def set_kv_saving(model: PreTrainedModel, kv_saving: float) -> float:
    """Sets the threshold that gives a KV saving, as the routers' training left it (`Routing.trained`), and,
    where that goes with it, how many of the latest tokens stay anyway (`set_keep_recent`, which says what
    becomes of a `generate` under way). Warns of a saving beyond those that the routers were trained for
    (`Trained.reached`).

    Where keys and values are stored in fewer bits, these save a part of it and routing is asked for the rest:
    with "int8", 1.94x of 16 bit numbers in heads of 64, for 8x about what it is asked for at 4x without; with
    "k6v4", 3.05x, for 16x what it is asked for at 5.2x. Up to what bits save alone everything is kept; from
    there to the smallest saving that the routers know the threshold is an estimate.

    Args:
        model: a converted model whose routers know thresholds by saving, such as `modlab.load("smollm2-kv")`.
        kv_saving: dense cache bytes over allocated ones, in long texts; a text may get more or less.

    Returns:
        the threshold, the same for all routed layers.

    Raises:
        ModlabError: no thresholds are known, the saving lies outside their range, or thresholds mean nothing
            to the skip. Nothing is changed then.
    """
    gated_routing_of(model)
    p, recent = threshold_for(model, kv_saving)
    if recent is not None:
        set_keep_recent(model, recent)
    set_threshold(model, p)
    if warning := known_of(model).warning_for(p):
        warn(f"kv_saving={kv_saving:g}: {warning}")
    return p
