"""Skipping a layer without asking the host: IF nodes inside a CUDA graph, by whichever way this torch offers.

An IF node holds a small graph of its own, which runs only where a one-byte predicate on the GPU says so.

    torch         torch.cuda.CUDAGraph.begin_capture_to_if_node (torch 2.13)
    cuda-python   the same CUDA calls through `cuda.bindings`
    host          no graph: the host reads the predicate and branches

`choose_branch` tries them in this order, each on a graph of its own whose result is checked.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

SETTER = b"""
typedef unsigned long long handle_t;
extern "C" __device__ __cudart_builtin__ void cudaGraphSetConditional(handle_t handle, unsigned int value);
extern "C" __global__ void set_condition(handle_t handle, const bool* flag) {
    cudaGraphSetConditional(handle, *flag ? 1u : 0u);
}
"""


class TorchBranch:
    """IF nodes by torch's own API."""

    name = "torch"

    def __init__(self) -> None:
        if not hasattr(torch.cuda.CUDAGraph, "begin_capture_to_if_node"):
            raise RuntimeError(f"torch {torch.__version__} has no IF nodes")

    def run_if(self, graph: Any, flag_1: Tensor, body: Callable[[], None]) -> None:
        """Captures `body` into `graph`, to run where the bool `flag_1` [1] is true at replay."""
        graph.begin_capture_to_if_node(flag_1.view(()))
        try:
            body()
        finally:
            graph.end_capture_to_conditional_node()


class CudaPythonBranch:
    """IF nodes by NVIDIA's `cuda.bindings` (package cuda-python)."""

    name = "cuda-python"

    def __init__(self) -> None:
        from cuda.bindings import driver, nvrtc, runtime

        self.driver, self.runtime = driver, runtime
        torch.zeros(1, device="cuda")  # the context must exist before a module is loaded into it
        self.setter = _compiled_setter(driver, nvrtc)
        # What a body allocates must stay its own: the rest of the graph may run beside its memory's last use.
        self.pool = torch.cuda.MemPool()
        self.stream = torch.cuda.Stream()

    def run_if(self, graph: Any, flag_1: Tensor, body: Callable[[], None]) -> None:
        """Captures `body` into the graph being captured, to run where the bool `flag_1` [1] is true."""
        rt, stream = self.runtime, torch.cuda.current_stream().cuda_stream
        parent = _checked(rt.cudaStreamGetCaptureInfo(stream))[2]
        handle = _checked(rt.cudaGraphConditionalHandleCreate(parent, 0, 0))
        arguments = ((int(handle), flag_1.data_ptr()), (ctypes.c_ulonglong, ctypes.c_void_p))
        _checked(self.driver.cuLaunchKernel(self.setter, 1, 1, 1, 1, 1, 1, 0, stream, arguments, 0))
        info = _checked(rt.cudaStreamGetCaptureInfo(stream))
        before = info[3]
        node = rt.cudaGraphNodeParams()
        node.type = rt.cudaGraphNodeType.cudaGraphNodeTypeConditional
        node.conditional.handle = handle
        node.conditional.type = rt.cudaGraphConditionalNodeType.cudaGraphCondTypeIf
        node.conditional.size = 1
        added = _checked(rt.cudaGraphAddNode(info[2], before, None, len(before), node))
        # 1 = cudaStreamSetCaptureDependencies: what the stream captures next comes after the IF node
        _checked(rt.cudaStreamUpdateCaptureDependencies(stream, [added], None, 1, 1))
        inner = node.conditional.phGraph_out[0]
        mode = rt.cudaStreamCaptureMode.cudaStreamCaptureModeRelaxed
        _checked(rt.cudaStreamBeginCaptureToGraph(self.stream.cuda_stream, inner, None, None, 0, mode))
        try:
            with torch.cuda.stream(self.stream), torch.cuda.use_mem_pool(self.pool):
                body()
        finally:
            _checked(rt.cudaStreamEndCapture(self.stream.cuda_stream))


class HostBranch:
    """No graph: one host sync for each routed layer."""

    name = "host"

    def run_if(self, graph: Any, flag_1: Tensor, body: Callable[[], None]) -> None:
        """Runs `body` now if `flag_1` [1] is true."""
        if bool(flag_1):
            body()


Branch = TorchBranch | CudaPythonBranch | HostBranch


@functools.cache
def choose_branch(device: torch.device) -> tuple[Branch, str]:
    """The best way that works on `device`, and why not a better one ("" if there is none better)."""
    if device.type != "cuda":
        return HostBranch(), f"{device.type} has no CUDA graphs"
    why = []
    candidates: tuple[Callable[[], Branch], ...] = (TorchBranch, CudaPythonBranch)
    for candidate in candidates:
        try:
            branch = candidate()
            _self_test(branch, device)
            return branch, "; ".join(why)
        except Exception as error:
            why.append(f"{candidate.__name__}: {error}")  # type: ignore[attr-defined]
    return HostBranch(), "; ".join(why)


def _self_test(branch: Branch, device: torch.device) -> None:
    """Captures one graph with an IF node that adds to a number, and checks that it does so when told only."""
    with torch.cuda.device(device):
        number = torch.zeros(4, device=device)
        flag = torch.zeros(1, dtype=torch.bool, device=device)

        def body() -> None:
            number.add_(torch.ones_like(number) * 2)

        body()  # loads the kernels: a capture may not
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="relaxed"):
            branch.run_if(graph, flag, body)
            number.mul_(3)
        seen = []
        for value in (False, True, False):
            number.fill_(1.0)
            flag.fill_(value)
            graph.replay()
            seen.append(number.tolist())
        if seen != [[3.0] * 4, [9.0] * 4, [3.0] * 4]:
            raise RuntimeError(f"an IF node computed {seen}")


def _compiled_setter(driver: Any, nvrtc: Any) -> Any:
    major, minor = torch.cuda.get_device_capability()
    program = _checked(nvrtc.nvrtcCreateProgram(SETTER, b"setter.cu", 0, [], []))
    options = [f"--gpu-architecture=sm_{major}{minor}".encode()]
    _checked(nvrtc.nvrtcCompileProgram(program, len(options), options))
    binary = b" " * _checked(nvrtc.nvrtcGetCUBINSize(program))
    _checked(nvrtc.nvrtcGetCUBIN(program, binary))
    module = _checked(driver.cuModuleLoadData(binary))
    return _checked(driver.cuModuleGetFunction(module, b"set_condition"))


def _checked(result: tuple[Any, ...]) -> Any:
    """The values of a CUDA call, its error code checked and dropped."""
    code, *values = result
    if int(code) != 0:
        raise RuntimeError(f"a CUDA call failed: {code!r}")
    return values[0] if len(values) == 1 else values
