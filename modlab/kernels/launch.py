"""Launches of Triton kernels, on GPUs of any size.

How much shared memory a tile takes is known once Triton has compiled it, and is another number on every GPU
and with every version of Triton; what a GPU has differs too: 64 KB a program on sm_75, 99 on sm_86, sm_89 and
sm_120, 227 on sm_90. So a kernel that comes near to that names its tiles from the fastest to the smallest,
and the first that there is room for runs.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

from modlab.errors import ModlabError
from modlab.warn import warn

try:
    from triton.errors import TritonError
    from triton.runtime.errors import InterpreterError, OutOfResources
except ImportError:  # see decode_attention: nothing is launched then
    TritonError = InterpreterError = OutOfResources = ()

Sizes = dict[str, int]
"""A tile: block sizes (constants of the kernel), `num_warps` and `num_stages`."""


class KernelRefused(ModlabError):
    """A kernel does not run on this GPU, in no tile; the message says which, and why. It was not launched."""


_smaller: dict[Any, int] = {}
"""The tile to begin with, by kernel, GPU, dtype and constants, where the first ones had no room."""

_refusals: dict[Any, str] = {}
"""What was said of those that do not run: a kernel that does not compile takes as long to say so again."""


def launch(kernel: Any, grid: Any, *arguments: Any, tiles: tuple[Sizes, ...], **constants: Any) -> None:
    """Runs a Triton kernel with the first of these tiles that the current GPU has room for.

    Args:
        kernel: made by `triton.jit`.
        grid: programs, or a function of all constants that gives them.
        arguments: of the kernel; the first is a tensor.
        tiles: from the fastest to the smallest, one at least. All give the same up to rounding.
        constants: further constants of the kernel, the same with every tile.

    Raises:
        KernelRefused: there is room for none, or Triton cannot compile the kernel for this GPU. Later
            launches are refused without a try. What fails in Triton's interpreter, which has room for
            everything, is a fault of the kernel and is left as it is.
    """
    key = (id(kernel), arguments[0].device, arguments[0].dtype, *constants.values())
    if key in _refusals:
        raise KernelRefused(_refusals[key])
    for at in range(_smaller.get(key, 0), len(tiles)):
        try:
            kernel[grid](*arguments, **constants, **tiles[at])
        except OutOfResources as error:
            if at + 1 == len(tiles):
                _refusals[key] = _why(kernel, error)
                raise KernelRefused(_refusals[key]) from error
            _smaller[key] = at + 1
        except InterpreterError:
            raise
        except TritonError as error:
            _refusals[key] = _why(kernel, error)
            raise KernelRefused(_refusals[key]) from error
        else:
            return


def _why(kernel: Any, error: Exception) -> str:
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "this machine"
    if isinstance(error, OutOfResources):
        why = f"its smallest tile takes {error.required:,} of {error.name}, and there are {error.limit:,}"
    else:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        why = f"{type(error).__name__} {lines[0] if lines else ''}".strip().rstrip(".")
    return f"the kernel {kernel.__name__.strip('_')} does not run on {gpu} ({why})"


@functools.cache
def warn_slower(refused: str, instead: str) -> None:
    """Warns, once a process, that something else computes what a kernel would have: the same, up to rounding.

    Args:
        refused: what a `KernelRefused` says.
        instead: what runs, as a sentence without its end.
    """
    warn(f"{refused}: {instead}, more slowly.")
