"""What keep ratio makes the key/value cache of a context fit into a memory budget."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from modlab.cache import bytes as kv_bytes
from modlab.config import MoDConfig
from modlab.errors import ModlabError, check_number
from modlab.hf.names import given_cache
from modlab.routing.state import is_converted, routing_of

if TYPE_CHECKING:
    from modlab.routing.state import Routing

MIB = 2**20


def keep_ratio_for(model: Any, *, kv_mib: float, context: int, batch: int = 1) -> float:
    """The mean keep ratio of the routed layers at which the cache of `context` tokens takes `kv_mib` MiB.

    Layers with a sliding window are counted as if they kept everything: they take less. Free places that a
    growing cache keeps for coming tokens are not counted, nor with skip="kv" the few that wait to be swept
    out.

    Args:
        model: a converted model.
        kv_mib: MiB for keys and values of all layers, above 0.
        context: tokens in a row.
        batch: rows.

    Returns:
        a ratio in (0, 1), as `modlab.calibrate(keep_ratio=...)` takes it.

    Raises:
        ModlabError: the budget is less than the layers that are not routed (and the recent tokens) take
            alone, or enough for everything; both say how many MiB that is. A dense model, one whose skip
            stores everything, a number that is not above 0.
    """
    routing = routing_of(model)
    for name, value in (("kv_mib", kv_mib), ("context", context), ("batch", batch)):
        check_number(name, value)
    if not kv_mib > 0 or not context > 0 or not batch > 0:
        raise ModlabError(
            f"kv_mib={kv_mib}, context={context} and batch={batch} have to be above 0: for example "
            "kv_mib=512, context=32768."
        )
    skip = routing.skip
    if skip.stores_all:
        raise ModlabError(
            f"this model routes {skip.words.routed}: all keys and values stay, whatever the threshold is."
        )
    each, stored = token_sizes(model)
    tokens, routed = context * batch, len(routing.layers)
    dense = tokens * each * (routing.num_layers - routed)
    ragged = tokens * routed * (stored + index_bytes(routing))
    recent = recent_share(routing.config, context)
    ratio = keep_without_recent((kv_mib * MIB - dense) / ragged, recent)
    if ratio >= 1:
        raise ModlabError(
            f"{kv_mib:g} MiB hold the whole cache of {tokens:,} tokens, which takes "
            f"{(dense + ragged) / MIB:.4g} MiB: there is nothing to save. Give a smaller budget or a longer "
            "context."
        )
    if ratio <= 0:
        raise ModlabError(
            f"{kv_mib:g} MiB are too little for {tokens:,} tokens: the {routing.num_layers - routed} layers "
            f"that are not routed{' and the latest tokens' if recent else ''} take "
            f"{(dense + recent * ragged) / MIB:.4g} MiB alone. Give more, shorten the context, or route "
            "more layers (MoDConfig(layers='all'))."
        )
    return ratio


def keep_ratio_for_saving(kv_saving: float, routed: int, num_layers: int) -> float:
    """The mean keep ratio of the routed layers at which keys and values take 1/kv_saving of the dense bytes,
    where the context is long against the recent tokens that skip="kv" keeps anyway.

    Args:
        kv_saving: above 1.
        routed: routed layers, of `num_layers`.
        num_layers: decoder layers that hold keys and values.

    Raises:
        ModlabError: so few layers cannot save as much, whatever they skip; or `kv_saving` is not above 1.
    """
    if not check_number("kv_saving", kv_saving) > 1:
        raise ModlabError(f"kv_saving={kv_saving} has to be above 1: 1.8 leaves 1/1.8 of the K/V bytes.")
    ratio = unbounded_keep_ratio(kv_saving, routed, num_layers)
    if ratio <= 0:
        most = num_layers / (num_layers - routed) if routed < num_layers else float("inf")
        raise ModlabError(
            f"{routed} of {num_layers} layers are routed, which saves less than {most:.2f}x: "
            f"kv_saving={kv_saving} needs more routed layers: MoDConfig(layers='all'), or ask for less."
        )
    return ratio


def unbounded_keep_ratio(kv_saving: float, routed: int, num_layers: int, recent: float = 0.0) -> float:
    """`keep_ratio_for_saving` without its refusals: not above 0 where skipping everything saves less.

    Args:
        recent: share of the context that is in the cache anyway (`recent_share`).
    """
    return keep_without_recent((num_layers / kv_saving - (num_layers - routed)) / routed, recent)


def index_bytes(routing: Routing) -> float:
    """Bytes next to the keys and values of one token in a routed layer's cache, the mean of these layers.
    Each of a layer's gates has an index of its own."""
    return routing.skip.index_bytes * sum(routing.gates.values()) / len(routing.layers)


def recent_share(config: MoDConfig, context: float) -> float:
    """Share of a context that is in the cache whether kept or not (`MoDConfig.recent_stored`)."""
    return min(1.0, config.recent_stored / context)


def keep_without_recent(stored: float, recent: float) -> float:
    """The keep ratio at which a share `stored` is in the cache: `Skip.stored_share` solved for it. Not above
    0 where the recent tokens alone are more than that."""
    return (stored - recent) / (1 - recent) if recent < 1 else stored - 1.0


def token_bytes(model: Any) -> int:
    """Bytes of the keys and values of one token in one layer of a dense cache, the largest of them."""
    return token_sizes(model)[0]


@torch.no_grad()
def token_sizes(model: Any) -> tuple[int, int]:
    """Bytes of the keys and values of one token in one layer, the largest of them: in a dense cache, and as a
    routed layer stores them, which is less in fewer bits. Measured with a forward of one token."""
    from modlab.hf.model import eval_mode

    with eval_mode(model):
        ids = torch.zeros(1, 1, dtype=torch.long, device=model.device)
        cache = given_cache(model(ids, use_cache=True))
    return cache_sizes(model, cache)


def cache_sizes(model: Any, cache: Any) -> tuple[int, int]:
    """`token_sizes`, of a cache that something is in."""
    dense = max(kv_bytes.dense_token_nbytes(layer) for layer in cache.layers)
    routed = routing_of(model).layers if is_converted(model) else ()
    stored = max((kv_bytes.token_nbytes(cache.layers[i]) for i in routed), default=0)
    return dense, stored or dense  # 0 where no layer has kept it
