"""Causal masks among kept tokens, by the columns where the tokens stood in the padded batch.

Shape letters: B batch rows, R rows of one group, T tokens in, S kept tokens, K keys.
"""

from __future__ import annotations

import torch
from torch import Tensor


def packed_mask(query_columns_RS: Tensor, key_columns_RK: Tensor, window: int | None = None) -> Tensor:
    """True where a kept query may attend to a kept key: not later, and inside the sliding window if there is
    one.

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
        allowed = allowed & (key > query - window)
    return allowed


def masked_reference_mask(keep_BT: Tensor, real_BT: Tensor, window: int | None = None) -> Tensor:
    """True where a token may attend in the masked reference: to kept tokens not after it, and to itself.

    A skipped token attends to itself too: what it would have seen had it been kept. Padding attends to itself
    only, so that no softmax runs over nothing.

    Returns:
        bool [B, 1, T, T].
    """
    T = keep_BT.shape[1]
    columns = torch.arange(T, device=keep_BT.device)[None]
    itself = torch.eye(T, dtype=torch.bool, device=keep_BT.device)
    causal = packed_mask(columns, columns, window)
    return (causal & (keep_BT & real_BT)[:, None, None, :]) | itself


def as_attention_mask(allowed: Tensor, attention: str, dtype: torch.dtype) -> Tensor:
    """The mask in the form that an attention implementation of transformers takes.

    Args:
        allowed: bool [R, 1, S, K].
        attention: `config._attn_implementation`.
        dtype: dtype of the hidden states.

    Returns:
        `allowed` itself for sdpa; else additive, 0 where allowed and the dtype's minimum elsewhere.
    """
    if attention == "sdpa":
        return allowed
    return torch.zeros(allowed.shape, dtype=dtype, device=allowed.device).masked_fill(
        ~allowed, torch.finfo(dtype).min
    )
