"""ClassHeatmap: which classes of tokens, and which positions, each routed layer keeps."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import traitlets as t

from modlab.traces.token_classes import CLASSES
from modlab.widgets.pictures.panels import classes_svg
from modlab.widgets.views import View

if TYPE_CHECKING:
    import pandas as pd

    from modlab.traces.aggregate import RoutingAggregate


class ClassHeatmap(View, view="classes"):
    """Keep ratio of each routed layer by class of token and by position, with counts.

    Args:
        aggregate: of `modlab.aggregate_routing`.
        bins: at most so many ranges of positions.
    """

    layers = t.List(t.Int()).tag(sync=True)
    classes = t.List(t.Dict()).tag(sync=True)
    positions = t.List(t.Dict()).tag(sync=True)

    def __init__(self, aggregate: RoutingAggregate, bins: int = 12) -> None:
        self.aggregate = aggregate
        examples = dict(zip(CLASSES, aggregate.examples, strict=False))
        by_class = aggregate.by_class().sort_values("tokens", ascending=False)
        super().__init__(
            layers=[int(i) for i in aggregate.layers],
            classes=_rows(by_class, examples),
            positions=_rows(aggregate.by_position(bins), {}),
            summary={
                "model": aggregate.model,
                "tokens": aggregate.tokens,
                "texts": aggregate.texts,
                "keep_ratio": aggregate.keep_ratio,
            },
        )

    def _svg(self) -> str:
        return classes_svg(self.layers, self.classes, self.positions)


def _rows(frame: pd.DataFrame, examples: dict[str, list[str]]) -> list[dict[str, Any]]:
    layers = [name for name in frame.columns if name.startswith("layer_")]
    return [
        {
            "name": str(name),
            "tokens": int(row["tokens"]),
            "kept": [float(row[layer]) if row["tokens"] else None for layer in layers],
            "examples": " ".join(repr(token)[1:-1] for token in examples.get(str(name), [])),
        }
        for name, row in frame.iterrows()
    ]
