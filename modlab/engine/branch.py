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
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from modlab.kernels.decode_router import (
    RouterCall,
    decode_router,
    reference_decode_router,
)

SOURCE = Path(__file__).parent.parent / "kernels" / "decode_router.cu"
BLOCK = 1024  # threads of its kernel `route`
KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

Body = Callable[[], None]


class Branch:
    """How a routed layer is skipped."""

    name: str

    def run_if(self, graph: Any, flag_1: Tensor, body: Body) -> None:
        """Runs `body` where the bool `flag_1` [1] is true: now, or when the captured `graph` is replayed."""
        raise NotImplementedError

    def decide(self, graph: Any, call: RouterCall) -> Any:
        """Makes the decision of `call`; what `run_decided` takes, now or later in the same step."""
        decide = decode_router if call.x_BD.is_cuda else reference_decode_router
        decide(call)
        return call.any_1

    def run_decided(self, graph: Any, decided: Any, body: Body) -> None:
        """Runs `body` if any row keeps its token; once for each decision."""
        self.run_if(graph, decided, body)


class TorchBranch(Branch):
    """IF nodes by torch's own API."""

    name = "torch"

    def __init__(self) -> None:
        if not hasattr(torch.cuda.CUDAGraph, "begin_capture_to_if_node"):
            raise RuntimeError(f"torch {torch.__version__} has no IF nodes")

    def run_if(self, graph: Any, flag_1: Tensor, body: Body) -> None:
        """By two calls of torch's CUDAGraph."""
        graph.begin_capture_to_if_node(flag_1.view(()))
        try:
            body()
        finally:
            graph.end_capture_to_conditional_node()


class CudaPythonBranch(Branch):
    """IF nodes by NVIDIA's `cuda.bindings` (package cuda-python)."""

    name = "cuda-python"

    def __init__(self) -> None:
        from cuda.bindings import driver, nvrtc, runtime

        self.driver, self.runtime = driver, runtime
        torch.zeros(1, device="cuda")  # the context must exist before a module is loaded into it
        module = _compiled(driver, nvrtc)
        self.kernel_set = _checked(driver.cuModuleGetFunction(module, b"set_condition"))
        self.kernel_route = _checked(driver.cuModuleGetFunction(module, b"route"))
        # What a body allocates must stay its own: the rest of the graph may still run while it is used.
        self.pool = torch.cuda.MemPool()
        self.stream = torch.cuda.Stream()

    def run_if(self, graph: Any, flag_1: Tensor, body: Body) -> None:
        """A one-thread kernel sets the node's condition from `flag_1`."""
        handle = self._new_handle()
        self._launch(
            self.kernel_set, 1, (int(handle), ctypes.c_ulonglong), (flag_1.data_ptr(), ctypes.c_void_p)
        )
        self._capture_node(handle, body)

    def decide(self, graph: Any, call: RouterCall) -> Any:
        """One kernel decides and sets a later node's condition: 2 us a layer less than two (docs/log.md)."""
        if graph is None or call.is_wide:  # its kernel reads one linear map
            return super().decide(graph, call)
        handle, x_BD = self._new_handle(), call.x_BD
        rows, size = x_BD.shape
        warps = 32 // min(32, 1 << (rows - 1).bit_length())
        numbers = (KINDS[x_BD.dtype], x_BD.stride(0), rows, size, warps)
        number_types = (ctypes.c_int, ctypes.c_longlong, ctypes.c_int, ctypes.c_int, ctypes.c_int)
        pointer = ctypes.c_void_p
        inputs = (call.weight, call.bias_A, call.threshold_1, call.position_B)
        outputs = (call.forced_3, call.gate, call.keep, call.any_1)
        self._launch(
            self.kernel_route, BLOCK, (int(handle), ctypes.c_ulonglong), (x_BD.data_ptr(), pointer),
            *zip(numbers, number_types, strict=True), *((t.data_ptr(), pointer) for t in inputs),
            (call.keep_first, ctypes.c_int), *((t.data_ptr(), pointer) for t in outputs),
        )  # fmt: skip
        return handle

    def run_decided(self, graph: Any, decided: Any, body: Body) -> None:
        """The IF node whose condition `decide` has set."""
        if graph is None or isinstance(decided, Tensor):
            super().run_decided(graph, decided, body)
        else:
            self._capture_node(decided, body)

    def _new_handle(self) -> Any:
        stream = torch.cuda.current_stream().cuda_stream
        parent = _checked(self.runtime.cudaStreamGetCaptureInfo(stream))[2]
        return _checked(self.runtime.cudaGraphConditionalHandleCreate(parent, 0, 0))

    def _launch(self, kernel: Any, threads: int, *arguments: tuple[Any, Any]) -> None:
        """One block of `kernel` on the current stream; arguments are (value, C type)."""
        stream = torch.cuda.current_stream().cuda_stream
        values = (tuple(value for value, _ in arguments), tuple(kind for _, kind in arguments))
        _checked(self.driver.cuLaunchKernel(kernel, 1, 1, 1, threads, 1, 1, 0, stream, values, 0))

    def _capture_node(self, handle: Any, body: Body) -> None:
        """Adds an IF node on `handle` to the graph being captured, with `body` inside."""
        rt, stream = self.runtime, torch.cuda.current_stream().cuda_stream
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


class HostBranch(Branch):
    """No graph: one host sync for each routed layer."""

    name = "host"

    def run_if(self, graph: Any, flag_1: Tensor, body: Body) -> None:
        """Asks the GPU, and waits for the answer."""
        if bool(flag_1):
            body()


@functools.cache
def choose_branch(device: torch.device) -> tuple[Branch, str]:
    """The best way that works on `device`, and why not a better one ("" if there is none better)."""
    if device.type != "cuda":
        return HostBranch(), f"{device.type} has no CUDA graphs"
    why: list[str] = []
    candidates: tuple[Callable[[], Branch], ...] = (TorchBranch, CudaPythonBranch)
    for candidate in candidates:
        try:
            with torch.cuda.device(device):
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


def _compiled(driver: Any, nvrtc: Any) -> Any:
    """The kernels of decode_router.cu as a loaded module."""
    major, minor = torch.cuda.get_device_capability()
    program = _checked(nvrtc.nvrtcCreateProgram(SOURCE.read_bytes(), SOURCE.name.encode(), 0, [], []))
    options = [f"--gpu-architecture=sm_{major}{minor}".encode()]
    code = nvrtc.nvrtcCompileProgram(program, len(options), options)[0]
    if int(code) != 0:
        log = b" " * _checked(nvrtc.nvrtcGetProgramLogSize(program))
        nvrtc.nvrtcGetProgramLog(program, log)
        raise RuntimeError(f"{SOURCE.name} does not compile: {log.decode(errors='replace')}")
    binary = b" " * _checked(nvrtc.nvrtcGetCUBINSize(program))
    _checked(nvrtc.nvrtcGetCUBIN(program, binary))
    return _checked(driver.cuModuleLoadData(binary))


def _checked(result: tuple[Any, ...]) -> Any:
    """The values of a CUDA call, its error code checked and dropped."""
    code, *values = result
    if int(code) != 0:
        raise RuntimeError(f"a CUDA call failed: {code!r}")
    return values[0] if len(values) == 1 else values
