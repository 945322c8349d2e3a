"""Causal attention of a prefill with `skip="kv"`: to the latest W tokens, and to kept ones before them.

Rows lie one after another in one line, without padding. What the cache is going to hold is laid out first, in
the form that decoding goes on with (a ring of the latest W tokens of each row, the older kept ones behind it;
see `decode_attention`), and the attention reads older keys from there: its work is that of the kept keys and
of a band of W, and no key is copied twice.

Where each KV head has a gate of its own, each has a segment of its own: unit u is head u % G of row u // G.

Shape letters: S tokens of all rows, B rows, N query heads, G kv heads, H head dim, A gates (1, or G), U units
(B x A), C capacity of the cache, W tokens of a ring, Q blocks of queries.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from modlab.kernels.device import is_before_sm_80
from modlab.kernels.launch import Sizes, launch

try:
    import triton
    import triton.language as tl
except ImportError:  # see decode_attention
    triton = None

BLOCK = 128
"""Queries that one program takes, in half precision."""

SMALL_BLOCK = 32
"""The same in single precision, with large heads, or on a GPU before sm_80: there `BLOCK` queries of 128
entries take 80 KB in the smallest of the tiles below, these 32 (Triton 3.9, built for sm_75)."""

TILES: tuple[Sizes, ...] = (
    {"BLOCK_K": 64, "num_warps": 8, "num_stages": 3},
    {"BLOCK_K": 64, "num_warps": 8, "num_stages": 2},
    {"BLOCK_K": 32, "num_warps": 8, "num_stages": 1},
)
"""Keys that `BLOCK` queries read at once; from the second on for GPUs with less room, see `launch`."""

SMALL_TILES: tuple[Sizes, ...] = (
    {"BLOCK_K": 32, "num_warps": 4, "num_stages": 3},
    {"BLOCK_K": 32, "num_warps": 4, "num_stages": 2},
    {"BLOCK_K": 16, "num_warps": 4, "num_stages": 1},
)
"""The same of `SMALL_BLOCK` queries; in single precision without the first."""


@dataclass
class Stored:
    """A layer's cache as its prefill lays it out.

    Attributes:
        keys, values: [G, C, H]; where each head has a gate, [1, C, H].
        starts_U: where each unit's segment begins, int64.
        ring_kept_UW: which tokens of each ring are kept, bool; False where there is none yet.
        before_AS: how many kept tokens there are before each place in the line and before its end, int32
            [A, S + 1].
    """

    keys: Tensor
    values: Tensor
    starts_U: Tensor
    ring_kept_UW: Tensor
    before_AS: Tensor


def kept_before(keep: Tensor) -> Tensor:
    """How many kept tokens there are before each place in the line and before its end, int32 [A, S + 1].

    Args:
        keep: which tokens are kept, bool [S] or [S, A].
    """
    keep_AS = keep.view(len(keep), -1).t()
    before_AS = keep.new_zeros(len(keep_AS), len(keep) + 1, dtype=torch.int32)
    before_AS[:, 1:] = keep_AS
    return before_AS.cumsum(1, dtype=torch.int32)


def older_spans(counts: list[int], recent: int) -> Tensor:
    """Where the tokens of each row begin and end that are not among its latest `recent`; long [2 x B], on the
    host."""
    begins = [0, *itertools.accumulate(counts)][:-1]
    ends = [begin + max(n - recent, 0) for begin, n in zip(begins, counts, strict=True)]
    return torch.tensor([*begins, *ends])


def older_kept(before_AS: Tensor, spans: Tensor) -> Tensor:
    """How many of each unit's kept tokens are not among its row's latest ones, int32 [U].

    Args:
        spans: see `older_spans`.
    """
    begins, ends = before_AS.index_select(1, spans).chunk(2, 1)
    return (ends - begins).t().flatten()


def block_size(q: Tensor, v: Tensor) -> int:
    """Queries that one program takes."""
    half, narrow = q.element_size() == 2, max(q.shape[-1], v.shape[-1]) <= 128
    return BLOCK if half and narrow and not is_before_sm_80(q.device) else SMALL_BLOCK


def query_blocks(counts: list[int], size: int) -> Tensor:
    """Blocks of `size` tokens that lie in one row each: where a block begins, where its row begins and ends,
    which row that is; int32 [Q, 4], on the host. Those with most tokens before them come first."""
    blocks, begin = [], 0
    for row, n in enumerate(counts):
        blocks += [(first, begin, begin + n, row) for first in range(begin, begin + n, size)]
        begin += n
    blocks.sort(key=lambda block: block[1] - block[0])
    return torch.tensor(blocks, dtype=torch.int32).view(-1, 4)


def reference_store_kept(k_1GSH: Tensor, v_1GSH: Tensor, counts: list[int], stored: Stored) -> None:
    """Plain torch: lays out the rings and the older kept tokens; writes all of `stored` but what says where.

    Args:
        k_1GSH, v_1GSH: the rows one after another.
        counts: tokens of each row; their sum is S.
    """
    gates, recent = len(stored.before_AS), stored.ring_kept_UW.shape[1]
    first = 0
    for row, n in enumerate(counts):
        latest = torch.arange(max(n - recent, 0), n, device=k_1GSH.device)
        for gate in range(gates):
            unit = row * gates + gate
            start = int(stored.starts_U[unit])
            keep_n = stored.before_AS[gate, first : first + n + 1].diff().bool()
            older = keep_n[: len(keep_n) - len(latest)].nonzero()[:, 0]
            behind = start + len(latest) + torch.arange(len(older), device=older.device)
            into = torch.cat([start + latest % recent, behind])
            source = first + torch.cat([latest, older])
            heads = slice(None) if gates == 1 else slice(gate, gate + 1)
            stored.keys[:, into] = k_1GSH[0, heads][:, source]
            stored.values[:, into] = v_1GSH[0, heads][:, source]
            stored.ring_kept_UW[unit, latest % recent] = keep_n[latest]
        first += n


def reference_kept_attention(
    q_1NSH: Tensor,
    k_1GSH: Tensor,
    v_1GSH: Tensor,
    keep: Tensor,
    counts: list[int],
    recent: int,
    scale: float | None,
) -> Tensor:
    """Plain torch, row by row with a mask.

    Args:
        q_1NSH, k_1GSH, v_1GSH: the rows one after another.
        keep: bool [S] or [S, A], tokens that later ones may see beyond `recent`.
        counts: tokens of each row; their sum is S.
        recent: W; a token sees itself and the W - 1 before it, kept or not.
        scale: factor on the scores, or None for 1 / sqrt(H).

    Returns:
        [1, S, N, H].
    """
    out, first = [], 0
    N = q_1NSH.shape[1]
    gqa = k_1GSH.shape[1] != N
    keep_AS = keep.view(len(keep), -1).t()
    for n in counts:
        span = slice(first, first + n)
        age_QK = torch.arange(n, device=keep.device)[:, None] - torch.arange(n, device=keep.device)
        seen_AQK = (age_QK >= 0) & ((age_QK < recent) | keep_AS[:, None, span])
        seen = seen_AQK.repeat_interleave(N // len(keep_AS), 0) if len(keep_AS) > 1 else seen_AQK
        q, k, v = (t[:, :, span] for t in (q_1NSH, k_1GSH, v_1GSH))
        out.append(F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scale, enable_gqa=gqa))
        first += n
    return torch.cat(out, dim=2).transpose(1, 2)


if triton is not None:
    # These differ from layer to layer and from prompt to prompt. Triton compiles a kernel once more for
    # numbers that 16 divides; nothing here is faster by it, and a long prompt would stop in its middle.
    varying = ["places", "capacity"]

    @triton.jit(do_not_specialize=varying)
    def _store(
        k_ptr, v_ptr, before_ptr, blocks_ptr, starts_ptr, keys_ptr, values_ptr, ring_ptr,
        stride_kg, stride_ks, stride_vg, stride_vs, places, capacity,
        A: tl.constexpr, HK: tl.constexpr, HV: tl.constexpr,
        BLOCK_HK: tl.constexpr, BLOCK_HV: tl.constexpr, BLOCK_S: tl.constexpr, W: tl.constexpr,
    ):  # fmt: skip
        """One block of tokens of one row and head: those that the cache is going to hold."""
        block = blocks_ptr + tl.program_id(0) * 4
        first, row_first, row_end = tl.load(block), tl.load(block + 1), tl.load(block + 2)
        head = tl.program_id(1).to(tl.int64)
        gate = head % A
        unit = tl.load(block + 3) * A + gate
        at = first + tl.arange(0, BLOCK_S)
        inside = at < row_end
        before = before_ptr + gate * places
        here = tl.load(before + at, mask=inside, other=0)
        kept = inside & (tl.load(before + at + 1, mask=inside, other=0) > here)
        recent = inside & (at >= row_end - W)
        ring = tl.minimum(row_end - row_first, W)
        turned = (at - row_first) % W
        place = tl.where(recent, turned, ring + here - tl.load(before + row_first))
        base = tl.load(starts_ptr + unit) + (head - gate if A > 1 else head) * capacity
        into, source = base + place.to(tl.int64), at.to(tl.int64)
        hk, hv, held = tl.arange(0, BLOCK_HK), tl.arange(0, BLOCK_HV), recent | kept
        mask_k, mask_v = held[:, None] & (hk < HK)[None, :], held[:, None] & (hv < HV)[None, :]
        k = tl.load(k_ptr + head * stride_kg + source[:, None] * stride_ks + hk[None, :], mask=mask_k)
        tl.store(keys_ptr + into[:, None] * HK + hk[None, :], k, mask=mask_k)
        v = tl.load(v_ptr + head * stride_vg + source[:, None] * stride_vs + hv[None, :], mask=mask_v)
        tl.store(values_ptr + into[:, None] * HV + hv[None, :], v, mask=mask_v)
        if head < A:
            tl.store(ring_ptr + unit * W + turned, kept.to(tl.int8), mask=recent)

    @triton.jit
    def _fold(
        q, keys, values, visible, inside, in_hk, in_hv, top, total, acc, scale,
        MASKED: tl.constexpr, IEEE: tl.constexpr,
    ):  # fmt: skip
        """Takes one block of keys into the running softmax, whose exponents have base 2."""
        precision: tl.constexpr = "ieee" if IEEE else "tf32"
        if MASKED:
            k = tl.load(keys, mask=inside[None, :] & in_hk[:, None], other=0.0)
        else:
            k = tl.load(keys)
        scores = tl.dot(q, k, input_precision=precision) * scale
        if MASKED:
            scores = tl.where(visible, scores, -1e30)
        new_top = tl.maximum(top, tl.max(scores, 1))
        weights = tl.exp2(scores - new_top[:, None])
        fade = tl.exp2(top - new_top)
        if MASKED:
            v = tl.load(values, mask=inside[:, None] & in_hv[None, :], other=0.0)
        else:
            v = tl.load(values)
        total = total * fade + tl.sum(weights, 1)
        acc = acc * fade[:, None] + tl.dot(weights.to(v.dtype), v, input_precision=precision)
        return new_top, total, acc

    @triton.jit(do_not_specialize=varying)
    def _attend_kept(
        q_ptr, k_ptr, v_ptr, keys_ptr, values_ptr, before_ptr, starts_ptr, blocks_ptr, heads_ptr, out_ptr,
        stride_qn, stride_qs, stride_kg, stride_ks, stride_vg, stride_vs, scale, places, capacity,
        N: tl.constexpr, M: tl.constexpr, A: tl.constexpr, HK: tl.constexpr, HV: tl.constexpr,
        BLOCK_HK: tl.constexpr, BLOCK_HV: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
        W: tl.constexpr, IEEE: tl.constexpr,
    ):  # fmt: skip
        """One block of queries of one row and head: older kept keys that all of them may see, whole blocks of
        them without a mask; kept keys that have become too old for some of them to be recent; recent keys.
        The last come last: every query sees itself, so that what a query without any visible key has summed
        up before fades to nothing.
        """
        block = blocks_ptr + tl.program_id(0) * 4
        first, row_first, row_end = tl.load(block), tl.load(block + 1), tl.load(block + 2)
        kv_head = tl.load(heads_ptr + tl.program_id(1) // M).to(tl.int64)  # a head may be 2^31 elements away
        head = kv_head * M + tl.program_id(1) % M
        gate = kv_head % A
        unit = tl.load(block + 3) * A + gate
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

        before = before_ptr + gate * places
        of_row = tl.load(before + row_first)
        end = tl.minimum(first + BLOCK_Q, row_end)
        # Kept tokens stand in order: a query sees as many of them as had been kept when it was W tokens away.
        limit_Q = tl.load(before + tl.maximum(tl.minimum(queries, row_end - 1) - W + 1, row_first)) - of_row
        for_all = tl.load(before + tl.maximum(first - W + 1, row_first)) - of_row
        for_some = tl.load(before + tl.maximum(end - W, row_first)) - of_row
        segment = tl.load(starts_ptr + unit) + (0 if A > 1 else kv_head) * capacity
        segment += tl.minimum(row_end - row_first, W)
        kept_keys = keys_ptr + k_ids[None, :] * HK + hk[:, None]
        kept_values = values_ptr + k_ids[:, None] * HV + hv[None, :]
        EVEN: tl.constexpr = (HK == BLOCK_HK) & (HV == BLOCK_HV)
        whole = for_all // BLOCK_K * BLOCK_K
        for at in range(0, whole, BLOCK_K):
            inside = k_ids < BLOCK_K
            top, total, acc = _fold(
                q, kept_keys + (segment + at) * HK, kept_values + (segment + at) * HV,
                inside[None, :], inside, in_hk, in_hv, top, total, acc, scale, not EVEN, IEEE,
            )  # fmt: skip
        for at in range(whole, for_some, BLOCK_K):
            ids = at + k_ids
            inside = ids < for_some
            top, total, acc = _fold(
                q, kept_keys + (segment + at) * HK, kept_values + (segment + at) * HV,
                ids[None, :] < limit_Q[:, None], inside, in_hk, in_hv, top, total, acc, scale, True, IEEE,
            )  # fmt: skip
        keys, values = k_ptr + kv_head * stride_kg, v_ptr + kv_head * stride_vg
        for at in range(tl.maximum(first - W + 1, row_first), end, BLOCK_K):
            ids = (at + k_ids).to(tl.int64)
            inside = ids < end
            age = queries[:, None] - ids[None, :]
            visible = inside[None, :] & (age >= 0) & (age < W)
            top, total, acc = _fold(
                q, keys + ids[None, :] * stride_ks + hk[:, None],
                values + ids[:, None] * stride_vs + hv[None, :],
                visible, inside, in_hk, in_hv, top, total, acc, scale, True, IEEE,
            )  # fmt: skip
        out = out_ptr + (queries.to(tl.int64) * N + head)[:, None] * HV + hv[None, :]
        tl.store(
            out, (acc / total[:, None]).to(out_ptr.dtype.element_ty),
            mask=(queries < row_end)[:, None] & in_hv[None, :],
        )  # fmt: skip


def store_kept(k_1GSH: Tensor, v_1GSH: Tensor, blocks_Q4: Tensor, size: int, stored: Stored) -> None:
    """`reference_store_kept` by a Triton kernel.

    Args:
        blocks_Q4, size: of the line, see `query_blocks`.
    """
    k, v = _line(k_1GSH), _line(v_1GSH)
    G, HK, HV = k.shape[1], k.shape[3], v.shape[3]
    before = stored.before_AS
    launch(
        _store, (len(blocks_Q4), G),
        k, v, before, blocks_Q4, stored.starts_U, stored.keys, stored.values,
        stored.ring_kept_UW.view(torch.int8), k.stride(1), k.stride(2), v.stride(1), v.stride(2),
        before.shape[1], stored.keys.shape[1],
        A=len(before), HK=HK, HV=HV, BLOCK_HK=triton.next_power_of_2(HK),
        BLOCK_HV=triton.next_power_of_2(HV), BLOCK_S=size, W=stored.ring_kept_UW.shape[1],
        tiles=({"num_warps": 4},),
    )  # fmt: skip


def kept_attention(
    q_1NSH: Tensor,
    k_1GSH: Tensor,
    v_1GSH: Tensor,
    stored: Stored,
    blocks_Q4: Tensor,
    size: int,
    scale: float | None,
    heads: Tensor,
    out: Tensor,
) -> Tensor:
    """`reference_kept_attention` by a Triton kernel.

    Args:
        stored: of the same keys and values.
        blocks_Q4, size: of the line, see `query_blocks`.
        heads: the kv heads to run, long.
        out: [1, S, N, H], contiguous; written where the query heads of these are.
    """
    assert out.is_contiguous(), "its strides are not asked"
    _, N, _, HK = q_1NSH.shape
    G, HV = v_1GSH.shape[1], v_1GSH.shape[3]
    half = q_1NSH.element_size() == 2
    q, k, v = _line(q_1NSH), _line(k_1GSH), _line(v_1GSH)
    before = stored.before_AS
    base = HK**-0.5 if scale is None else scale
    launch(
        _attend_kept, (len(blocks_Q4), len(heads) * (N // G)),
        q, k, v, stored.keys, stored.values, before, stored.starts_U, blocks_Q4, heads, out,
        q.stride(1), q.stride(2), k.stride(1), k.stride(2), v.stride(1), v.stride(2),
        base * 1.4426950408889634, before.shape[1], stored.keys.shape[1],
        N=N, M=N // G, A=len(before), HK=HK, HV=HV,
        BLOCK_HK=max(16, triton.next_power_of_2(HK)), BLOCK_HV=max(16, triton.next_power_of_2(HV)),
        BLOCK_Q=size, W=stored.ring_kept_UW.shape[1], IEEE=not half,
        tiles=TILES if size == BLOCK else SMALL_TILES if half else SMALL_TILES[1:],
    )  # fmt: skip
    return out


def _line(t: Tensor) -> Tensor:
    """[1, heads, S, H] with entries of a head side by side."""
    return t if t.stride(3) == 1 else t.contiguous()
