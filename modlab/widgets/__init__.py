"""Widgets for notebooks: nothing from a CDN, no extension to install.

modlab.widgets.explore(model, tokenizer, text)     the one to begin with: slider, heatmap, text, figures
RoutingHeatmap(trace), TokenText(trace), TokenPath(trace), ThresholdCurve(sweep)     one view each
CacheView(model, tokenizer, text)                  the cache by layer and KV head, while text is written
CellFlip, Thresholds, Compare, Frontier            steer a model and see what it does
TrainingPanel(model, batches, config)              a training run while it goes
ClassHeatmap(aggregate)                            which kinds of tokens are kept, over a corpus

link(view, ...)                                    thresholds, marked token and text of several views

Views of the same text mark the same token. Each has `to_html()`, a page that needs no kernel.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from modlab.widgets.cache_view import CacheView
    from modlab.widgets.classes import ClassHeatmap
    from modlab.widgets.compare import Compare
    from modlab.widgets.explorer import RoutingExplorer, explore
    from modlab.widgets.flip import CellFlip
    from modlab.widgets.frontier import Frontier
    from modlab.widgets.linking import link
    from modlab.widgets.thresholds import Thresholds
    from modlab.widgets.training import TrainingPanel
    from modlab.widgets.views import RoutingHeatmap, ThresholdCurve, TokenPath, TokenText

# public name -> the module that holds it: loaded when asked for, so that `pictures` needs no widget library
_HOME = {
    "CacheView": "cache_view",
    "CellFlip": "flip",
    "ClassHeatmap": "classes",
    "Compare": "compare",
    "Frontier": "frontier",
    "RoutingExplorer": "explorer",
    "RoutingHeatmap": "views",
    "ThresholdCurve": "views",
    "Thresholds": "thresholds",
    "TokenPath": "views",
    "TokenText": "views",
    "TrainingPanel": "training",
    "explore": "explorer",
    "link": "linking",
}

__all__ = [
    "CacheView",
    "CellFlip",
    "ClassHeatmap",
    "Compare",
    "Frontier",
    "RoutingExplorer",
    "RoutingHeatmap",
    "ThresholdCurve",
    "Thresholds",
    "TokenPath",
    "TokenText",
    "TrainingPanel",
    "explore",
    "link",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
