"""Attention of what-if passes with `skip="kv"` on a GPU: keys' log-weights join the scores in flex attention.

As a tensor [B, 1, T, T] they keep sdpa off its flash kernel, and so does their gradient, which has the size
of all scores. Here recent keys, which have no weight, and earlier ones, which have, are attended to
separately, and the two results are joined by their log-sum-exps (as in ring attention, arXiv 2310.01889).
The weight of an earlier key is one more entry of the key, read by a query's entry that is 1: its gradient
comes out of the kernel's own product for the keys. `masked_keys.log_weights` stays the specification. Rows
without padding, of one document each, go through one kernel instead (`kernels/weighed_attention.py`).

Shape letters: B batch rows, T tokens, N query heads, G kv heads, H head dim.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention
from transformers import AttentionInterface, AttentionMaskInterface

from modlab.errors import ModlabError
from modlab.execution.what_if_attention import as_autocast, as_sdpa, band_block_mask
from modlab.hf.attention_names import attention_named
from modlab.kernels.launch import KernelRefused, warn_slower
from modlab.kernels.weighed_attention import kernel_weighed_attention, takes
from modlab.routing.record import by_gate

NAME = "modlab_weighed"
"""Under which transformers knows `weighed_attention`."""

MORE_ENTRIES = 8
"""A head gets so many more entries, all zero but one: 16 bytes in 16 bit, so that rows stay aligned."""


Blocks = tuple[BlockMask, BlockMask | None]


@dataclass
class WeighedKeys:
    """What a layer passes instead of a mask.

    Attributes:
        log_weight: added to the scores of keys that are not recent, at most 0, [B, T] or [B, T, G]; with
            gradient.
        plain: how many keys are recent, where rows have neither padding nor several documents: the kernel
            then needs no masks. None otherwise.
        blocks: block masks of the keys that are recent (every token sees itself) and of the others (None
            where no row is longer than the recent past), or what makes them: each is dozens of launches,
            which the kernel has no use for.
        instead: makes the same as a mask for sdpa, by which runs what the kernel does not take, or what does
            more than softmax; None where there are `blocks`.
    """

    log_weight: Tensor
    plain: int | None
    blocks: Blocks | Callable[[], Blocks] | None = None
    instead: Callable[[], Any] | None = None


def weighed_keys(
    log_weight: Tensor,
    real_BT: Tensor,
    recent: int,
    documents_BT: Tensor | None = None,
    padded: bool = True,
    at_once: bool = False,
) -> WeighedKeys:
    """What a token sees of its document, in two parts: its latest `recent` tokens, and all before them.

    Args:
        padded: whether there may be padding in `real_BT`.
        at_once: makes block masks now, for layers that are traced.
    """
    T = real_BT.shape[1]
    document_BT = torch.zeros_like(real_BT, dtype=torch.long) if documents_BT is None else documents_BT

    def together(row: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return real_BT[row, key] & (document_BT[row, key] == document_BT[row, query])

    def near(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query == key) | ((query >= key) & (query - key < recent) & together(row, query, key))

    def far(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query - key >= recent) & together(row, query, key)

    def blocks() -> Blocks:
        device = real_BT.device
        earlier = band_block_mask(far, T, recent, T, device) if recent < T else None
        return band_block_mask(near, T, 0, recent, device), earlier

    plain = None if padded or documents_BT is not None else recent
    return WeighedKeys(log_weight, plain, blocks() if at_once else blocks)


def weighing_attention(model_config: Any) -> contextlib.AbstractContextManager[None]:
    """Inside this block the layers of the model find `weighed_attention` as attention implementation.

    Args:
        model_config: the decoder's, which its layers share.
    """
    return attention_named([model_config], NAME)


def weighed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Softmax over the recent keys' scores and the earlier keys' scores plus log-weights, times the values.

    Arguments and result as of transformers' attention functions; `attention_mask` is a `WeighedKeys`, or else
    it is the call of a forward in another thread, which is sdpa's.
    """
    if not isinstance(attention_mask, WeighedKeys):
        return as_sdpa(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    weighed: WeighedKeys = attention_mask
    more = [name for name in ("softcap", "s_aux", "position_bias") if kwargs.get(name) is not None]
    if weighed.plain is not None and not more and not torch.compiler.is_compiling() and takes(query):
        try:
            return _by_kernel(weighed, weighed.plain, query, key, value, scaling), None
        except KernelRefused as refused:
            warn_slower(str(refused), "such attention runs by torch")
    if weighed.instead is not None:
        return as_sdpa(module, query, key, value, weighed.instead(), scaling=scaling, **kwargs)
    if more:
        raise ModlabError(
            f"weighed keys do not know the attention's {more[0]}: set model.mod.supports_flex = False."
        )
    query_BNTH, key_BGTH, value_BGTH = as_autocast(query, key, value)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    attend = functools.partial(_flex(), scale=scale, return_aux=AuxRequest(lse=True), enable_gqa=True)
    blocks = weighed.blocks() if callable(weighed.blocks) else weighed.blocks
    assert blocks is not None
    recent, earlier = blocks
    out_BNTH, near = attend(query_BNTH, key_BGTH, value_BGTH, block_mask=recent)
    if earlier is not None:
        longer_query, longer_key = _with_weights(query_BNTH, key_BGTH, weighed.log_weight / scale)
        far_BNTH, far = attend(longer_query, longer_key, value_BGTH, block_mask=earlier)
        share_BNT1 = torch.sigmoid(far.lse - near.lse)[..., None]  # 0 where there is no earlier key
        out_BNTH = out_BNTH + share_BNT1.to(out_BNTH.dtype) * (far_BNTH - out_BNTH)
    return out_BNTH.transpose(1, 2).contiguous(), None


def _by_kernel(
    weighed: WeighedKeys, recent: int, query: Tensor, key: Tensor, value: Tensor, scaling: float | None
) -> Tensor:
    """[B, T, N, H], of q [B, N, T, H], k and v [B, G, T, H]; `KernelRefused` where the GPU has no room."""
    q, k, v = (x.transpose(1, 2) for x in as_autocast(query, key, value))
    weight_BGT = by_gate(weighed.log_weight).transpose(1, 2).expand(-1, key.shape[1], -1)
    return kernel_weighed_attention(q, k, v, weight_BGT, recent, scaling).contiguous()


# Additions under a new name, once for all passes; masks of forwards in other threads are sdpa's.
AttentionInterface.register(NAME, weighed_attention)
AttentionMaskInterface.register(NAME, AttentionMaskInterface()["sdpa"])


def _with_weights(query: Tensor, key: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Queries and keys with more entries, so that their product is q·k + weight of the key."""
    ones = F.pad(query.new_ones(*query.shape[:-1], 1), (0, MORE_ENTRIES - 1))
    weights = by_gate(weight).transpose(1, 2)[..., None].expand(*key.shape[:-1], 1).to(key.dtype)
    weights = F.pad(weights, (0, MORE_ENTRIES - 1))
    return torch.cat([query, ones], -1), torch.cat([key, weights], -1)


def _flex() -> Callable[..., Any]:
    """Flex attention; compiled here unless a whole layer is just being compiled."""
    if torch.compiler.is_compiling():
        return flex_attention
    return _compiled_flex()


@functools.cache
def _compiled_flex() -> Callable[..., Any]:
    return torch.compile(flex_attention)
