"""GPUs with less room than a kernel's usual tile takes: a smaller tile, or plain torch, and who is told."""

from __future__ import annotations

import ast
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.attention.flex_attention import flex_attention

import modlab
from modlab.execution import weighed_attention
from modlab.kernels import decode_linear, kept_attention, launch, router_logits
from modlab.kernels import weighed_attention as kernel_file
from modlab.kernels.launch import KernelRefused
from modlab.routing.router import make_router

pytest.importorskip("triton", reason="Triton is not installed")
from triton.compiler.errors import CompilationError
from triton.runtime.errors import InterpreterError, OutOfResources

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
LARGE, SMALL = {"BLOCK": 64, "num_warps": 8}, {"BLOCK": 16, "num_warps": 4}


class Crowded:
    """A kernel on a GPU that has no room for large blocks.

    Args:
        kernel: what runs where there is room.
        name, most: the block size that decides, and the largest that fits.
    """

    __name__ = "_crowded"

    def __init__(self, kernel: Any, name: str, most: int) -> None:
        self.kernel, self.name, self.most = kernel, name, most
        self.tried: list[int] = []

    def __getitem__(self, grid: Any) -> Any:
        def run(*arguments: Any, **constants: Any) -> None:
            self.tried.append(constants[self.name])
            if constants[self.name] > self.most:
                raise OutOfResources(132096, 101376, "shared memory")
            if self.kernel is not None:
                self.kernel[grid](*arguments, **constants)

        return run


@pytest.fixture(autouse=True)
def a_new_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing is known of any GPU, and nobody was told anything."""
    monkeypatch.setattr(launch, "_smaller", {})
    monkeypatch.setattr(launch, "_refusals", {})
    launch.warn_slower.cache_clear()
    yield
    launch.warn_slower.cache_clear()


def run(kernel: Any, dtype: torch.dtype = torch.float16, **constants: Any) -> None:
    launch.launch(kernel, (1,), torch.zeros(1, dtype=dtype), tiles=(LARGE, SMALL), **constants)


def test_the_first_tile_with_room_runs_and_is_remembered() -> None:
    """By dtype and constants, which say how much a tile takes."""
    kernel = Crowded(None, "BLOCK", 16)
    run(kernel, H=64)
    run(kernel, H=64)
    assert kernel.tried == [64, 16, 16]
    run(kernel, H=32)
    run(kernel, torch.float32, H=64)
    assert kernel.tried[3:] == [64, 16, 64, 16]
    roomy = Crowded(None, "BLOCK", 64)
    run(roomy, H=64)
    run(roomy, H=64)
    assert roomy.tried == [64, 64]


def test_a_kernel_without_room_says_how_much_it_wants() -> None:
    kernel = Crowded(None, "BLOCK", 8)
    for _ in range(2):
        with pytest.raises(KernelRefused, match=r"crowded does not run .*132,096 of shared memory.* 101,376"):
            run(kernel)
    assert kernel.tried == [64, 16], "what was refused is not tried again"


class Broken:
    """A kernel whose launch ends in an error."""

    __name__ = "_broken"

    def __init__(self, error: Exception) -> None:
        self.error, self.tried = error, 0

    def __getitem__(self, grid: Any) -> Any:
        self.tried += 1
        raise self.error


def test_what_does_not_compile_is_refused_at_once_and_for_good() -> None:
    kernel = Broken(CompilationError("a = b\n", None, "no such instruction"))
    for _ in range(2):
        with pytest.raises(KernelRefused, match="broken does not run on .*CompilationError"):
            run(kernel)
    assert kernel.tried == 1, "a smaller tile would not help, nor would another try"


def test_a_fault_of_a_kernel_is_no_refusal() -> None:
    """The interpreter runs anything that is right: a kernel with an error in it must not be stood in for."""
    kernel = Broken(InterpreterError("name 'rows' is not defined"))
    for _ in range(2):
        with pytest.raises(InterpreterError):
            run(kernel)
    assert kernel.tried == 2


def test_no_kernel_is_launched_past_the_one_place() -> None:
    """Where Triton's errors become ours: elsewhere nothing that `triton.jit` made is given a grid."""
    for file in Path(launch.__file__).parent.glob("*.py"):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        kernels = {
            node.name
            for node in ast.walk(tree)
            if isinstance(node, ast.FunctionDef)
            and any("triton.jit" in ast.unparse(d) for d in node.decorator_list)
        }
        given = {ast.unparse(node.value) for node in ast.walk(tree) if isinstance(node, ast.Subscript)}
        assert not kernels & given, file.name


@pytest.mark.parametrize("most", [16, 8], ids=["a smaller tile", "plain torch"])
def test_routers_of_a_prompt_run_on_any_gpu(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    router = make_router(modlab.MoDConfig(router_hidden=16, init_gate=0.7), 48, 2, DEVICE)
    generator = torch.Generator().manual_seed(0)
    for parameter in router.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator).to(DEVICE) / 7
    x = torch.randn(1, 20, 48, generator=generator).to(DEVICE, torch.float16)
    kernel = Crowded(router_logits._wide_logits, "BLOCK_S", most)
    monkeypatch.setattr(router_logits, "_wide_logits", kernel)
    want = router(x)
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        got = [router_logits.router_logits(router, x) for _ in range(2)]
    monkeypatch.undo()
    assert kernel.tried[:2] == [64, 16]
    for each in got:
        torch.testing.assert_close(each, want, rtol=1e-5, atol=1e-5)
    assert said(told) == ([] if most == 16 else ["routers of prompts run by torch, more slowly."])


