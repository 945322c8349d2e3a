"""Attention of passes in masked form when training on a GPU: flex attention, which evaluates the mask's rule
in its kernel.

As a tensor [B, 1, T, T] the mask keeps sdpa off its flash kernel and has to be read: at 4,096 tokens a
what-if pass then takes about three packed ones (H200, docs/log.md). `masked_reference_mask` stays the
specification.

Shape letters: B batch rows, T tokens, L blocks of tokens.
"""

from __future__ import annotations

import contextlib
import functools
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask
from transformers import AttentionInterface

from modlab.attention_name import attention_named

if TYPE_CHECKING:
    from modlab.layer import Site
    from modlab.masks import MaskValues

NAME = "modlab_what_if"
"""Under which transformers knows `what_if_attention`."""

BLOCK = 128
"""Tokens a block of flex attention's block masks; its own default."""


def takes_flex(site: Site, given: MaskValues, device: torch.device) -> bool:
    """Whether a masked pass of this module may run through transformers' flex attention.

    It may where the model says that it can, nothing but the mask decides who sees whom, and the device is a
    GPU (flex attention has no backward pass on a CPU).
    """
    routing = site.routing
    return (
        device.type == "cuda"
        and routing.supports_flex
        and site.attention == "sdpa"
        and site.window is None
        and not site.needs_mask
        and not given.additive
        and not getattr(routing.model_config, "attention_dropout", 0.0)
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

    Arguments and result as of transformers' attention functions; `attention_mask` is a `BlockMask`.
    """
    from transformers.integrations.flex_attention import flex_attention_forward

    if torch.is_autocast_enabled(query.device.type):
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    return flex_attention_forward(module, query, key, value, attention_mask, **kwargs)


AttentionInterface.register(NAME, what_if_attention)  # an addition under a new name, once for all passes


def what_if_block_mask(keep_BT: Tensor, real_BT: Tensor, recent: int = 1) -> BlockMask:
    """`masked_reference_mask` without a window, as a block mask: kept tokens not after the query, its latest
    `recent` tokens, and itself.
    """
    kept_BT = keep_BT & real_BT

    def allowed(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        stored = kept_BT[row, key] | ((query - key < recent) & real_BT[row, key])
        return ((query >= key) & stored) | (query == key)

    T = keep_BT.shape[1]
    counts_L, blocks_LL = _causal_blocks(T, keep_BT.device)
    return BlockMask.from_kv_blocks(
        counts_L, blocks_LL, BLOCK_SIZE=BLOCK, mask_mod=allowed, seq_lengths=(T, T)
    )


@functools.lru_cache(maxsize=8)
def _causal_blocks(T: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """For each block of queries how many blocks of keys it may see [1, 1, L], and which [1, 1, L, L].

    The rule is asked in all of them: which blocks hold no kept token is not worth finding out.
    """
    L = -(-T // BLOCK)
    order_L = torch.arange(L, dtype=torch.int32, device=device)
    return (order_L + 1)[None, None], order_L.expand(1, 1, L, L).contiguous()
