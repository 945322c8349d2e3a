"""Attention of masked passes in training on a GPU: flex attention, with the mask as a rule in its kernel.

As a tensor [B, 1, T, T] the mask keeps sdpa off its flash kernel and has to be read: at 4,096 tokens a
what-if pass then takes about three packed ones (H200, docs/log.md). `masked_reference_mask` stays the
specification.

Shape letters: B batch rows, T tokens, Z blocks of tokens.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask
from transformers import AttentionInterface, AttentionMaskInterface

from modlab.hf.attention_names import attention_named
from modlab.routing.record import by_gate
from modlab.routing.rule import over

if TYPE_CHECKING:
    from modlab.execution.masks import MaskValues
    from modlab.execution.site import Site

NAME = "modlab_what_if"
"""Under which transformers knows `what_if_attention`."""

BLOCK = 128
"""Tokens a block of flex attention's block masks; its own default."""


def takes_flex(site: Site, given: MaskValues, device: torch.device) -> bool:
    """Whether a masked pass of this module may run through transformers' flex attention.

    It may where the model says that it can, nothing but the mask decides who sees whom, and the device is a
    GPU (flex attention has no backward pass on a CPU). Its rules count the recent past in columns, which are
    tokens unless padding stands inside a row.
    """
    routing = site.routing
    return (
        device.type == "cuda"
        and routing.supports_flex
        and site.attention == "sdpa"
        and site.window is None
        and not site.needs_mask
        and site.call.is_plain(given.mask)
        and not getattr(routing.model_config, "attention_dropout", 0.0)
        and not (site.recent is not None and site.call.has_gaps)
    )


def flex_attention(model_config: Any) -> contextlib.AbstractContextManager[None]:
    """Inside this block the layers of the model find `what_if_attention` as attention implementation.

    Args:
        model_config: the decoder's, which its layers share.
    """
    return attention_named([model_config], NAME)


def what_if_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """transformers' flex attention, told of autocast: rotary tables in fp32 leave queries and keys in fp32,
    which sdpa would cast on its own.

    Arguments and result as of transformers' attention functions; `attention_mask` is a `BlockMask`, or else
    it is the call of a forward in another thread, which is sdpa's.
    """
    from transformers.integrations.flex_attention import flex_attention_forward

    if not isinstance(attention_mask, BlockMask):
        return as_sdpa(module, query, key, value, attention_mask, **kwargs)
    query, key, value = as_autocast(query, key, value)
    return flex_attention_forward(module, query, key, value, attention_mask, **kwargs)


def as_sdpa(module: nn.Module, *tensors: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
    """What the model's own forward would have called: only models with sdpa come to flex attention."""
    attended: tuple[Tensor, Tensor | None] = AttentionInterface()["sdpa"](module, *tensors, **kwargs)
    return attended


def as_autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in the type that autocast asks for, where it is on."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    return tuple(tensor.to(torch.get_autocast_dtype(device)) for tensor in tensors)


# Additions under a new name, once for all passes; masks of forwards in other threads are sdpa's.
AttentionInterface.register(NAME, what_if_attention)
AttentionMaskInterface.register(NAME, AttentionMaskInterface()["sdpa"])


def what_if_block_mask(
    keep: Tensor,
    real_BT: Tensor,
    recent: int = 1,
    documents_BT: Tensor | None = None,
    query_heads: int = 1,
) -> BlockMask:
    """`masked_reference_mask` without a window, as a block mask: kept tokens not after the query, its latest
    `recent` tokens, and itself; of its own document where a row packs several.

    Args:
        keep: bool [B, T], or [B, T, G].
        query_heads: N, of which each gate's share attends to its keys.
    """
    kept_BTG = by_gate(keep & over(real_BT, keep))
    sharing = query_heads // kept_BTG.shape[2] if keep.dim() == 3 else None
    document_BT = torch.zeros_like(real_BT, dtype=torch.long) if documents_BT is None else documents_BT

    def allowed(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        kept = kept_BTG[row, key, head // sharing if sharing else 0]
        stored = kept | ((query - key < recent) & real_BT[row, key])
        together = document_BT[row, key] == document_BT[row, query]
        return ((query >= key) & stored & together) | (query == key)

    T = keep.shape[1]
    return band_block_mask(allowed, T, 0, T, keep.device)


def band_block_mask(
    allowed: Callable[..., Tensor], T: int, nearest: int, past: int, device: torch.device
) -> BlockMask:
    """The rule `allowed` (a `mask_mod` of flex attention), asked in the blocks that hold keys from `nearest`
    tokens before the query up to, not including, `past` before it.

    It is asked in all of them: which blocks hold no kept token is not worth finding out.
    """
    counts_Z, blocks_ZZ = _band_blocks(T, nearest, past, device)
    return BlockMask.from_kv_blocks(
        counts_Z, blocks_ZZ, BLOCK_SIZE=BLOCK, mask_mod=allowed, seq_lengths=(T, T)
    )


@functools.lru_cache(maxsize=16)
def _band_blocks(T: int, nearest: int, past: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """For each block of queries in how many blocks of keys the band lies [1, 1, Z], and in which
    [1, 1, Z, Z]."""
    with torch.inference_mode(False):  # kept for steps of training
        return _band(-(-T // BLOCK), nearest, past, device)


def _band(Z: int, nearest: int, past: int, device: torch.device) -> tuple[Tensor, Tensor]:
    queries = torch.arange(Z, device=device) * BLOCK
    first = ((queries - past + 1).clamp(min=0)) // BLOCK  # of the block's first query
    last = (queries + BLOCK - 1 - nearest) // BLOCK  # of its last query; negative: none
    counts = (last - first + 1).clamp(min=0)
    blocks = (first[:, None] + torch.arange(Z, device=device)).clamp(max=Z - 1)
    return counts.int()[None, None], blocks.int()[None, None].contiguous()
