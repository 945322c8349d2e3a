"""Causal masks among kept tokens, by the columns where the tokens stood in the padded batch.

Shape letters: B batch rows, R rows of one group, T tokens in, S kept tokens, K keys, C columns, N query
heads, G gates of a layer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from modlab.execution.site import Site


def packed_mask(query_columns_RS: Tensor, key_columns_RK: Tensor, window: int | None = None) -> Tensor:
    """True where a kept query may attend to a kept key: not later than itself, and inside a sliding window.

    Args:
        query_columns_RS: columns of the queries.
        key_columns_RK: columns of the keys; a slot without a token carries a column later than every query.
        window: sliding window in tokens (the query itself counted), or None.

    Returns:
        bool [R, 1, S, K].
    """
    query, key = query_columns_RS[:, None, :, None], key_columns_RK[:, None, None, :]
    allowed = key <= query
    if window is not None:
        allowed = allowed & recent_mask(query_columns_RS, key_columns_RK, window)
    return allowed


def recent_mask(query_places_RS: Tensor, key_places_RK: Tensor, recent: int) -> Tensor:
    """True where a key is among the latest `recent` places of a query, its own counted: bool [R, 1, S, K].

    Places are columns for a sliding window, in which padding counts as the model has it, and tokens of the
    row for the recent past that routing leaves to every token.
    """
    return key_places_RK[:, None, None, :] > query_places_RS[:, None, :, None] - recent


def visible_mask(
    given: MaskValues, query_columns_RS: Tensor, key_columns_RK: Tensor, window: int | None, attention: str
) -> Tensor:
    """True where the model lets a query attend to a key: what the mask says that it made for the layer, with
    packed documents, blocks that see the future and all; causal where it made none.

    Args:
        given: that mask.
        query_columns_RS: columns of the queries.
        key_columns_RK: columns of the keys; a slot without a token carries `NO_KEY`'s.
        window: sliding window in tokens (the query itself counted) that the mask does not tell of
            (`untold_window`), or None.
        attention: `config._attn_implementation`.

    Returns:
        bool [R, N or 1, S, K]. Of an additive mask, whose own entries stay, only the keys' slots and the
        window are judged.
    """
    if not (given.additive or given.boolean):
        return packed_mask(query_columns_RS, key_columns_RK, window)
    held = (key_columns_RK < given.columns)[:, None, None, :]
    if window is not None:
        held = held & recent_mask(query_columns_RS, key_columns_RK, window)
    if given.additive:
        return held
    allowing = True if attention == "sdpa" else given.allowing()
    return held & (given.values() == allowing)


def untold_window(given: MaskValues, site: Site) -> int | None:
    """The layer's sliding window, where its mask does not tell of it.

    A mask of all columns does: an image's tokens may see each other across more than a window, and the
    caller's own mask may know of none. It does not where an attention slides by itself, nor of cached keys,
    of which those that the window has left behind may be gone already.
    """
    mask = given.mask
    whole = (given.additive or given.boolean) and mask.shape[2] == mask.shape[3] == given.columns
    return None if whole and not site.own_window else site.window


def of_keys(value: Tensor, query_heads: int = 1) -> Tensor:
    """What is said of each key [R, K], or of each key in each KV head [R, K, G], laid out as attention scores
    are: [R, 1 or N, 1, K]. The query heads of a KV head stand next to each other."""
    if value.dim() == 2:
        return value[:, None, None, :]
    return value.transpose(1, 2).repeat_interleave(query_heads // value.shape[2], dim=1)[:, :, None, :]


def stored_mask(keep: Tensor, real_BT: Tensor, recent: int | None = None, query_heads: int = 1) -> Tensor:
    """True where routing leaves a key to a query: it is kept, or not older than the query's latest `recent`
    tokens of its row; never for padding. bool [B, 1 or N, T or 1, T].

    Args:
        keep: bool [B, T], or [B, T, G].
    """
    kept = of_keys(keep, query_heads)
    if recent is not None:
        tokens_BT = real_BT.cumsum(1)  # padding inside a row is no part of its recent past
        kept = kept | recent_mask(tokens_BT, tokens_BT, recent) & real_BT[:, None, :, None]
    return kept & real_BT[:, None, None, :]


def masked_reference_mask(
    keep: Tensor,
    real_BT: Tensor,
    window: int | None = None,
    recent: int | None = None,
    visible: Tensor | None = None,
    query_heads: int = 1,
) -> Tensor:
    """True where a token may attend in the masked reference: to what the model lets it see, of that to kept
    tokens and to the latest `recent` tokens of its row, and to itself.

    A skipped token attends to itself too: what it would have seen had it been kept. Padding attends to itself
    only, so that no softmax runs over nothing.

    Args:
        keep: bool [B, T], or [B, T, G].
        visible: what the model lets it see (`visible_mask`), [B, N or 1, T, T]; causal by default.
        query_heads: N, of which each gate's share attends to its keys.

    Returns:
        bool [B, N or 1, T, T].
    """
    T, device = keep.shape[1], keep.device
    if visible is None:
        columns = torch.arange(T, device=device)[None]
        visible = packed_mask(columns, columns, window)
    itself = torch.eye(T, dtype=torch.bool, device=device)
    return (visible & stored_mask(keep, real_BT, recent, query_heads)) | itself


def as_attention_mask(
    allowed: Tensor, attention: str, dtype: torch.dtype, given: MaskValues | None = None
) -> Tensor:
    """The mask in the form that an attention implementation of transformers takes.

    Args:
        allowed: bool [R, N or 1, S, K].
        attention: `config._attn_implementation`.
        dtype: dtype of the hidden states.
        given: the mask that the model itself made for the layer. An additive one may carry more than who sees
            whom (ALiBi), a boolean one says by its own entries what True means.

    Returns:
        `allowed` itself for sdpa; else additive, 0 (or the model's own bias) where allowed and the dtype's
        minimum elsewhere.
    """
    if given is not None and given.additive:
        values = given.values()
        return torch.where(allowed, values, torch.finfo(values.dtype).min)
    if attention == "sdpa":
        return allowed
    if given is not None and given.boolean:
        return allowed == given.allowing()
    return torch.zeros(allowed.shape, dtype=dtype, device=allowed.device).masked_fill(
        ~allowed, torch.finfo(dtype).min
    )


@dataclass
class MaskValues:
    """A mask that the model made for a layer, as seen by some queries and keys.

    Attributes:
        mask: [B or 1, N or 1, T, C'], its last column the newest one; or whatever the model passes (None, a
            kernel's own object).
        rows_R1: batch rows.
        index_RS: time positions of the queries.
        keys_RK: columns of the keys.
        columns: how many columns have been seen.
    """

    mask: Any
    rows_R1: Tensor
    index_RS: Tensor
    keys_RK: Tensor
    columns: int

    @property
    def additive(self) -> bool:
        """Whether its entries are added to attention scores."""
        return isinstance(self.mask, Tensor) and self.mask.is_floating_point() and self.mask.dim() == 4

    @property
    def boolean(self) -> bool:
        """Whether its entries are True and False."""
        return isinstance(self.mask, Tensor) and self.mask.dtype == torch.bool and self.mask.dim() == 4

    def values(self) -> Tensor:
        """Its entries [R, N or 1, S, K]; those of key slots without a token mean nothing."""
        mask_BNTC, device = self.mask, self.mask.device
        rows_R1 = self.rows_R1 if mask_BNTC.shape[0] > 1 else torch.zeros_like(self.rows_R1)
        picked_RSNC = mask_BNTC[rows_R1.to(device), :, self.index_RS.to(device)]
        width = mask_BNTC.shape[3]
        at_RK = (self.keys_RK.long() - (self.columns - width)).clamp(0, width - 1).to(device)
        at = at_RK[:, None, None, :].expand(*picked_RSNC.shape[:3], -1)
        return picked_RSNC.gather(3, at).transpose(1, 2)

    def allowing(self) -> Tensor:
        """What an entry is where a query may attend, bool []: the newest key is hidden from all queries but
        the newest, and that one sees itself."""
        row = self.rows_R1[:1, 0].to(self.mask.device) if self.mask.shape[0] > 1 else slice(0, 1)
        newest_1 = self.mask[row, 0, 0, -1]
        return ~newest_1 if self.mask.shape[2] > 1 else newest_1
