"""CacheView: the cache of every layer and KV head, while text is generated."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import traitlets as t

from modlab.data.pieces import encode
from modlab.hf.model import eval_mode
from modlab.routing.record import by_gate
from modlab.traces.routing_trace import RoutingTrace
from modlab.traces.run import check_ids
from modlab.widgets.heads import name_heads, names_in_words
from modlab.widgets.jobs import Job
from modlab.widgets.measured import MeasuredView
from modlab.widgets.model_access import using
from modlab.widgets.pictures.trace import trace_svg
from modlab.widgets.writing import Writing

TELL_EVERY = 0.25  # seconds between two pictures while text is written


class CacheView(MeasuredView, view="cache"):
    """What each layer and KV head still holds of a text, and how that changes while the text goes on.

    A token enters every cache; where no router keeps it, it fades while it is recent and is gone then. Bytes
    are allocated ones, next to those of a dense cache. Each head has a name after what it keeps of this text;
    a click shows the figures behind the name.

    Args:
        model: a converted model whose gates decide; the slider moves its thresholds.
        tokenizer: its tokenizer.
        text: the text to begin with; another one can be put in in the widget.
        max_new_tokens: at most so many tokens are written.
        expect: what the continuation should have in it, for a text that ends with a question: releasing the
            slider then writes the answer, too, and the view says whether it was found or lost.

    Attributes:
        heads: name and figures of each gate, see `heads.name_heads`.
        written: once something was: tokens (in the cache), kv_bytes (allocated) and dense_bytes after each
            token, prompt (tokens of the text that was continued), p, tokens_per_s, first_s, done, text, and
            found: whether the text has what is expected, None as long as it may still come.
    """

    heads = t.List(t.Dict()).tag(sync=True)
    written = t.Dict().tag(sync=True)
    max_new_tokens = t.Int(120, min=1).tag(sync=True, echo_update=False)
    expect = t.Unicode("").tag(sync=True)

    def __init__(
        self, model: Any, tokenizer: Any, text: str, max_new_tokens: int = 120, expect: str = ""
    ) -> None:
        from modlab.routing.state import gated_routing_of

        gated_routing_of(model)
        super().__init__(model, tokenizer, text, max_new_tokens=max_new_tokens, expect=expect)

    def generate(self) -> str:
        """Continue the text at the model's thresholds, and return what was written."""
        return self._generate(self.max_new_tokens, None)

    def _show(self, trace: RoutingTrace, cache: Any) -> None:
        super()._show(trace, cache)
        with self.hold_sync():
            self.written, self.heads = {}, name_heads(trace)

    def _work(self, content: dict[str, Any]) -> Any:
        if content.get("type") == "run":
            return lambda job: (self._ask if self.expect else self._measure)(float(content["p"]), job)
        if content.get("type") == "generate":
            return lambda job: self._generate(int(content["max_new_tokens"]), job)
        return super()._work(content)

    def ask(self, p: float) -> bool:
        """Set the threshold, write the answer, and return whether what is expected is in it.

        Raises:
            ModlabError: p is below 0, or not below 1.
        """
        self._ask(p, None)
        return bool(self.written["found"])

    def _ask(self, p: float, job: Job | None) -> None:
        from modlab.routing.state import set_threshold, thresholds_restored_on_error

        with using(self._model, job, by_layer=False), thresholds_restored_on_error(self._model):
            set_threshold(self._model, p)
            self._generate(self.max_new_tokens, job)

    def _found(self, writing: Writing) -> bool | None:
        """Whether what is expected was written; None without an expectation, or as long as it may come."""
        if not self.expect:
            return None
        return True if self.expect in "".join(writing.pieces) else False if writing.done else None

    def _generate(self, count: int, job: Job | None) -> str:
        from modlab.routing.state import record_routing

        ids, pieces = encode(self._tokenizer, self.text)
        check_ids(self._model, ids)
        writing, told = Writing(self._tokenizer, None), time.monotonic()
        with using(self._model, job, by_layer=False), eval_mode(self._model):
            with record_routing(self._model) as recording:
                growing = _Growing(self._trace, ids, pieces, self._model.mod.thresholds)

                def after() -> None:
                    nonlocal told
                    growing.take(recording, writing)
                    if job is not None:
                        job.report(f"token {len(writing.ids)} of {count}", len(writing.ids) / count)
                    if time.monotonic() - told > TELL_EVERY:
                        told = time.monotonic()
                        self._tell(growing, writing)

                ids_BT = torch.tensor([ids], device=self._model.device)
                writing.write(self._model, ids_BT, count, after)
            self._tell(growing, writing)
        return "".join(writing.pieces)

    def _tell(self, growing: _Growing, writing: Writing) -> None:
        """Show what is there so far."""
        if not growing.tokens:
            return
        trace, (kv_bytes, dense_bytes) = growing.trace(writing), writing.bytes
        with self.hold_sync():
            super()._show(trace, _Sizes(kv_bytes, dense_bytes))
            self.written = {
                "tokens": list(growing.tokens),  # copies: what grows on is no news to the browser
                "kv_bytes": list(growing.kv_bytes),
                "dense_bytes": list(growing.dense_bytes),
                "prompt": growing.prompt,
                "p": self.summary["p"],
                "tokens_per_s": writing.tokens_per_s,
                "first_s": writing.first_s,
                "done": writing.done,
                "text": "".join(writing.pieces),
                "found": self._found(writing),
            }
            if writing.done:
                self.heads = name_heads(trace)

    def _svg(self) -> str:
        return trace_svg(self._trace, notes=[*self._answer(), *names_in_words(self.heads)])

    def _answer(self) -> list[str]:
        """What came of the question, in a line, if one was asked."""
        if self.written.get("found") is None:
            return []
        verdict = "found" if self.written["found"] else "lost"
        return [f"{verdict}: wanted {self.expect!r}, written {self.written['text']!r}"]


