"""A continuation as it is written: its tokens, its time, the bytes of its cache; and several taking turns."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from modlab.hf.anatomy import decoder_of
from modlab.hf.model import eval_mode
from modlab.hf.names import given_cache
from modlab.widgets.jobs import Cancelled


class Writing:
    """One greedy continuation of a prompt at one threshold.

    Args:
        tokenizer: the model's.
        p: the threshold; None: those that the model has in this thread.

    Attributes:
        ids: the new tokens so far; pieces: what each adds to the text.
        seconds: time spent on them, without what `after` took; first_s: on the first one alone.
        cache: what `generate` fills, once there is one.
    """

    def __init__(self, tokenizer: Any, p: float | None) -> None:
        self.tokenizer, self.p = tokenizer, p
        self.ids: list[int] = []
        self.pieces: list[str] = []
        self.seconds = self.first_s = 0.0
        self.cache: Any = None
        self.done = False

    @property
    def tokens_per_s(self) -> float | None:
        """Tokens a second after the first one; None before there is a second."""
        spent = self.seconds - self.first_s
        return (len(self.ids) - 1) / spent if len(self.ids) > 1 and spent > 0 else None

    @property
    def bytes(self) -> tuple[int, int]:
        """Allocated bytes of the cache as it is now, and those of a dense one; zeros without a cache."""
        if self.cache is None:
            return 0, 0
        return int(self.cache.nbytes), int(self.cache.dense_nbytes)

    def write(self, model: Any, ids_BT: torch.Tensor, count: int, after: Callable[[], None]) -> None:
        """Generate at most `count` tokens in this thread; the thresholds of others stay as they are.

        Args:
            model: a converted model.
            ids_BT: the prompt, one row.
            after: called after each token; what it raises ends the generation.
        """
        from modlab.routing.state import set_threshold, thresholds_restored

        here, since = threading.get_ident(), time.perf_counter()

        def look(_module: Any, _args: Any, output: Any) -> None:
            if threading.get_ident() == here:
                self.cache = given_cache(output)

        def each(ids: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
            nonlocal since
            self.seconds += time.perf_counter() - since
            self.first_s = self.first_s or self.seconds
            self._take(ids[0, ids_BT.shape[1] :].tolist())
            after()
            since = time.perf_counter()
            return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)

        pad = getattr(model.generation_config, "pad_token_id", None)
        hook = decoder_of(model).register_forward_hook(look)
        try:
            with thresholds_restored(model), torch.no_grad():
                if self.p is not None:
                    set_threshold(model, self.p)
                output = model.generate(
                    ids_BT,
                    attention_mask=torch.ones_like(ids_BT),
                    return_dict_in_generate=True,
                    max_new_tokens=count,
                    do_sample=False,
                    pad_token_id=0 if pad is None else pad,
                    stopping_criteria=[each],
                )
        finally:
            hook.remove()
        self.cache, self.done = given_cache(output), True

    def _take(self, ids: list[int]) -> None:
        """The tokens so far; each new one is what it adds to the text."""
        for count in range(len(self.ids) + 1, len(ids) + 1):
            text = self.tokenizer.decode(ids[:count])
            done = sum(len(piece) for piece in self.pieces)
            # Half a character decodes to U+FFFD: its text comes with the token that completes it.
            self.pieces.append("" if text.endswith("\ufffd") else text[done:])
        self.ids = ids


def write_in_turns(
    model: Any, writings: Sequence[Writing], ids_BT: torch.Tensor, count: int, after: Callable[[], None]
) -> None:
    """Write all of them token by token, one token of each in turn. Their times do not count one another's.

    Raises:
        Cancelled: `after` raised it.
    """
    with eval_mode(model):
        # The engine of fast generation takes one generation at a time.
        if "mod_engine" in vars(model):
            for writing in writings:
                writing.write(model, ids_BT, count, after)
            return
        relay = _Relay(len(writings))

        def leg(index: int) -> None:
            def pass_on() -> None:
                after()
                relay.pass_on(index)

            writings[index].write(model, ids_BT, count, pass_on)

        relay.run(leg)


class _Relay:
    """Functions in threads of their own, of which one runs at a time and passes the turn on."""

    def __init__(self, count: int) -> None:
        self._changed = threading.Condition()
        self._running = list(range(count))
        self._turn = 0
        self._error: BaseException | None = None

    def run(self, leg: Callable[[int], None]) -> None:
        """Runs `leg(index)` for each index until all are over; raises the first error of any of them."""
        threads = [
            threading.Thread(target=self._run, args=(leg, i), name="modlab-write", daemon=True)
            for i in self._running
        ]
        for thread in threads:
            thread.start()
        try:
            for thread in threads:
                thread.join()
        except BaseException as error:  # the kernel's interrupt button
            self._fail(error)
            for thread in threads:
                thread.join()
        if self._error is not None:
            raise self._error

    def pass_on(self, index: int) -> None:
        """Give the turn to the next one and wait for it to come back.

        Raises:
            Cancelled: another one failed.
        """
        with self._changed:
            later = [i for i in self._running if i > index]
            self._turn = later[0] if later else self._running[0]
            self._changed.notify_all()
            self._wait(index)

    def _wait(self, index: int) -> None:
        self._changed.wait_for(lambda: self._turn == index or self._error is not None)
        if self._error is not None:
            raise Cancelled

    def _run(self, leg: Callable[[int], None], index: int) -> None:
        try:
            with self._changed:
                self._wait(index)
            leg(index)
        except BaseException as error:
            self._fail(error)
        with self._changed:
            self._running.remove(index)
            if self._turn == index and self._running:
                later = [i for i in self._running if i > index]
                self._turn = (later or self._running)[0]
            self._changed.notify_all()

    def _fail(self, error: BaseException) -> None:
        with self._changed:
            self._error = self._error or error
            self._changed.notify_all()
