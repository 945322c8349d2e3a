"""Causal attention of a prefill with `skip="kv"`: to the latest W tokens, and to kept ones before them.

Rows lie one after another in one line, without padding. The kernel reads kept keys from a gathered copy (what
the cache is going to hold anyway) and passes over the others: its work is that of the kept keys and of a band
of W.

Shape letters: S tokens of all rows, B rows, N query heads, G kv heads, H head dim, K kept keys of all rows,
Q blocks of queries.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # see decode_attention
    triton = None

BLOCK = 128
"""Queries that one program takes, in half precision."""


@dataclass
class KeptKeys:
    """The kept tokens of a line, gathered.

    Attributes:
        at_K: where in the line they stand, int64, in order.
        before_S: how many there are before each place in the line and before its end, int32 [S + 1].
        keys, values: [G, K, H].
        per_row: how many each row has.
        older: how many of those are not among the row's latest W tokens.
    """

    at_K: Tensor
    before_S: Tensor
    keys: Tensor
    values: Tensor
    per_row: list[int]
    older: list[int]


def gather_kept(k_1GSH: Tensor, v_1GSH: Tensor, keep_S: Tensor, bounds: Tensor, recent: int) -> KeptKeys:
    """Gathers them: one host sync, for how many there are.

    Args:
        k_1GSH, v_1GSH: the rows one after another.
        keep_S: bool, which tokens are kept.
        bounds: where each row begins, and the end of the last, int32 [B + 1].
        recent: W.
    """
    rows = len(bounds) - 1
    before_S = F.pad(keep_S.cumsum(0), (1, 0)).int()
    ends = torch.cat([bounds[1:], torch.maximum(bounds[1:] - recent, bounds[:-1])])
    passed = before_S[ends].tolist()  # of each row, up to its end, and up to its latest W tokens
    begins = [0, *passed[: rows - 1]]
    at_K = torch.nonzero_static(keep_S, size=passed[rows - 1])[:, 0]
    return KeptKeys(
        at_K,
        before_S,
        k_1GSH[0].index_select(1, at_K),
        v_1GSH[0].index_select(1, at_K),
        per_row=[b - a for a, b in zip(begins, passed[:rows], strict=True)],
        older=[b - a for a, b in zip(begins, passed[rows:], strict=True)],
    )


def reference_kept_attention(
    q_1NSH: Tensor,
    k_1GSH: Tensor,
    v_1GSH: Tensor,
    keep_S: Tensor,
    counts: list[int],
    recent: int,
    scale: float | None,
) -> Tensor:
    """Plain torch, row by row with a mask.

    Args:
        q_1NSH, k_1GSH, v_1GSH: the rows one after another.
        keep_S: bool, tokens that later ones may see beyond `recent`.
        counts: tokens of each row; their sum is S.
        recent: W; a token sees itself and the W - 1 before it, kept or not.
        scale: factor on the scores, or None for 1 / sqrt(H).

    Returns:
        [1, S, N, H].
    """
    out, first = [], 0
    gqa = q_1NSH.shape[1] != k_1GSH.shape[1]
    for n in counts:
        span = slice(first, first + n)
        age_QK = torch.arange(n, device=keep_S.device)[:, None] - torch.arange(n, device=keep_S.device)
        seen_QK = (age_QK >= 0) & ((age_QK < recent) | keep_S[span])
        q, k, v = (t[:, :, span] for t in (q_1NSH, k_1GSH, v_1GSH))
        out.append(F.scaled_dot_product_attention(q, k, v, attn_mask=seen_QK, scale=scale, enable_gqa=gqa))
        first += n
    return torch.cat(out, dim=2).transpose(1, 2)


if triton is not None:

    @triton.jit
    def _fold(
        q, keys, values, visible, inside, in_hk, in_hv, top, total, acc, scale,
        IEEE: tl.constexpr,
    ):  # fmt: skip
        """Takes one block of keys into the running softmax, whose exponents have base 2."""
        precision: tl.constexpr = "ieee" if IEEE else "tf32"
        k = tl.load(keys, mask=inside[None, :] & in_hk[:, None], other=0.0)
        scores = tl.where(visible, tl.dot(q, k, input_precision=precision) * scale, -1e30)
        new_top = tl.maximum(top, tl.max(scores, 1))
        weights = tl.exp2(scores - new_top[:, None])
        fade = tl.exp2(top - new_top)
        v = tl.load(values, mask=inside[:, None] & in_hv[None, :], other=0.0)
        total = total * fade + tl.sum(weights, 1)
        acc = acc * fade[:, None] + tl.dot(weights.to(v.dtype), v, input_precision=precision)
        return new_top, total, acc

    @triton.jit
    def _attend_kept(
        q_ptr, k_ptr, v_ptr, kept_k_ptr, kept_v_ptr, at_ptr, before_ptr, blocks_ptr, out_ptr,
        stride_qn, stride_qs, stride_kg, stride_ks, stride_vg, stride_vs, scale, kept,
        N: tl.constexpr, M: tl.constexpr, HK: tl.constexpr, HV: tl.constexpr,
        BLOCK_HK: tl.constexpr, BLOCK_HV: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
        W: tl.constexpr, IEEE: tl.constexpr,
    ):  # fmt: skip
        """One block of queries of one row and head: kept keys that all of them may see, kept keys that have
        become too old for some of them to be recent, recent keys. The last come last: every query sees
        itself, so that what a query without any visible key has summed up before fades to nothing.
        """
        block = blocks_ptr + (tl.num_programs(0) - 1 - tl.program_id(0)) * 3  # the longest first
        first, row_first, row_end = tl.load(block), tl.load(block + 1), tl.load(block + 2)
        head = tl.program_id(1).to(tl.int64)  # a head may lie more than 2^31 elements from the first
        kv_head = head // M
        hk, hv, k_ids = tl.arange(0, BLOCK_HK), tl.arange(0, BLOCK_HV), tl.arange(0, BLOCK_K)
        in_hk, in_hv = hk < HK, hv < HV
        queries = first + tl.arange(0, BLOCK_Q)
        q = tl.load(
            q_ptr + head * stride_qn + queries.to(tl.int64)[:, None] * stride_qs + hk[None, :],
            mask=(queries < row_end)[:, None] & in_hk[None, :], other=0.0,
        )  # fmt: skip
        top = tl.full([BLOCK_Q], -1e30, tl.float32)
        total = tl.zeros([BLOCK_Q], tl.float32)
        acc = tl.zeros([BLOCK_Q, BLOCK_HV], tl.float32)

        kept_keys = kept_k_ptr + kv_head * kept * HK
        kept_values = kept_v_ptr + kv_head * kept * HV
        begin = tl.load(before_ptr + row_first)
        for_all = tl.load(before_ptr + tl.maximum(first - W + 1, row_first))
        for_some = tl.load(before_ptr + tl.maximum(tl.minimum(first + BLOCK_Q, row_end) - W, row_first))
        for at in range(begin, for_all, BLOCK_K):
            ids = (at + k_ids).to(tl.int64)
            inside = ids < for_all
            top, total, acc = _fold(
                q, kept_keys + ids[None, :] * HK + hk[:, None], kept_values + ids[:, None] * HV + hv[None, :],
                inside[None, :], inside, in_hk, in_hv, top, total, acc, scale, IEEE,
            )  # fmt: skip
        for at in range(for_all, for_some, BLOCK_K):
            ids = (at + k_ids).to(tl.int64)
            inside = ids < for_some
            place = tl.load(at_ptr + ids, mask=inside, other=0)
            visible = inside[None, :] & (place[None, :] <= queries[:, None] - W)
            top, total, acc = _fold(
                q, kept_keys + ids[None, :] * HK + hk[:, None], kept_values + ids[:, None] * HV + hv[None, :],
                visible, inside, in_hk, in_hv, top, total, acc, scale, IEEE,
            )  # fmt: skip
        keys, values = k_ptr + kv_head * stride_kg, v_ptr + kv_head * stride_vg
        end = tl.minimum(first + BLOCK_Q, row_end)
        for at in range(tl.maximum(first - W + 1, row_first), end, BLOCK_K):
            ids = (at + k_ids).to(tl.int64)
            inside = ids < end
            age = queries[:, None] - ids[None, :]
            visible = inside[None, :] & (age >= 0) & (age < W)
            top, total, acc = _fold(
                q, keys + ids[None, :] * stride_ks + hk[:, None],
                values + ids[:, None] * stride_vs + hv[None, :],
                visible, inside, in_hk, in_hv, top, total, acc, scale, IEEE,
            )  # fmt: skip
        out = out_ptr + (queries.to(tl.int64) * N + head)[:, None] * HV + hv[None, :]
        tl.store(
            out, (acc / total[:, None]).to(out_ptr.dtype.element_ty),
            mask=(queries < row_end)[:, None] & in_hv[None, :],
        )  # fmt: skip


def kept_attention(
    q_1NSH: Tensor,
    k_1GSH: Tensor,
    v_1GSH: Tensor,
    kept: KeptKeys,
    counts: list[int],
    bounds: Tensor,
    recent: int,
    scale: float | None,
) -> Tensor:
    """`reference_kept_attention` by a Triton kernel.

    Args:
        kept: of the same keys and values.
        bounds: where each row begins, and the end of the last, int32 [B + 1]: `counts` on the device.
    """
    _, N, S, HK = q_1NSH.shape
    G, HV = v_1GSH.shape[1], v_1GSH.shape[3]
    half = q_1NSH.element_size() == 2
    q, k, v = (t if t.stride(3) == 1 else t.contiguous() for t in (q_1NSH, k_1GSH, v_1GSH))
    block_q, block_k = (BLOCK, 64) if half and max(HK, HV) <= 128 else (32, 32)
    blocks_Q3 = query_blocks(counts, bounds, block_q)
    out = torch.empty(1, S, N, HV, dtype=q.dtype, device=q.device)
    base = HK**-0.5 if scale is None else scale
    _attend_kept[(len(blocks_Q3), N)](
        q, k, v, kept.keys, kept.values, kept.at_K, kept.before_S, blocks_Q3, out,
        q.stride(1), q.stride(2), k.stride(1), k.stride(2), v.stride(1), v.stride(2),
        base * 1.4426950408889634, kept.keys.shape[1],
        N=N, M=N // G, HK=HK, HV=HV,
        BLOCK_HK=max(16, triton.next_power_of_2(HK)), BLOCK_HV=max(16, triton.next_power_of_2(HV)),
        BLOCK_Q=block_q, BLOCK_K=block_k, W=recent, IEEE=not half,
        num_warps=8 if block_q == BLOCK else 4, num_stages=3 if half else 2,
    )  # fmt: skip
    return out


def query_blocks(counts: list[int], bounds: Tensor, size: int) -> Tensor:
    """Blocks of `size` queries that lie in one row each: where a block begins, where its row begins and ends;
    int32 [Q, 3]. The host only counts them."""
    per_row = [-(-n // size) for n in counts]
    blocks_B = -(-(bounds[1:] - bounds[:-1]) // size)
    row_Q = torch.repeat_interleave(blocks_B, output_size=sum(per_row))
    rank_Q = torch.arange(sum(per_row), device=bounds.device) - (blocks_B.cumsum(0) - blocks_B)[row_Q]
    begin_Q = bounds[:-1][row_Q]
    return torch.stack([begin_Q + rank_Q * size, begin_Q, bounds[1:][row_Q]], dim=1).int()
