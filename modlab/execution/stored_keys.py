"""Attention over the cache as it lies there, for `skip="kv"`: segment by segment, without a copy.

The attention of a routed layer is handed its new keys alone. Between that and its call of torch's
`scaled_dot_product_attention`, this thread's call is taken over (`Attending`), and each segment of the cache
is attended to by its own query heads: what each stores is all that is read, however unequal heads and rows
are. In a prompt the older kept keys are gathered once, and each stretch of queries meets those of them that
are older than its recent past, and the recent ones themselves: so dropped keys cost nothing.

Only attentions that were seen to do nothing else with their keys run this way (`skips/plain.py`), and only
where a plain causal mask is all that hides: everything else runs as `packed.py` says.

Shape letters: R rows of one group, S new tokens, K keys of a segment, N query heads, G kv heads (here: of one
segment), H head dim.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from modlab.cache.ragged import PackedView, RaggedCache
from modlab.cache.recent import RecentLayer
from modlab.errors import ModlabError

if TYPE_CHECKING:
    from modlab.execution.site import Site

STRETCH = 256
"""Queries of a prompt that run at once: each attends to so many keys more than it may."""


def attends_directly(site: Site, layer: Any, mask: Any, training: bool, one_row_each: bool) -> bool:
    """Whether this forward of an attention may run here.

    On a GPU decoding with one launch for each segment takes longer than gathering them.
    """
    return (
        isinstance(layer, RecentLayer)
        and site.plain
        and site.attention == "sdpa"
        and site.recent is not None
        and site.window is None
        and layer.sliding_window is None
        and not (training or site.needs_mask or one_row_each)
        and site.call.is_causal(mask)
        and site.decision.keep.device.type == "cpu"
    )


class StoredView(PackedView):
    """A `PackedView` that stores the new keys, and leaves the attention over all of them to `Attending`."""

    layer: RecentLayer

    def __init__(self, cache: RaggedCache, layer: RecentLayer, rows: list[int], recent: int | None) -> None:
        super().__init__(cache, layer, rows)
        assert recent is not None
        self.attending = Attending(layer, rows, recent)

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Stores K/V [R, G, S, H] of the group's tokens; returns them as they came."""
        self._check(layer_idx)
        self.layer.store(self.rows, key_states, value_states)
        self.attending.begin()
        return key_states, value_states


class Attending(TorchFunctionMode):
    """Between `begin` and `end` the one attention that this thread calls is over stored keys.

    Attributes:
        layer, rows: whose keys.
        recent: how many of the latest tokens a token attends to, kept or not.
        met: how many attentions were called.
    """

    def __init__(self, layer: RecentLayer, rows: list[int], recent: int) -> None:
        super().__init__()
        self.layer, self.rows, self.recent = layer, rows, recent
        self.begun, self.met = False, 0

    def begin(self) -> None:
        """The module has its new keys."""
        self.begun = True
        self.__enter__()

    def end(self) -> None:
        """It has returned, or failed."""
        if self.begun:
            self.begun = False
            self.__exit__(None, None, None)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        self.met += 1
        return self._attend(*args, **kwargs)

    def _attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """The attention of `query` [R, N, S, H], or [R, G, N / G, H] of single tokens."""
        if attn_mask is not None or dropout_p or self.met > 1:
            raise changed()
        single = query.shape[2] > 1 and key.shape[2] == 1  # transformers packs the heads of a KV head
        query_RNSH = query.flatten(1, 2)[:, :, None] if single else query
        rows = [
            attended(self.layer, row, query_NSH, self.recent, scale)
            for row, query_NSH in zip(self.rows, query_RNSH, strict=True)
        ]
        return torch.stack(rows).reshape(*query.shape[:-1], -1)


def changed() -> ModlabError:
    """The error where an attention is not what it was found to be."""
    return ModlabError(
        "the attention of a routed layer does something else with its keys than when the model was "
        "converted: modlab.revert(model) and convert it again."
    )


def attended(layer: RecentLayer, row: int, query_NSH: Tensor, recent: int, scale: float | None) -> Tensor:
    """What the latest S tokens of a row, stored already, see of it: [N, S, H]."""
    segments = layer.segments(row)
    parts = [
        _segment(layer, segment, share_NSH, recent, scale)
        for segment, share_NSH in zip(segments, query_NSH.chunk(len(segments)), strict=True)
    ]
    return torch.cat(parts)


