"""Thresholds: one slider for all layers and one for each, and the way to a keep ratio or cache size."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import traitlets as t

from modlab.cache_argument import given_cache
from modlab.errors import ModlabError
from modlab.kv_budget import INDEX_BYTES, MIB, keep_ratio_for
from modlab.trace import RoutingTrace, run_traced
from modlab.widgets.explorer import MeasuredView
from modlab.widgets.jobs import Job
from modlab.widgets.model_access import thresholds_restored_on_error, using
from modlab.widgets.page import script


class Thresholds(MeasuredView):
    """Sliders for the thresholds of a model, with the heatmap and the figures of one text.

    Dragging previews in the browser, from the gates recorded in the last run; releasing sets the model's
    thresholds and runs the text. The Calibrate buttons search, with real runs over `texts`, the threshold
    that keeps a share of the tokens or whose cache fits a budget.

    Args:
        model: a converted model. Its thresholds stay as they are left here.
        tokenizer: the model's tokenizer.
        text: what is shown.
        texts: what `calibrate` measures on; by default `text` alone, better some pages of what the model
            will read.

    Attributes:
        layer_thresholds: the p that each routed layer's slider shows.
    """

    _esm = script("thresholds")
    view = t.Unicode("thresholds").tag(sync=True)
    budget = t.Dict().tag(sync=True)  # what the fields of the KV budget begin with

    def __init__(self, model: Any, tokenizer: Any, text: str, texts: Sequence[str] | None = None) -> None:
        from modlab.measure import context_length

        self._texts = [text] if texts is None else list(texts)
        context = context_length(model)
        super().__init__(
            model, tokenizer, text, layer_thresholds=[0.5], budget={"mib": 1, "context": context}
        )
        trace = self._trace
        routed = len(trace.layers)
        dense = (trace.num_layers - routed) * trace.kv_bytes_per_token
        quarter = dense + 0.25 * routed * (trace.kv_bytes_per_token + INDEX_BYTES)
        self.budget = {"mib": float(f"{quarter * context / MIB:.3g}"), "context": context}

    @property
    def thresholds(self) -> dict[int, float]:
        """{layer: p} as the model has them now."""
        return dict(self._model.mod.thresholds)

    def apply(self, p: float | dict[int, float]) -> None:
        """Set one p, or {layer: p}, and run the text.

        Raises:
            ModlabError: p does not lie between 0 and 1, or the layer is not routed.
        """
        self._measure(p, None)

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
        from modlab.measure import calibrate

        if (keep_ratio is None) == (kv_mib is None):
            raise ModlabError(f"Give keep_ratio or kv_mib, one of them; got {keep_ratio} and {kv_mib}.")
        model = self._model
        with (
            using(model, job, "Calibrating, the text runs several times"),
            thresholds_restored_on_error(model),
        ):
            if kv_mib is not None:
                tokens = int(context or self.budget["context"])
                keep_ratio = keep_ratio_for(model, kv_mib=float(kv_mib), context=tokens)
            assert keep_ratio is not None
            calibrate(
                model,
                self._texts,
                keep_ratio=float(keep_ratio),
                per_layer=per_layer,
                tokenizer=self._tokenizer,
            )
            trace, output = run_traced(model, self._tokenizer, self._text)
            self._show(trace, given_cache(output))
        return self.thresholds

    def _show(self, trace: RoutingTrace, cache: Any) -> None:
        with self.hold_sync():
            super()._show(trace, cache)
            self.layer_thresholds = trace.thresholds.tolist()

    def _work(self, content: dict[str, Any]) -> Any:
        if content.get("type") == "run":
            layers = self._trace.layers
            return lambda job: self._measure(
                {layer: float(p) for layer, p in zip(layers, content["ps"], strict=True)}, job
            )
        if content.get("type") == "calibrate":
            return lambda job: self._calibrate(
                content.get("keep_ratio"),
                content.get("kv_mib"),
                content.get("context"),
                bool(content.get("per_layer")),
                job,
            )
        return None
