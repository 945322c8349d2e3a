"""Views that move together: thresholds in the browser, the marked token, and the text."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

from modlab.widgets.measured import MeasuredView


class TextLink:
    """Views that follow the text of those among them that run one. `unlink` ends it.

    A view with a model runs the new text on its own model; one of a trace shows the other's trace.
    """

    def __init__(self, *views: Any) -> None:
        self.views = views
        for view in self._sources():
            view.observe(self._follow, "text")

    def unlink(self) -> None:
        """Every view has its own text from now on."""
        for view in self._sources():
            view.unobserve(self._follow, "text")

    def _sources(self) -> list[MeasuredView]:
        return [view for view in self.views if isinstance(view, MeasuredView)]

    def _follow(self, change: Any) -> None:
        source = change.owner
        for view in self.views:
            if view is source:
                continue
            if not isinstance(view, MeasuredView):
                view.show(source.trace)
            elif view.text != source.text:
                view.set_text(source.text)
            view.group = source.group


def link(*widgets: Any, thresholds: bool = True) -> list[Any]:
    """Let widgets move together: their thresholds, in the browser, their marked token, and their text.

    Views of the same text share the marked token without this.

    Args:
        widgets: views of traces, or of a text and a model. A text that is put into one of the latter is
            shown by all.
        thresholds: whether a slider of one moves the others.

    Returns:
        the links; `unlink()` of one ends it.
    """
    from ipywidgets import jslink

    for widget in widgets[1:]:
        widget.group = widgets[0].group
    links: list[Any] = []
    if thresholds:
        links += [jslink((a, "threshold"), (b, "threshold")) for a, b in pairwise(widgets)]
    if any(isinstance(widget, MeasuredView) for widget in widgets):
        links.append(TextLink(*widgets))
    return links