class _Sizes:
    """What `MeasuredView` asks of a cache."""

    def __init__(self, nbytes: int, dense_nbytes: int) -> None:
        self.nbytes, self.dense_nbytes = nbytes, dense_nbytes


class _Growing:
    """Gates and decisions of a text that is being continued, and the bytes of its cache after each token."""

    def __init__(
        self, before: RoutingTrace, ids: list[int], pieces: list[str], ps: Mapping[int, float]
    ) -> None:
        self.before, self.ids, self.pieces, self.prompt = before, ids, pieces, len(ids)
        self.thresholds = np.asarray([ps[layer] for layer in before.layers], dtype=np.float32)
        self._gates: list[Any] = []
        self._keeps: list[Any] = []
        self.tokens: list[int] = []
        self.kv_bytes: list[int] = []
        self.dense_bytes: list[int] = []

    def take(self, recording: Any, writing: Writing) -> None:
        """What the forwards since the last call recorded."""
        layers = sorted(set(self.before.layers))
        for step in recording.steps:
            self._gates.append(np.concatenate([_rows(step.gate[layer]) for layer in layers]))
            self._keeps.append(np.concatenate([_rows(step.keep[layer]) for layer in layers]))
        recording.steps.clear()
        kv_bytes, dense_bytes = writing.bytes
        self.tokens.append(sum(gate.shape[1] for gate in self._gates))
        self.kv_bytes.append(kv_bytes)
        self.dense_bytes.append(dense_bytes)

    def trace(self, writing: Writing) -> RoutingTrace:
        """The text so far: as many tokens as the cache has seen; the latest one has not been read yet."""
        gate, keep = np.concatenate(self._gates, axis=1), np.concatenate(self._keeps, axis=1)
        seen = gate.shape[1]
        return replace(
            self.before,
            tokens=[*self.pieces, *writing.pieces][:seen],
            token_ids=np.asarray([*self.ids, *writing.ids][:seen]),
            gate=gate,
            keep=keep,
            thresholds=self.thresholds,
            loss=np.full(seen, np.nan, dtype=np.float32),
        )


def _rows(value: torch.Tensor) -> Any:
    """[G, T] on the CPU, of the one row of a recorded tensor."""
    return by_gate(value)[0].T.cpu().numpy()
