"""Small work whose result is not needed at once, on a stream next to the current one.

A router's kernels are short and come before large ones that do not ask for its decision. In line, each of
them costs what a launch costs; next to the large ones, hardly anything. On an H200 a captured step of one row
gains 3 us a layer, one of 8 rows 5 or more; prompts gain where the GPU is what they wait for, not the host
(docs/log.md).

Memory that is allocated on the stream aside and used on the other one is safe, although the allocator does
not know of it: what is launched aside later waits for all that the other stream was told before.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import torch

_of_thread = threading.local()


def _stream(device: torch.device) -> Any:
    """This thread's own: another one may be capturing."""
    streams = _of_thread.__dict__.setdefault("streams", {})
    if device not in streams:
        streams[device] = torch.cuda.Stream(device)
    return streams[device]


@contextlib.contextmanager
def aside(device: torch.device) -> Iterator[None]:
    """What is launched in this block comes after all that was launched before it; what is launched later does
    not wait for it until `rejoin`."""
    if device.type != "cuda":
        yield
        return
    stream = _stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        yield
    _of_thread.pending = stream.record_event()


def rejoin(device: torch.device) -> None:
    """What is launched from here on comes after what was launched aside, if anything was."""
    pending, _of_thread.pending = getattr(_of_thread, "pending", None), None
    if pending is not None:
        torch.cuda.current_stream(device).wait_event(pending)


@contextlib.contextmanager
def nothing_left_aside() -> Iterator[None]:
    """However this block ends, nobody waits afterwards for what was launched aside in it: a capture that
    fails leaves an event for which no stream can wait."""
    try:
        yield
    finally:
        _of_thread.pending = None