def _segment(layer: RecentLayer, segment: int, query_NSH: Tensor, recent: int, scale: float | None) -> Tensor:
    assert layer.kept is not None
    here = slice(layer.starts[segment], layer.starts[segment] + layer.lengths[segment])
    keys_GKH, values_GKH = layer.decoded(lambda content: content[:, here], layer.heads_of(segment))
    kept_K = layer.kept[here] if layer.has_skipped else None
    if query_NSH.shape[1] == 1:
        return _one_token(query_NSH, keys_GKH, values_GKH, kept_K, recent, scale)
    return _tokens(query_NSH, keys_GKH, values_GKH, kept_K, recent, scale)


def _one_token(
    query_N1H: Tensor,
    keys_GKH: Tensor,
    values_GKH: Tensor,
    kept_K: Tensor | None,
    recent: int,
    scale: float | None,
) -> Tensor:
    """The newest token attends: its heads stand as queries next to each other."""
    mask = None
    if kept_K is not None:  # those that wait to be swept out
        mask = kept_K[None].clone()
        mask[:, -recent:] = True
    query_GRH = query_N1H.reshape(len(keys_GKH), -1, query_N1H.shape[-1])
    out_GRH = F.scaled_dot_product_attention(
        query_GRH[None], keys_GKH[None], values_GKH[None], mask, scale=scale
    )
    return out_GRH.reshape(len(query_N1H), 1, -1)


def _tokens(
    query_NSH: Tensor,
    keys_GKH: Tensor,
    values_GKH: Tensor,
    kept_K: Tensor | None,
    recent: int,
    scale: float | None,
) -> Tensor:
    """The latest S tokens attend, a stretch of them at a time."""
    S, K = query_NSH.shape[1], keys_GKH.shape[1]
    older = None if kept_K is None else Older(keys_GKH, values_GKH, kept_K)
    parts = []
    for at in range(0, S, STRETCH):
        first, end = K - S + at, min(K - S + at + STRETCH, K)  # places of the stretch
        query = query_NSH[:, at : at + end - first]
        recents = 0 if older is None else max(first - recent + 1, 0)
        keys, values = keys_GKH[:, recents:end], values_GKH[:, recents:end]
        at_S1 = torch.arange(first, end, device=keys.device)[:, None]
        at_K = torch.arange(recents, end, device=keys.device)
        mask = at_K <= at_S1
        if older is not None:
            assert kept_K is not None
            mask &= kept_K[recents:end] | (at_K > at_S1 - recent)
            more_keys, more_values = older.before(recents)
            mask = F.pad(mask, (more_keys.shape[1], 0), value=True)
            keys, values = torch.cat([more_keys, keys], 1), torch.cat([more_values, values], 1)
        parts.append(_masked(query, keys, values, mask, scale))
    return torch.cat(parts, 1)


class Older:
    """The kept keys and values of a segment, gathered once."""

    def __init__(self, keys_GKH: Tensor, values_GKH: Tensor, kept_K: Tensor) -> None:
        places = kept_K.nonzero()[:, 0]
        self.keys_GKH, self.values_GKH = keys_GKH[:, places], values_GKH[:, places]
        self.counts = kept_K.cumsum(0).tolist()

    def before(self, place: int) -> tuple[Tensor, Tensor]:
        """Those in front of a place."""
        count = self.counts[place - 1] if place else 0
        return self.keys_GKH[:, :count], self.values_GKH[:, :count]


def _masked(
    query_NSH: Tensor, keys_GKH: Tensor, values_GKH: Tensor, mask_SK: Tensor, scale: float | None
) -> Tensor:
    """Attention of several queries, each KV head a row of a batch: no key is copied for its query heads."""
    G, sharing = len(keys_GKH), len(query_NSH) // len(keys_GKH)
    keys, values = (x[:, None].expand(-1, sharing, -1, -1) for x in (keys_GKH, values_GKH))
    query = query_NSH.reshape(G, sharing, *query_NSH.shape[1:])
    return F.scaled_dot_product_attention(query, keys, values, mask_SK, scale=scale).flatten(0, 1)
