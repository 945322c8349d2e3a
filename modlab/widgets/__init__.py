"""Views of a routing trace for notebooks: small widgets, nothing from a CDN, no extension to install.

modlab.widgets.explore(model, tokenizer, text)     the one to begin with: slider, heatmap, text, figures
RoutingHeatmap(trace), TokenText(trace), ThresholdCurve(sweep), and link(...) to move them together
"""

from modlab.widgets.explorer import RoutingExplorer, explore
from modlab.widgets.views import RoutingHeatmap, ThresholdCurve, TokenText, link

__all__ = ["RoutingExplorer", "RoutingHeatmap", "ThresholdCurve", "TokenText", "explore", "link"]
