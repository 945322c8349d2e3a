"""CellFlip: force one token through one layer, or past it, and see what that does."""

from __future__ import annotations

from typing import Any

import numpy as np
import traitlets as t

from modlab.errors import ModlabError
from modlab.hf.names import given_cache
from modlab.traces.routing_trace import RoutingTrace
from modlab.traces.run import run_traced
from modlab.widgets.jobs import Job
from modlab.widgets.measured import MeasuredView
from modlab.widgets.model_access import using

NEXT = 8  # likeliest next tokens shown, of before and after together

Flips = dict[tuple[int, int], bool]


class Bytes:
    """What a cache took, without the cache."""

    def __init__(self, cache: Any) -> None:
        self.nbytes, self.dense_nbytes = int(cache.nbytes), int(cache.dense_nbytes)


class CellFlip(MeasuredView, view="flip"):
    """The heatmap of a text whose cells can be flipped, the loss and the next-token probabilities next to it.

    A click on a cell forces the token through the layer, or past it; a second click undoes that. Everything
    that follows is computed again by the model: other layers may decide differently, too. A layer with
    several gates is forced as a whole.

    Attributes:
        flips: [layer, token, keep] for each forced cell.
        effect: loss and loss_before (nats, None for a text of one token), kv_bytes and kv_bytes_before
            (allocated), others (decisions that changed besides the forced ones), at (the token after which
            `next` is predicted), next ([{token, before, after}], probabilities).
        deltas: float32[T], each token's loss minus its loss without flips.
    """

    flips = t.List(t.List()).tag(sync=True, echo_update=False)
    effect = t.Dict().tag(sync=True)
    deltas = t.Bytes(b"").tag(sync=True)

    def __init__(self, model: Any, tokenizer: Any, text: str) -> None:
        self._before: tuple[RoutingTrace, Bytes] | None = None
        self._before_next: dict[int, Any] = {}
        super().__init__(model, tokenizer, text)
        with using(model):
            self._run({}, -1, None)

    def flip(self, layer: int, token: int, keep: bool | None = None) -> None:
        """Force a cell; the run goes on in the background, `wait()` waits for it.

        Args:
            layer: a routed layer.
            token: index of the token.
            keep: True: the layer runs the token, False: it does not, None: the opposite of what shows.

        Raises:
            ModlabError: there is no such cell.
        """
        self._check(layer, token)
        if keep is None:
            keep = not self._trace.keep[self._trace.layers.index(layer), token]
        self.set_flips({**self.forced, (layer, token): bool(keep)})

    def reset(self) -> None:
        """Undo all flips."""
        self.set_flips({})

    @property
    def forced(self) -> Flips:
        """{(layer, token): keep} of the forced cells."""
        return {(int(layer), int(token)): bool(keep) for layer, token, keep in self.flips}

    def set_flips(self, flips: Flips) -> None:
        """Force exactly these cells; the run goes on in the background."""
        for layer, token in flips:
            self._check(layer, token)
        self.flips = [[layer, token, keep] for (layer, token), keep in flips.items()]
        self._jobs.start(lambda job: self._apply(flips, -1, job))

    def _check(self, layer: int, token: int) -> None:
        if layer not in self._trace.layers:
            raise ModlabError(
                f"layer {layer} is not routed, every token runs there; routed are {self._trace.layers}."
            )
        if not 0 <= token < len(self._trace.tokens):
            raise ModlabError(f"there is no token {token}; the text has {len(self._trace.tokens):,}.")

    def _work(self, content: dict[str, Any]) -> Any:
        if content.get("type") != "flips":
            return super()._work(content)

        def work(job: Job) -> None:
            flips = {(int(layer), int(token)): bool(keep) for layer, token, keep in content["flips"]}
            for layer, token in flips:
                self._check(layer, token)
            self._apply(flips, int(content.get("position", -1)), job)

        return work

    def _apply(self, flips: Flips, position: int, job: Job) -> None:
        with using(self._model, job, "Running the text"):
            self._run(flips, position, job)

    def _run(self, flips: Flips, position: int, job: Job | None) -> None:
        thresholds = self._model.mod.thresholds
        now = np.asarray([thresholds[i] for i in self._trace.layers], dtype=np.float32)
        if self._before is None or not np.array_equal(self._before[0].thresholds, now):
            self._before, self._before_next = None, {}
        at = position if 0 <= position < len(self._trace.tokens) else len(self._trace.tokens) - 1
        if self._before is None or at not in self._before_next:
            trace, output = run_traced(self._model, self._tokenizer, self.text)
            self._before = (trace, Bytes(given_cache(output)))
            self._before_next[at] = probabilities(output.logits[0, at])
        (trace, cache), after = self._before, self._before_next[at]
        if flips:
            trace, output = self._forced_run(flips)
            cache, after = Bytes(given_cache(output)), probabilities(output.logits[0, at])
        if job is not None:
            job.check()
        self._tell(flips, trace, cache, at, after)

    def _take(self, trace: RoutingTrace, output: Any) -> None:
        cache, at = Bytes(given_cache(output)), len(trace.tokens) - 1
        self._before, self.flips = (trace, cache), []
        self._before_next = {at: probabilities(output.logits[0, at])}
        self._tell({}, trace, cache, at, self._before_next[at])

    def _forced_run(self, flips: Flips) -> tuple[RoutingTrace, Any]:
        from modlab.routing.rule import kept, over
        from modlab.routing.state import routing_override

        routing = self._model.mod

        def decide(layer_idx: int, gate: Any, position_ids: Any) -> Any:
            keep = kept(gate, routing.thresholds[layer_idx], position_ids, routing.config.keep_first)
            for (layer, token), forced in flips.items():
                if layer == layer_idx:
                    keep = keep.masked_fill(over(position_ids == token, gate), forced)
            return keep

        with routing_override(self._model, decide):
            return run_traced(self._model, self._tokenizer, self.text)

    def _tell(self, flips: Flips, trace: RoutingTrace, cache: Bytes, at: int, after: Any) -> None:
        assert self._before is not None
        before, cache_before = self._before
        differs = trace.keep != before.keep
        for layer, token in flips:
            differs[[row for row, of in enumerate(trace.layers) if of == layer], token] = False
        with self.hold_sync():
            self._show(trace, cache)
            self.deltas = np.nan_to_num(trace.loss - before.loss).astype("<f4").tobytes()
            self.effect = {
                "loss": self.summary["loss"],
                "loss_before": None if np.isnan(before.mean_loss) else before.mean_loss,
                "kv_bytes": cache.nbytes,
                "kv_bytes_before": cache_before.nbytes,
                "others": int(differs.sum()),
                "at": at,
                "next": self._next(self._before_next[at], after),
            }

    def _next(self, before: Any, after: Any) -> list[dict[str, Any]]:
        """The likeliest tokens of both, likeliest first."""
        best = {int(i) for p in (before, after) for i in p.topk(min(NEXT, len(p))).indices}
        order = sorted(best, key=lambda i: -max(float(before[i]), float(after[i])))[:NEXT]
        return [
            {"token": self._tokenizer.decode([i]), "before": float(before[i]), "after": float(after[i])}
            for i in order
        ]


def probabilities(logits_V: Any) -> Any:
    """float32[V] on the CPU, from the logits of one token."""
    return logits_V.float().softmax(-1).cpu()