@pytest.mark.parametrize("most", [64, 32], ids=["a smaller tile", "plain torch"])
def test_linear_maps_of_a_step_run_on_any_gpu(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (
        torch.randn(*shape, generator=generator).to(DEVICE) for shape in ((3, 1, 300), (40, 300), (40,))
    )
    kernel = Crowded(decode_linear._rows_times_matrix, "BLOCK_D", most)
    monkeypatch.setattr(decode_linear, "_rows_times_matrix", kernel)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        got = [decode_linear.decode_linear(x, weight, bias) for _ in range(2)]
    assert kernel.tried[:2] == [256, 64]
    for each in got:
        torch.testing.assert_close(each, torch.nn.functional.linear(x, weight, bias), rtol=1e-4, atol=1e-4)
    assert said(told) == ([] if most == 64 else ["linear maps of a decoding step run by torch, more slowly."])


def test_old_gpus_take_fewer_queries_of_a_prompt_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    q = torch.zeros(1, 2, 3, 128, dtype=torch.float16)
    assert kept_attention.block_size(q, q) == kept_attention.BLOCK
    assert kept_attention.block_size(q.float(), q.float()) == kept_attention.SMALL_BLOCK
    monkeypatch.setattr(kept_attention, "is_before_sm_80", lambda device: True)
    assert kept_attention.block_size(q, q) == kept_attention.SMALL_BLOCK


def said(told: list[warnings.WarningMessage]) -> list[str]:
    """What runs instead, by the warnings of a refused kernel."""
    return [str(one.message).split("): ")[1] for one in told if "does not run" in str(one.message)]


def weighed(T: int = 200) -> tuple[torch.Tensor, ...]:
    """q, k, v [1, heads, T, 16] and log-weights [1, T, 2], with gradients."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, n, T, 16, generator=generator).to(DEVICE) for n in (4, 2, 2))
    weight = -3 * torch.rand(1, T, 2, generator=generator).to(DEVICE)
    return tuple(tensor.requires_grad_() for tensor in (q, k, v, weight))


def slopes(out: torch.Tensor, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    return out, *torch.autograd.grad(out.square().sum(), inputs)


def test_weighed_attention_has_a_smaller_tile_of_each_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = {
        name: Crowded(getattr(kernel_file, name), size, 64)
        for name, size in (("_forward", "BQ"), ("_backward_keys", "BK"), ("_backward_queries", "BQ"))
    }
    for name, kernel in kernels.items():
        monkeypatch.setattr(kernel_file, name, kernel)
    q, k, v, weight = weighed()
    rows = (*(x.transpose(1, 2) for x in (q, k, v)), weight.transpose(1, 2), 20)
    got = slopes(kernel_file.kernel_weighed_attention(*rows), (q, k, v, weight))
    assert {tuple(kernel.tried) for kernel in kernels.values()} == {(128, 64)}
    want = slopes(kernel_file.reference_weighed_attention(*rows), (q, k, v, weight))
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


def test_attention_that_is_refused_keeps_to_its_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of rows outside training; in training flex attention, with block masks, runs as it does for padding."""
    monkeypatch.setattr(kernel_file, "_forward", Crowded(None, "BQ", 0))
    calls = []
    monkeypatch.setattr(weighed_attention, "as_sdpa", lambda *args, **kwargs: calls.append(args[4]))
    q, k, v, weight = weighed()
    keys = weighed_attention.WeighedKeys(weight, plain=20, instead=lambda: "mask")
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for _ in range(2):
            weighed_attention.weighed_attention(torch.nn.Module(), q, k, v, keys)
    assert calls == ["mask", "mask"] and said(told) == ["such attention runs by torch, more slowly."]
    q, k, v, weight = (x.detach() for x in (q, k, v, weight))  # on a CPU it has no backward pass
    real = torch.ones(1, q.shape[2], dtype=torch.bool, device=DEVICE)
    keys = weighed_attention.weighed_keys(weight, real, 20, padded=False)
    monkeypatch.setattr(weighed_attention, "_flex", lambda: flex_attention)  # uncompiled
    got, _ = weighed_attention.weighed_attention(torch.nn.Module(), q, k, v, keys)
    rows = (*(x.transpose(1, 2) for x in (q, k, v)), weight.transpose(1, 2))
    torch.testing.assert_close(got, kernel_file.reference_weighed_attention(*rows, 20))


def test_training_says_what_to_do_where_its_backward_pass_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_file, "_backward_queries", Crowded(None, "BQ", 0))
    q, k, v, weight = weighed()
    rows = (*(x.transpose(1, 2) for x in (q, k, v)), weight.transpose(1, 2), 20)
    out = kernel_file.kernel_weighed_attention(*rows)
    with pytest.raises(KernelRefused, match=r"Set model\.mod\.supports_flex = False"):
        out.sum().backward()
