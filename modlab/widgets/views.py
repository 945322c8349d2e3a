"""The single views. All share one script (js/) and one set of traits; `view` says which of them is drawn."""

from __future__ import annotations

import base64
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import anywidget
import traitlets as t

from modlab.errors import ModlabError
from modlab.widgets.page import curve, payload, script, styles
from modlab.widgets.still import curve_png, heatmap_png

if TYPE_CHECKING:
    import pandas as pd

    from modlab.trace import RoutingTrace


class View(anywidget.AnyWidget):
    """Base of all: what the browser knows. Gates go there once; threshold and cursor move without Python.

    Attributes:
        threshold: the p that is shown, four decimals; a preview unless it is the one of the run.
        cursor: index of the token under the mouse or locked by a click, -1 for none.
        layer: the layer that colours the text, -1 for the number of layers that keep a token.
    """

    _esm = script()
    _css = styles()

    view = t.Unicode("").tag(sync=True)
    tokens = t.List(t.Unicode()).tag(sync=True)
    gates = t.Bytes(b"").tag(sync=True)  # page.gate_bytes
    losses = t.Bytes(b"").tag(sync=True)  # float32[T]
    layers = t.List(t.Int()).tag(sync=True)
    num_layers = t.Int(0).tag(sync=True)
    keep_first = t.Int(0).tag(sync=True)
    threshold = t.Float(0.5).tag(sync=True, echo_update=False)  # an echo would undo a drag in progress
    cursor = t.Int(-1).tag(sync=True)
    layer = t.Int(-1).tag(sync=True)
    summary = t.Dict({"p": 0.5}).tag(sync=True)  # page.summary; its change tells the browser of new gates
    points = t.List(t.Dict()).tag(sync=True)  # page.curve
    runs = t.List(t.Dict()).tag(sync=True)  # the real runs of an explorer, as points
    can_run = t.Bool(False).tag(sync=True)
    status = t.Dict().tag(sync=True)

    @t.validate("threshold")
    def _check_threshold(self, proposal: Any) -> float:
        p = float(proposal["value"])
        if not 0 < p < 1:
            raise ModlabError(f"A threshold p lies between 0 and 1, both excluded; got {p}.")
        return p

    def _png(self) -> bytes:
        raise NotImplementedError

    def _repr_mimebundle_(self, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]] | None:
        """The live view, and a still picture for readers without a kernel (GitHub, an untrusted notebook)."""
        bundle = super()._repr_mimebundle_(**kwargs)
        if bundle is None:
            return None
        data, metadata = bundle if isinstance(bundle, tuple) else (bundle, {})
        png = base64.b64encode(self._png()).decode("ascii")
        still = {"image/png": png, "text/plain": f"{type(self).__name__}: run the cell for the live view"}
        return {**data, **still}, metadata


class _TraceView(View):
    def __init__(self, trace: RoutingTrace, **traits: Any) -> None:
        self._trace = trace
        super().__init__(**{**payload(trace), **traits})

    @property
    def trace(self) -> RoutingTrace:
        """The trace that is shown."""
        return self._trace

    def _png(self) -> bytes:
        return heatmap_png(self._trace)


class RoutingHeatmap(_TraceView):
    """Tokens by layers on a canvas: full cells ran, thin lines passed by, colour is the gate."""

    view = t.Unicode("heatmap").tag(sync=True)


class TokenText(_TraceView):
    """The text, each token coloured by how many routed layers keep it, or by the decision of one layer."""

    view = t.Unicode("text").tag(sync=True)


class ThresholdCurve(View):
    """K/V bytes and loss against the threshold, from the frame of `modlab.sweep`, with a marker at p."""

    view = t.Unicode("curve").tag(sync=True)

    def __init__(self, sweep: pd.DataFrame, p: float = 0.5, **traits: Any) -> None:
        points = curve(sweep)
        if len(points) < 2:
            raise ModlabError(f"A curve needs two thresholds or more; the sweep has {len(points)}.")
        super().__init__(**{"points": points, "threshold": p, **traits})

    def _png(self) -> bytes:
        return curve_png(self.points)


def link(*widgets: View) -> list[Any]:
    """Let threshold, cursor and chosen layer of the widgets move together, in the browser.

    Returns:
        the links; `unlink()` of one ends it.
    """
    from ipywidgets import jslink

    names = ("threshold", "cursor", "layer")
    return [jslink((a, name), (b, name)) for a, b in pairwise(widgets) for name in names]
