"""Thresholds: one slider for all layers and one for each, and the way to a keep ratio or cache size."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from modlab.traces.routing_trace import RoutingTrace
from modlab.widgets.steered import SteeredView


class Thresholds(SteeredView, view="thresholds"):
    """Sliders for the thresholds of a model, with the heatmap and the figures of one text.

    Dragging previews in the browser, from the gates recorded in the last run; releasing sets the model's
    thresholds and runs the text. The Find buttons search, with real runs over `texts`, the threshold that
    keeps a share of the tokens or whose cache fits a budget.

    Args:
        model: a converted model whose gates decide. Its thresholds stay as they are left here.
        tokenizer: the model's tokenizer.
        text: what is shown.
        texts: what `calibrate` measures on; by default the text that shows, better some pages of what the
            model will read.

    Attributes:
        layer_thresholds: the p that each routed layer's slider shows.
    """

    def __init__(self, model: Any, tokenizer: Any, text: str, texts: Sequence[str] | None = None) -> None:
        super().__init__(model, tokenizer, text, texts, layer_thresholds=[0.5])

    @property
    def thresholds(self) -> dict[int, float]:
        """{layer: p} as the model has them now."""
        return dict(self._model.mod.thresholds)

    def apply(self, p: float | dict[int, float]) -> None:
        """Set one p, or {layer: p}, and run the text.

        Raises:
            ModlabError: p is below 0, or not below 1, or the layer is not routed.
        """
        self._measure(p, None)

    def _show(self, trace: RoutingTrace, cache: Any) -> None:
        with self.hold_sync():
            super()._show(trace, cache)
            self.layer_thresholds = trace.thresholds.tolist()

    def _work(self, content: dict[str, Any]) -> Any:
        if content.get("type") != "run":
            return super()._work(content)
        layers = self._trace.layers
        return lambda job: self._measure(
            {layer: float(p) for layer, p in zip(layers, content["ps"], strict=True)}, job
        )
