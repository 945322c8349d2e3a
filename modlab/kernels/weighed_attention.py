"""Causal attention in which keys older than the latest W carry a log-weight, with gradients; Triton kernels.

One pass forward and two backward, no score matrix in memory. The log-weight of a key joins the scores of
queries at least W behind it; its gradient is the sum of the gradients of these scores, so it comes out of the
pass that makes the keys' gradients. Forward and backward take 4.3 ms for 8 rows of 4,096 tokens with 14 and 2
heads of 64, dense flash attention 2.3 ms (H200, GPU shared; docs/log.md). Training's what-if passes call it.

Shape letters: B rows, T tokens, N query heads, G kv heads, H head dim.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from modlab.kernels.device import on_device
from modlab.kernels.launch import KernelRefused, Sizes, launch

try:
    import triton
    import triton.language as tl
except ImportError:  # see decode_attention
    triton = None

LOG2E = 1.4426950408889634

HEAD_DIMS = (16, 32, 64, 128)
"""Entries of a head that the kernels take."""

MOST_ENTRIES = 2**31 - 2**28
"""Places in a tensor are counted in 32 bit, padding included."""

BLOCK = 128
"""Tokens a block: rows are padded to a multiple of it."""


def weighed_attention(
    q_BTNH: Tensor,
    k_BTGH: Tensor,
    v_BTGH: Tensor,
    log_weight_BGT: Tensor,
    recent: int,
    scale: float | None = None,
) -> Tensor:
    """Softmax over scaled scores plus log-weights, times the values: by the kernels on a GPU, else by the
    reference.

    Args:
        q_BTNH, k_BTGH, v_BTGH: queries, keys and values of whole rows, without padding.
        log_weight_BGT: at most 0; counts for queries at least `recent` tokens behind the key.
        recent: W, at least 1.
        scale: of the scores; 1 over the root of H by default.

    Returns:
        [B, T, N, H], in the type of the queries; with gradient to all four.
    """
    if not (q_BTNH.is_cuda and takes(q_BTNH)):
        return reference_weighed_attention(q_BTNH, k_BTGH, v_BTGH, log_weight_BGT, recent, scale)
    return kernel_weighed_attention(q_BTNH, k_BTGH, v_BTGH, log_weight_BGT, recent, scale)


def takes(q_BTNH: Tensor) -> bool:
    """Whether the kernels know heads of this size, and count so many entries (B, T and N in any order)."""
    return triton is not None and q_BTNH.shape[-1] in HEAD_DIMS and q_BTNH.numel() < MOST_ENTRIES


def reference_weighed_attention(
    q_BTNH: Tensor,
    k_BTGH: Tensor,
    v_BTGH: Tensor,
    log_weight_BGT: Tensor,
    recent: int,
    scale: float | None = None,
) -> Tensor:
    """The specification: whole score matrices in fp32."""
    T, heads = q_BTNH.shape[1], q_BTNH.shape[2] // k_BTGH.shape[2]
    at = torch.arange(T, device=q_BTNH.device)
    age = at[:, None] - at
    more = torch.where(age >= recent, log_weight_BGT.float()[:, :, None, :], 0.0)
    more = more.masked_fill(age < 0, -torch.inf).repeat_interleave(heads, 1)
    k_BNTH, v_BNTH = (x.float().repeat_interleave(heads, 2).transpose(1, 2) for x in (k_BTGH, v_BTGH))
    scale = q_BTNH.shape[-1] ** -0.5 if scale is None else scale
    scores = q_BTNH.float().transpose(1, 2) @ k_BNTH.transpose(-1, -2) * scale + more
    return (scores.softmax(-1) @ v_BNTH).transpose(1, 2).to(q_BTNH.dtype).contiguous()


def kernel_weighed_attention(
    q_BTNH: Tensor,
    k_BTGH: Tensor,
    v_BTGH: Tensor,
    log_weight_BGT: Tensor,
    recent: int,
    scale: float | None = None,
) -> Tensor:
    """The kernels, on a GPU or in Triton's interpreter. What is padded comes after every token.

    Raises:
        KernelRefused: the GPU has no room for them; in the backward pass too.
    """
    T = q_BTNH.shape[1]
    more = -T % BLOCK
    scale = q_BTNH.shape[-1] ** -0.5 if scale is None else scale
    if more:
        q_BTNH, k_BTGH, v_BTGH = (F.pad(x, (0, 0, 0, 0, 0, more)) for x in (q_BTNH, k_BTGH, v_BTGH))
        log_weight_BGT = F.pad(log_weight_BGT, (0, more))
    out: Tensor = _Weighed.apply(q_BTNH, k_BTGH, v_BTGH, log_weight_BGT, recent, scale)
    return out[:, :T]


if triton is not None:

    @triton.jit
    def _forward(
        Q, K, V, WEIGHT, OUT, LSE,
        T, N, G, scale, window,
        H: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr,
    ):  # fmt: skip
        q0 = (tl.num_programs(0) - 1 - tl.program_id(0)) * BQ
        b = tl.program_id(1) // N
        n = tl.program_id(1) % N
        g = n // (N // G)
        rows = q0 + tl.arange(0, BQ)
        dims = tl.arange(0, H)
        q_at = (b * T + rows)[:, None] * (N * H) + n * H + dims[None, :]
        q = tl.load(Q + q_at)
        best = tl.full([BQ], float("-inf"), tl.float32)
        total = tl.zeros([BQ], tl.float32)
        read = tl.zeros([BQ, H], tl.float32)
        far_end = tl.maximum(q0 - window + 1, 0) // BK * BK
        weights = WEIGHT + (b * G + g) * T
        for k0 in range(0, far_end, BK):
            cols = k0 + tl.arange(0, BK)
            kv_at = (b * T + cols)[:, None] * (G * H) + g * H + dims[None, :]
            s = tl.dot(q, tl.trans(tl.load(K + kv_at))) * scale + tl.load(weights + cols)[None, :]
            top = tl.maximum(best, tl.max(s, 1))
            p = tl.exp2(s - top[:, None])
            shrink = tl.exp2(best - top)
            total = total * shrink + tl.sum(p, 1)
            v = tl.load(V + kv_at)
            read = read * shrink[:, None] + tl.dot(p.to(v.dtype), v)
            best = top
        for k0 in range(far_end, q0 + BQ, BK):
            cols = k0 + tl.arange(0, BK)
            kv_at = (b * T + cols)[:, None] * (G * H) + g * H + dims[None, :]
            age = rows[:, None] - cols[None, :]
            s = tl.dot(q, tl.trans(tl.load(K + kv_at))) * scale
            s += tl.where(age >= window, tl.load(weights + cols)[None, :], 0.0)
            s = tl.where(age >= 0, s, float("-inf"))
            top = tl.maximum(best, tl.max(s, 1))
            p = tl.exp2(s - top[:, None])
            shrink = tl.exp2(best - top)
            total = total * shrink + tl.sum(p, 1)
            v = tl.load(V + kv_at)
            read = read * shrink[:, None] + tl.dot(p.to(v.dtype), v)
            best = top
        tl.store(OUT + q_at, (read / total[:, None]).to(OUT.dtype.element_ty))
        tl.store(LSE + (b * N + n) * T + rows, best + tl.log2(total))

    @triton.jit
    def _backward_keys(
        Q, K, V, WEIGHT, D_OUT, LSE, DELTA, DK, DV, DW,
        T, N, G, scale, scale_e, window,
        H: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr,
    ):  # fmt: skip
        k0 = tl.program_id(0) * BK
        b = tl.program_id(1) // N
        n = tl.program_id(1) % N
        g = n // (N // G)
        cols = k0 + tl.arange(0, BK)
        dims = tl.arange(0, H)
        kv_at = (b * T + cols)[:, None] * (G * H) + g * H + dims[None, :]
        k = tl.load(K + kv_at)
        v = tl.load(V + kv_at)
        weight = tl.load(WEIGHT + (b * G + g) * T + cols)
        dk = tl.zeros([BK, H], tl.float32)
        dv = tl.zeros([BK, H], tl.float32)
        dw = tl.zeros([BK], tl.float32)
        near_end = tl.minimum((k0 + BK - 1 + window + BQ - 1) // BQ * BQ, T)
        for q0 in range(k0 // BQ * BQ, near_end, BQ):
            rows = q0 + tl.arange(0, BQ)
            q_at = (b * T + rows)[:, None] * (N * H) + n * H + dims[None, :]
            q = tl.load(Q + q_at)
            do = tl.load(D_OUT + q_at)
            lse = tl.load(LSE + (b * N + n) * T + rows)
            delta = tl.load(DELTA + (b * N + n) * T + rows)
            age = rows[None, :] - cols[:, None]
            s = tl.dot(k, tl.trans(q)) * scale + tl.where(age >= window, weight[:, None], 0.0)
            p = tl.where(age >= 0, tl.exp2(s - lse[None, :]), 0.0)
            dv += tl.dot(p.to(do.dtype), do)
            ds = p * (tl.dot(v, tl.trans(do)) - delta[None, :])
            dw += tl.sum(tl.where(age >= window, ds, 0.0), 1)
            dk += tl.dot(ds.to(q.dtype), q)
        for q0 in range(near_end, T, BQ):
            rows = q0 + tl.arange(0, BQ)
            q_at = (b * T + rows)[:, None] * (N * H) + n * H + dims[None, :]
            q = tl.load(Q + q_at)
            do = tl.load(D_OUT + q_at)
            lse = tl.load(LSE + (b * N + n) * T + rows)
            delta = tl.load(DELTA + (b * N + n) * T + rows)
            p = tl.exp2(tl.dot(k, tl.trans(q)) * scale + weight[:, None] - lse[None, :])
            dv += tl.dot(p.to(do.dtype), do)
            ds = p * (tl.dot(v, tl.trans(do)) - delta[None, :])
            dw += tl.sum(ds, 1)
            dk += tl.dot(ds.to(q.dtype), q)
        out_at = (b * T + cols)[:, None] * (N * H) + n * H + dims[None, :]
        tl.store(DK + out_at, (dk * scale_e).to(DK.dtype.element_ty))
        tl.store(DV + out_at, dv.to(DV.dtype.element_ty))
        tl.store(DW + (b * N + n) * T + cols, dw)

    @triton.jit
    def _backward_queries(
        Q, K, V, WEIGHT, D_OUT, LSE, DELTA, DQ,
        T, N, G, scale, scale_e, window,
        H: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr,
    ):  # fmt: skip
        q0 = (tl.num_programs(0) - 1 - tl.program_id(0)) * BQ
        b = tl.program_id(1) // N
        n = tl.program_id(1) % N
        g = n // (N // G)
        rows = q0 + tl.arange(0, BQ)
        dims = tl.arange(0, H)
        q_at = (b * T + rows)[:, None] * (N * H) + n * H + dims[None, :]
        q = tl.load(Q + q_at)
        do = tl.load(D_OUT + q_at)
        lse = tl.load(LSE + (b * N + n) * T + rows)
        delta = tl.load(DELTA + (b * N + n) * T + rows)
        dq = tl.zeros([BQ, H], tl.float32)
        far_end = tl.maximum(q0 - window + 1, 0) // BK * BK
        weights = WEIGHT + (b * G + g) * T
        for k0 in range(0, far_end, BK):
            cols = k0 + tl.arange(0, BK)
            kv_at = (b * T + cols)[:, None] * (G * H) + g * H + dims[None, :]
            k = tl.load(K + kv_at)
            s = tl.dot(q, tl.trans(k)) * scale + tl.load(weights + cols)[None, :]
            p = tl.exp2(s - lse[:, None])
            ds = p * (tl.dot(do, tl.trans(tl.load(V + kv_at))) - delta[:, None])
            dq += tl.dot(ds.to(k.dtype), k)
        for k0 in range(far_end, q0 + BQ, BK):
            cols = k0 + tl.arange(0, BK)
            kv_at = (b * T + cols)[:, None] * (G * H) + g * H + dims[None, :]
            k = tl.load(K + kv_at)
            age = rows[:, None] - cols[None, :]
            s = tl.dot(q, tl.trans(k)) * scale
            s += tl.where(age >= window, tl.load(weights + cols)[None, :], 0.0)
            p = tl.where(age >= 0, tl.exp2(s - lse[:, None]), 0.0)
            ds = p * (tl.dot(do, tl.trans(tl.load(V + kv_at))) - delta[:, None])
            dq += tl.dot(ds.to(k.dtype), k)
        tl.store(DQ + q_at, (dq * scale_e).to(DQ.dtype.element_ty))


FORWARD: Sizes = {"BQ": 128, "BK": 64, "num_warps": 4, "num_stages": 3}
WIDE: Sizes = {"BQ": 128, "BK": 64, "num_warps": 8, "num_stages": 3}
KEYS: Sizes = {"BQ": 64, "BK": 128, "num_warps": 8, "num_stages": 2}
QUERIES: Sizes = {"BQ": 128, "BK": 64, "num_warps": 8, "num_stages": 2}
"""Launch sizes: forward, forward of heads of 128, and the two backward passes."""

SMALL: Sizes = {"BQ": 64, "BK": 32, "num_warps": 4, "num_stages": 1}
SMALL_KEYS: Sizes = {"BQ": 32, "BK": 64, "num_warps": 4, "num_stages": 1}
"""For GPUs that have no room for these, see `launch`: forward and queries, and keys."""


class _Weighed(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, log_weight: Tensor, window: int, scale: float
    ) -> Tensor:
        B, T, N, H = q.shape
        G = k.shape[2]
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        weight = (log_weight.float() * LOG2E).contiguous()
        out = torch.empty_like(q)
        lse = torch.empty(B, N, T, device=q.device, dtype=torch.float32)
        with on_device(q.device):
            launch(
                _forward, lambda sizes: (T // sizes["BQ"], B * N),
                q, k, v, weight, out, lse, T, N, G, scale * LOG2E, window,
                H=H, tiles=(WIDE if H > 64 else FORWARD, SMALL),
            )  # fmt: skip
        ctx.save_for_backward(q, k, v, weight, out, lse)
        ctx.window, ctx.scale = window, scale
        return out

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, None, None]:  # type: ignore[override]
        q, k, v, weight, out, lse = ctx.saved_tensors
        B, T, N, H = q.shape
        G = k.shape[2]
        d_out = d_out.contiguous()
        delta = (d_out.float() * out.float()).sum(-1).transpose(1, 2).contiguous()
        dq, dk_BTNH, dv_BTNH = torch.empty_like(q), torch.empty_like(q), torch.empty_like(q)
        dw_BNT = torch.empty_like(lse)
        scale = ctx.scale
        try:
            with on_device(q.device):
                launch(
                    _backward_keys, lambda sizes: (T // sizes["BK"], B * N),
                    q, k, v, weight, d_out, lse, delta, dk_BTNH, dv_BTNH, dw_BNT,
                    T, N, G, scale * LOG2E, scale, ctx.window, H=H, tiles=(KEYS, SMALL_KEYS),
                )  # fmt: skip
                launch(
                    _backward_queries, lambda sizes: (T // sizes["BQ"], B * N),
                    q, k, v, weight, d_out, lse, delta, dq,
                    T, N, G, scale * LOG2E, scale, ctx.window, H=H, tiles=(QUERIES, SMALL),
                )  # fmt: skip
        except KernelRefused as refused:  # the forward has run: too late for another way
            raise KernelRefused(
                f"{refused}. Set model.mod.supports_flex = False: training then attends by masks."
            ) from refused
        dk, dv = (x.view(B, T, G, N // G, H).sum(3) for x in (dk_BTNH, dv_BTNH))
        return dq, dk, dv, dw_BNT.view(B, G, N // G, T).sum(2), None, None
