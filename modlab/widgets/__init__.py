"""Widgets for notebooks: nothing from a CDN, no extension to install.

modlab.widgets.explore(model, tokenizer, text)     the one to begin with: slider, heatmap, text, figures
RoutingHeatmap(trace), TokenText(trace), TokenPath(trace), ThresholdCurve(sweep)     one view each
CellFlip, Thresholds, Compare, Frontier            steer a model and see what it does
TrainingPanel(model, batches, config)              a training run while it goes
ClassHeatmap(aggregate)                            which kinds of tokens are kept, over a corpus

link(view, ...)                                    thresholds, marked token and text of several views

Views of the same text mark the same token. Each has `to_html()`, a page that needs no kernel.
"""

from modlab.widgets.classes import ClassHeatmap
from modlab.widgets.compare import Compare
from modlab.widgets.explorer import RoutingExplorer, explore
from modlab.widgets.flip import CellFlip
from modlab.widgets.frontier import Frontier
from modlab.widgets.linking import link
from modlab.widgets.thresholds import Thresholds
from modlab.widgets.training import TrainingPanel
from modlab.widgets.views import RoutingHeatmap, ThresholdCurve, TokenPath, TokenText

__all__ = [
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
