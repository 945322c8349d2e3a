"""One computation at a time on one model, from any caller, and each can be stopped between two layers."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

from modlab.widgets.jobs import Job

# One lock a model, shared by all widgets of it: in JupyterLab 4.6 callbacks run in a thread of their own,
# while a cell runs, and a threshold must not move in the middle of another run.
_LOCKS: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()
_LOCKS_GUARD = threading.Lock()


def lock_of(model: Any) -> Any:
    """The model's lock; the same thread may take it again."""
    with _LOCKS_GUARD:
        return _LOCKS.setdefault(model, threading.RLock())


def trained_for(model: Any) -> dict[str, Any]:
    """For js/beyond.js: the largest threshold that the model's routers were trained for, and what is to be
    said of one beyond it; empty where nothing is known."""
    from modlab.routing.kv_saving import known_of

    known = known_of(model)
    return {"largest": known.largest, "beyond": known.beyond} if known.range else {}


@contextmanager
def using(
    model: Any,
    job: Job | None = None,
    text: str = "",
    by_layer: bool = True,
    part: tuple[float, float] = (0.0, 1.0),
) -> Iterator[None]:
    """Inside this block no other widget uses the model. A cell may: it neither waits nor is stopped.

    Args:
        job: what is told of the progress and asked, before every layer, whether to go on.
        text: what is being done, for people.
        by_layer: tell the progress layer by layer; False where the caller tells it.
        part: where the progress bar stands at the beginning and the end of this block, in 0..1.

    Raises:
        Cancelled: the job was stopped.
    """
    from modlab.hf.anatomy import decoder_layers

    lock = lock_of(model)
    if job is None:
        with lock:
            yield
        return
    while not lock.acquire(timeout=0.05):
        job.report("Waiting for the model: something else is running on it")
    hooks, here, (start, end) = [], threading.get_ident(), part
    try:
        layers = decoder_layers(model)
        for index, layer in enumerate(layers):

            def before(*_: Any, index: int = index) -> None:
                if threading.get_ident() != here:  # a cell's own forward: nobody asked to stop that one
                    return
                if by_layer:
                    done = (index + 1) / len(layers)
                    job.report(f"{text}: layer {index + 1} of {len(layers)}", start + (end - start) * done)
                else:
                    job.check()

            hooks.append(layer.register_forward_pre_hook(before))
        yield
    finally:
        for hook in hooks:
            hook.remove()
        lock.release()
