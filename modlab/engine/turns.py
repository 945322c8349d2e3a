"""Who may use a model with fast generation: any number of ordinary forwards, or one generation alone.

While the engine works, modules of the model run other functions than their own, and its config names other
attention. A forward from another thread (a widget, a second request) would run them too, so it waits until
the generation is done. A generation does not wait for a forward that is under way, which may itself be
waiting for it: it then runs without the engine.
"""

from __future__ import annotations

import contextlib
import threading
from collections import Counter
from collections.abc import Iterator
from typing import Any

from modlab.conversion.extend import Extended
from modlab.errors import ModlabError

TURNS = "mod_turns"
"""Name under which a model and its decoder hold their `Turns`."""


class Turns:
    """Counts the forwards under way, by thread, and knows which thread generates."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._forwards: Counter[int] = Counter()
        self._generating: int | None = None

    @contextlib.contextmanager
    def forward(self) -> Iterator[None]:
        """An ordinary forward; waits for a generation of another thread."""
        me = threading.get_ident()
        with self._changed:
            if not self._forwards[me]:  # a forward inside a forward is part of it
                self._changed.wait_for(lambda: self._generating in (None, me))
            self._forwards[me] += 1
        try:
            yield
        finally:
            with self._changed:
                self._forwards[me] -= 1
                self._forwards = +self._forwards  # forgets threads without one
                self._changed.notify_all()

    @contextlib.contextmanager
    def generation(self) -> Iterator[str]:
        """A generation by the engine; waits for one of another thread.

        Yields:
            why the engine cannot be used, "" if it can.
        """
        me = threading.get_ident()
        with self._changed:
            self._changed.wait_for(lambda: self._generating in (None, me))
            why = ""
            if self._generating == me:
                why = "it was called from inside another generation of this model"
            elif self._forwards:
                why = "another forward of this model is under way"
            else:
                self._generating = me
        try:
            yield why
        finally:
            if not why:
                with self._changed:
                    self._generating = None
                    self._changed.notify_all()


class TakesTurns(Extended):
    """Mixed into the class of a model with fast generation, and of its decoder (of those objects only)."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        turns: Turns = self.__dict__[TURNS]
        with turns.forward():
            return super().__call__(*args, **kwargs)

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise ModlabError(
            "a model with fast generation holds captured CUDA graphs, which cannot be copied: "
            "modlab.disable_fast_generation(model) first."
        )
