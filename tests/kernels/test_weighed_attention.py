"""Attention of what-if passes: kernels against the reference in Triton's interpreter, and how they run."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from modlab.kernels.weighed_attention import reference_weighed_attention, takes, weighed_attention

CHECK = """
import torch
from modlab.execution.weighed_attention import WeighedKeys, weighed_attention
from modlab.kernels.weighed_attention import kernel_weighed_attention, reference_weighed_attention

def compare(found, right, inputs, names):
    slope = torch.randn(right.shape)
    mine = (found, *torch.autograd.grad(found, inputs, slope))
    theirs = (right, *torch.autograd.grad(right, inputs, slope))
    for name, a, b in zip(names, mine, theirs, strict=True):
        off = (a - b).norm() / b.norm().clamp(min=1e-6)
        assert off < 1e-5, (name, off)

torch.manual_seed(0)
NAMES = ("out", "dq", "dk", "dv", "d_weight")
for N, G, T, recent, scale in ((4, 2, 384, 128, None), (3, 1, 256, 100, 0.3), (2, 2, 200, 17, None)):
    q, k, v = (torch.randn(2, T, heads, 16).requires_grad_() for heads in (N, G, G))
    weight = -3 * torch.rand(2, G, T)
    weight[:, :, ::5] = -1e4
    weight.requires_grad_()
    inputs = (q, k, v, weight)
    found = kernel_weighed_attention(*inputs, recent, scale)
    compare(found, reference_weighed_attention(*inputs, recent, scale), inputs, NAMES)

# as a layer calls it: gates [B, T, G], or one gate for all KV heads
for gates in (2, 1):
    q, k, v = (torch.randn(1, heads, 130, 16).requires_grad_() for heads in (4, 2, 2))
    weight = (-3 * torch.rand(1, 130, gates)).requires_grad_()
    keys = WeighedKeys(weight if gates == 2 else weight[..., 0], plain=20)
    found, _ = weighed_attention(torch.nn.Module(), q, k, v, keys)
    by_head = weight.transpose(1, 2).expand(-1, 2, -1)
    right = reference_weighed_attention(*(x.transpose(1, 2) for x in (q, k, v)), by_head, 20)
    compare(found, right, (q, k, v, weight), NAMES)
print("same")
"""


def test_result_and_gradients_are_the_references() -> None:
    """Odd heads and windows, rows that are padded, hard evictions, scales."""
    pytest.importorskip("triton")
    # A process of its own: the interpreter is switched on before Triton is imported.
    done = subprocess.run(
        [sys.executable, "-c", CHECK],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert done.stdout.endswith("same\n"), done.stdout + done.stderr


def test_the_reference_is_softmax_over_weighed_keys() -> None:
    """By hand: two queries, the second of which sees the first key at its weight."""
    q, k = torch.zeros(1, 2, 1, 16), torch.zeros(1, 2, 1, 16)
    v = torch.stack([torch.ones(16), 3 * torch.ones(16)])[None, :, None]
    weight = torch.tensor([[[-1.0, -5.0]]])
    out = reference_weighed_attention(q, k, v, weight, recent=1)
    share = torch.exp(torch.tensor(-1.0)) / (1 + torch.exp(torch.tensor(-1.0)))
    torch.testing.assert_close(out[0, :, 0, 0], torch.stack([torch.tensor(1.0), share + 3 * (1 - share)]))
    near = reference_weighed_attention(q, k, v, weight, recent=2)
    assert near[0, 1, 0, 0].item() == pytest.approx(2.0)


def test_without_a_gpu_the_reference_runs() -> None:
    tensors: list[Tensor] = [torch.randn(1, 5, 2, 16) for _ in range(3)]
    weight = -torch.rand(1, 2, 5)
    torch.testing.assert_close(
        weighed_attention(*tensors, weight, 2), reference_weighed_attention(*tensors, weight, 2)
    )
    assert not takes(torch.randn(1, 5, 2, 24))
