"""On a GPU: is the kernel right, how fast is it, how many tokens a second does a training step take."""

from __future__ import annotations

import time

import torch
from torch import Tensor

from benchmarks.real_models import attention
from benchmarks.real_models.arms import ARMS
from benchmarks.real_models.base import Base
from benchmarks.real_models.distil import Plan, distil
from benchmarks.real_models.gates import Gates
from benchmarks.real_models.mixture import Mixture
from benchmarks.real_models.texts import Data
from modlab.kernels.weighed_attention import kernel_weighed_attention, reference_weighed_attention


def check_kernel(device: str, N: int, G: int, H: int, T: int = 512, window: int = 128) -> dict[str, float]:
    """Relative distance of the kernel's result and gradients from the reference's in fp32."""
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    q, k, v, out = (
        torch.randn(2, T, heads, H, device=device).to(dtype).requires_grad_() for heads in (N, G, G, N)
    )
    weight = -3 * torch.rand(2, G, T, device=device)
    weight[:, :, ::5] = -1e4
    weight.requires_grad_()
    inputs = (q, k, v, weight)
    found = kernel_weighed_attention(q, k, v, weight, window)
    right_in = [x.detach().float().requires_grad_() for x in inputs]
    right = reference_weighed_attention(right_in[0], right_in[1], right_in[2], right_in[3], window)
    names = ("out", "dq", "dk", "dv", "d_weight")
    mine = (found, *torch.autograd.grad(found, inputs, out.detach()))
    theirs = (right, *torch.autograd.grad(right, right_in, out.detach().float()))
    return {name: _distance(a, b) for name, a, b in zip(names, mine, theirs, strict=True)}


def _distance(a: Tensor, b: Tensor) -> float:
    return ((a.float() - b.float()).norm() / b.float().norm()).item()


def time_kernel(B: int, T: int, N: int, G: int, H: int, window: int = 128) -> dict[str, float]:
    """Milliseconds of the kernel forward, and forward and backward; and of dense attention."""
    q, k, v = (torch.randn(B, T, heads, H, device="cuda").bfloat16().requires_grad_() for heads in (N, G, G))
    weight = (-torch.rand(B, G, T, device="cuda")).requires_grad_()
    slope = torch.randn_like(q)

    def forward() -> Tensor:
        return kernel_weighed_attention(q, k, v, weight, window)

    def both() -> None:
        torch.autograd.grad(forward(), (q, k, v, weight), slope)

    def plain() -> None:
        torch.autograd.grad(attention.dense(q, k, v), (q, k, v), slope)

    with torch.no_grad():
        times = {"forward": _median(forward), "dense forward": _median(lambda: attention.dense(q, k, v))}
    return times | {"both": _median(both), "dense both": _median(plain)}


def _median(call: object, count: int = 10) -> float:
    times = []
    for _ in range(count + 3):
        torch.cuda.synchronize()
        begun = time.perf_counter()
        call()  # type: ignore[operator]
        torch.cuda.synchronize()
        times.append(1000 * (time.perf_counter() - begun))
    return sorted(times[3:])[count // 2]


def training_speed(base: Base, data: Data, arm: str, steps: int, profile: bool = False) -> float:
    """Tokens a second of `steps` steps with rows of 4,096, after the first six."""
    gates = Gates(base.shape, ARMS[arm].form).to(base.device)
    plan = Plan(tokens=32_768 * steps, long_share=0.0)
    mixture = Mixture(data.stream, data.lines)
    if not profile:
        return distil(base, gates, mixture, plan)["tokens_per_second"]
    distil(base, gates, mixture, Plan(tokens=32_768 * 3, long_share=0.0))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as seen:
        distil(base, gates, mixture, Plan(tokens=32_768 * 2, long_share=0.0))
    print(seen.key_averages().table(sort_by="cuda_time_total", row_limit=28, max_name_column_width=70))
    return 0.0
