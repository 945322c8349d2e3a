"""SteeredView: thresholds found for a keep ratio or a memory budget, and losses to compare with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import traitlets as t

from modlab.cache.stored import MIB, index_bytes, keep_ratio_for, recent_share
from modlab.errors import ModlabError
from modlab.hf.names import given_cache
from modlab.traces.routing_trace import RoutingTrace
from modlab.traces.run import run_traced
from modlab.widgets.jobs import Job
from modlab.widgets.measured import MeasuredView
from modlab.widgets.model_access import using
from modlab.widgets.pictures.words import words
from modlab.widgets.yardsticks import Yardstick, token_losses


class SteeredView(MeasuredView):
    """A view whose text says what a threshold costs: against a dense model, against everything kept, and for
    a wanted cache size. A model in which no gate decides is refused.

    Attributes:
        budget: what the fields of the KV budget begin with, the bytes of a token in each dense and in each
            routed layer, and whether thresholds are looked for on a sample instead of the text.
    """

    budget = t.Dict().tag(sync=True)

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        text: str,
        texts: Sequence[str] | None = None,
        dense: Any = None,
        **traits: Any,
    ) -> None:
        from modlab.routing.state import gated_routing_of

        gated_routing_of(model)
        self._texts = texts if texts is None else list(texts)
        self._dense = dense
        self._open: Yardstick | None = None  # the text with everything kept
        self._control: Yardstick | None = None  # the text in the dense model
        super().__init__(model, tokenizer, text, **traits)
        self.budget = self._budget()

    def _budget(self) -> dict[str, Any]:
        """What `budget` holds for the present model: at first, the cache of a quarter of the tokens."""
        from modlab.hf.model import context_length
        from modlab.measure import TEXT_PIECE

        trace, context = self._trace, context_length(self._model) or TEXT_PIECE
        routed, each, stored = len(set(trace.layers)), trace.kv_bytes_per_token, trace.stored_bytes_per_token
        dense = (trace.num_layers - routed) * each
        index = index_bytes(self._model.mod)
        quarter = dense + 0.25 * routed * (stored + index)
        return {
            "mib": float(f"{quarter * context / MIB:.3g}"),
            "context": context,
            "token_bytes": words(trace.skip)["saves"] * each,
            "stored_bytes": words(trace.skip)["saves"] * stored,
            "index_bytes": index,
            "sample": self._texts is not None,
        }

    def calibrate(
        self,
        *,
        keep_ratio: float | None = None,
        kv_mib: float | None = None,
        context: int | None = None,
        per_layer: bool = False,
    ) -> dict[int, float]:
        """Find and set the thresholds for a keep ratio, or for a cache of `kv_mib` MiB at `context` tokens.

        Args:
            keep_ratio: mean share of tokens kept in the routed layers.
            kv_mib: instead of it, MiB for keys and values.
            context: tokens that have to fit in them; by default the model's context.
            per_layer: every layer keeps the same share, with its own p.

        Returns:
            {layer: p}.

        Raises:
            ModlabError: not reachable; the message says what is.
        """
        return self._calibrate(keep_ratio, kv_mib, context, per_layer, None)

    def _calibrate(
        self,
        keep_ratio: float | None,
        kv_mib: float | None,
        context: int | None,
        per_layer: bool,
        job: Job | None,
    ) -> dict[int, float]:
        from modlab.routing.state import thresholds_restored_on_error

        if (keep_ratio is None) == (kv_mib is None):
            raise ModlabError(f"Give keep_ratio or kv_mib, one of them; got {keep_ratio} and {kv_mib}.")
        model = self._model
        with (
            using(model, job, "Looking for the threshold, the text runs several times"),
            thresholds_restored_on_error(model),
        ):
            if kv_mib is not None:
                tokens = self.budget["context"] if context is None else context
                keep_ratio = self._fitting_ratio(kv_mib, tokens)
            self._search(keep_ratio, per_layer)
            trace, output = run_traced(model, self._tokenizer, self.text)
            self._show(trace, given_cache(output))
        self._refine(job)
        return dict(model.mod.thresholds)

    def _fitting_ratio(self, kv_mib: Any, context: Any) -> float:
        """The keep ratio at which the cache of so many tokens takes `kv_mib` MiB, or an error for people."""
        if not _above_zero(kv_mib) or not _above_zero(context) or context < 1:
            raise ModlabError(
                "Say how many MiB the KV cache may take, and for how many tokens, both above 0."
            )
        try:
            return keep_ratio_for(self._model, kv_mib=float(kv_mib), context=int(context))
        except ModlabError as error:
            if not self.budget["token_bytes"]:
                raise
            least, most = self._limits(int(context))
            raise ModlabError(
                f"A KV cache of {int(context):,} tokens takes between {least:.4g} MiB, with nothing kept in "
                f"the routed layers, and {most:.4g} MiB, with everything kept: {float(kv_mib):g} MiB lie "
                "outside. Ask for a size in between, or for another number of tokens."
            ) from error

    def _limits(self, context: int) -> tuple[float, float]:
        """MiB of the cache of `context` tokens with nothing kept in the routed layers, and with all kept."""
        routing, each = self._model.mod, self.budget["token_bytes"]
        routed = len(routing.layers)
        dense = context * each * (routing.num_layers - routed)
        ragged = context * (self.budget["stored_bytes"] + self.budget["index_bytes"]) * routed
        recent = recent_share(routing.config, context)
        return (dense + recent * ragged) / MIB, (dense + ragged) / MIB

    def _search(self, keep_ratio: Any, per_layer: bool) -> None:
        """Set the thresholds that keep this share of the text (or of the sample), or an error for people."""
        from modlab.measure import calibrate

        where = "this text" if self._texts is None else "the sample"
        if not _above_zero(keep_ratio) or keep_ratio >= 1:
            raise ModlabError(f"Say which share of {where} is to be kept: above 0 %, below 100 %.")
        try:
            calibrate(
                self._model,
                [self.text] if self._texts is None else self._texts,
                keep_ratio=float(keep_ratio),
                per_layer=per_layer,
                tokenizer=self._tokenizer,
            )
        except ModlabError as error:
            raise ModlabError(
                f"No threshold keeps about {keep_ratio:.0%} of {where}. Gates that are all alike cannot be "
                "told apart: ask for another share, use a longer text, or train the routers first."
            ) from error

    def _take(self, trace: RoutingTrace, output: Any) -> None:
        self._open = self._control = None
        super()._take(trace, output)

    def _show(self, trace: RoutingTrace, cache: Any) -> None:
        if trace.kv_cache_dtype == self._trace.kv_cache_dtype:
            super()._show(trace, cache)
            return
        # A cell may have changed it: what is compared with was measured the other way.
        self._open = None
        with self.hold_sync():
            super()._show(trace, cache)
            self.budget = self._budget()

    def _refine(self, job: Job | None) -> None:
        """Run the text with everything kept, and in the dense model: what its loss is compared with."""
        if self._open is not None:
            return
        with using(self._model, job, "Running the text with everything kept"):
            opened = Yardstick(_predicted(self._at_rest()[0]), np.empty(0))
        if self._dense is not None:
            with using(self._dense, job, "Running the text in the dense model"):
                self._control = Yardstick(token_losses(self._dense, self._tokenizer, self.text), np.empty(0))
        self._open = opened
        self._tell_known()

    def _tell_known(self) -> None:
        self.summary = {**self.summary, **self._known(), "run": self.summary["run"] + 1}

    def _all_kept(self) -> Any:
        """A block in which everything is kept."""
        from modlab.routing.state import routing_override

        return routing_override(self._model, _keep_all)

    def _at_rest(self) -> Any:
        """(trace, output) of the text with everything kept."""
        with self._all_kept():
            return run_traced(self._model, self._tokenizer, self.text)

    def _known(self) -> dict[str, Any]:
        known = super()._known()
        for name, found in (("open", self._open), ("dense", self._control)):
            if found is not None and not np.isnan(found.loss):
                known[f"{name}_loss"] = found.loss
            if found is not None and not np.isnan(found.recall):
                known[f"{name}_recall"] = found.recall
        return known

    def _work(self, content: dict[str, Any]) -> Any:
        if content.get("type") != "calibrate":
            return super()._work(content)
        # An empty field of the page is None here, and no number that can be found.
        ratio, mib = (content.get(n, 0) or 0 if n in content else None for n in ("keep_ratio", "kv_mib"))
        context, per_layer = content.get("context"), bool(content.get("per_layer"))
        return lambda job: self._calibrate(ratio, mib, context, per_layer, job)


def _above_zero(value: Any) -> bool:
    """Whether it is a number above 0; an empty field of the page is None."""
    return isinstance(value, (int, float)) and 0 < value < float("inf")


def _predicted(trace: RoutingTrace) -> Any:
    """float64[T - 1]: the loss of each token but the first."""
    return trace.loss[1:].astype(np.float64)


def _keep_all(layer_idx: int, gate: Any, position_ids: Any) -> Any:
    return gate.new_ones(gate.shape).bool()
