"""What all widgets have in common, and the views of one trace.

A class names the file of js/ that draws it, `class TokenText(TraceView, view="text")`; that file says itself
which others it uses.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import anywidget
import traitlets as t

from modlab.errors import ModlabError
from modlab.routing.threshold import check_threshold
from modlab.widgets.jobs import Jobs, answer_anywhere, state
from modlab.widgets.pictures.page import curve, html_page, payload
from modlab.widgets.pictures.script import script, styles
from modlab.widgets.pictures.trace import curve_svg, trace_svg

if TYPE_CHECKING:
    import pandas as pd

    from modlab.traces.routing_trace import RoutingTrace

_OF_JUPYTER = frozenset(anywidget.AnyWidget.class_trait_names())

VIEWS: dict[str, type[View]] = {}
"""The class of each view, by the name of its file in js/: every one that was imported so far."""


class View(anywidget.AnyWidget):
    """Base of all: a live view, a page that needs no kernel (`to_html`), a still picture for saved notebooks.

    Attributes:
        view: the file of js/ that draws it.
        can_run: whether a model stands behind the view.
        summary: what heads the view; its change tells the browser of new data.
        sought: the browser is to bring the view into sight; it says when it has.
    """

    _css = styles()
    view = ""

    summary = t.Dict({"p": 0.5}).tag(sync=True)
    can_run = t.Bool(False).tag(sync=True)
    sought = t.Bool(False).tag(sync=True)

    def __init_subclass__(cls, view: str = "", **more: Any) -> None:
        """Give the class its browser's half and its place in VIEWS.

        Args:
            view: the file of js/ that draws it. A base class has none; a subclass may keep its parent's.
        """
        if view:
            cls.view, cls._esm = view, script(view)
            VIEWS[view] = cls
        super().__init_subclass__(**more)

    def open(self) -> None:
        """Make the browser's half, as every widget does at its beginning."""
        super().open()
        answer_anywhere(self)

    def send_state(self, key: Any = None) -> None:
        """Tell the browser of traits that changed here, as every widget does."""
        super().send_state(key)
        answer_anywhere(self)

    def scroll_here(self) -> None:
        """Bring the view into sight, as soon as it is shown: while a notebook runs whole, its end is seen."""
        self.sought = True

    def to_html(self) -> str:
        """One page with everything inside (data, styles, script): opens from a file, without network."""
        values = {name: getattr(self, name) for name in self.traits(sync=True) if name not in _OF_JUPYTER}
        return html_page(self.view, {**values, **self._without_kernel()}, self._title())

    def _without_kernel(self) -> dict[str, Any]:
        """Traits that have other values on a page."""
        return {"can_run": False, "sought": False}

    def _title(self) -> str:
        return f"{type(self).__name__}, {self.summary.get('model') or 'modlab'}"

    def _svg(self) -> str:
        raise NotImplementedError

    def _repr_mimebundle_(self, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]] | None:
        """The live view, and a still picture for readers without a kernel (GitHub, nbviewer, nbconvert)."""
        bundle = super()._repr_mimebundle_(**kwargs)
        if bundle is None:
            return None
        data, metadata = bundle if isinstance(bundle, tuple) else (bundle, {})
        still = {
            "image/svg+xml": self._svg(),
            "text/plain": f"{type(self).__name__}: run the cell for the live view",
        }
        return {**data, **still}, metadata


class ModelView(View):
    """A view that computes: in a thread, one computation at a time, the latest request first.

    Attributes:
        job: what is being computed: state ("idle", "running", "failed" or "cancelled"), text, fraction
            (0..1), error, id.
    """

    job = t.Dict(state(0)).tag(sync=True)

    def __init__(self, **traits: Any) -> None:
        self._jobs = Jobs(self._publish)
        super().__init__(**{"can_run": True, **traits})
        self.on_msg(self._on_message)

    def wait(self, timeout: float | None = None) -> bool:
        """Until the computation in progress is over; raises what it failed with.

        Args:
            timeout: seconds; None waits as long as it takes.

        Returns:
            False if the time ran out.
        """
        return self._jobs.wait(timeout)

    def cancel(self) -> None:
        """Stop the computation in progress; what shows is the state before."""
        self._jobs.cancel()

    def _publish(self, new: dict[str, Any]) -> None:
        self.job = new

    def _on_message(self, _: Any, content: dict[str, Any], __: Any) -> None:
        if content.get("type") == "cancel":
            self.cancel()
            return
        work = self._work(content)
        if work is not None:
            self._jobs.start(work, int(content.get("id", 0)), self._failure(content))

    def _work(self, content: dict[str, Any]) -> Any:
        """What to do about a message of the browser: a function of the job, or None for nothing."""
        raise NotImplementedError

    def _failure(self, content: dict[str, Any]) -> str:
        return "This failed; what shows is the state before."

    def _without_kernel(self) -> dict[str, Any]:
        return {**super()._without_kernel(), "job": state(0)}


class _Routed(View):
    """Traits of js/store.js. Gates go to the browser once; threshold and cursor move there without Python."""

    tokens = t.List(t.Unicode()).tag(sync=True)
    gates = t.Bytes(b"").tag(sync=True)  # page.gate_bytes
    fine = t.Bytes(b"").tag(sync=True)  # page.fine_values
    losses = t.Bytes(b"").tag(sync=True)  # float32[T]
    layers = t.List(t.Int()).tag(sync=True)
    num_layers = t.Int(0).tag(sync=True)
    keep_first = t.Int(0).tag(sync=True)
    threshold = t.Float(0.5).tag(sync=True, echo_update=False)  # an echo would undo a drag in progress
    layer_thresholds = t.List(t.Float()).tag(sync=True, echo_update=False)  # one a row; empty: `threshold`
    group = t.Unicode("").tag(sync=True)
    cursor = t.Int(-1).tag(sync=True)
    locked = t.Bool(False).tag(sync=True)
    layer = t.Int(-1).tag(sync=True)
    points = t.List(t.Dict()).tag(sync=True)  # page.curve
    runs = t.List(t.Dict()).tag(sync=True)  # the real runs of an explorer, as points

    @t.validate("threshold")
    def _check_threshold(self, proposal: Any) -> float:
        return check_threshold(proposal["value"])

    def _without_kernel(self) -> dict[str, Any]:
        return {**super()._without_kernel(), "cursor": -1, "locked": False, "layer": -1}


class TraceView(_Routed):
    """A view of one trace.

    Attributes:
        threshold: the p that is shown, four decimals; a preview unless it is the one of the run.
        group: views with the same group, by default those of the same text, mark the same token, wherever
            they are on the page. "" is for a view alone.
        cursor: index of the token that is marked, -1 for none; Python hears of it once it is locked.
        locked: whether a click holds the token; Escape frees it.
        layer: the layer that colours the text, -1 for the number of layers that keep a token.
    """

    def __init__(self, trace: RoutingTrace, **traits: Any) -> None:
        self._trace = trace
        super().__init__(**{**payload(trace), **traits})

    @property
    def trace(self) -> RoutingTrace:
        """The trace that is shown."""
        return self._trace

    def show(self, trace: RoutingTrace) -> None:
        """Show another trace instead of this one."""
        self._trace = trace
        new = payload(trace)
        # A number that always differs: the summary is what tells the browser of new data.
        new["summary"]["run"] = self.summary.get("run", 0) + 1
        with self.hold_sync():
            self.cursor, self.locked = -1, False
            for name, value in new.items():
                setattr(self, name, value)

    def _svg(self) -> str:
        return trace_svg(self._trace)

    def _title(self) -> str:
        return f"Routing of {len(self._trace.tokens):,} tokens, {self._trace.model or 'model'}"


class RoutingHeatmap(TraceView, view="heatmap"):
    """Tokens by layers on a canvas: full cells were kept, thin lines were not, colour is the gate.

    Zoom with + and -, 0 for all tokens, or Ctrl and the wheel.
    """


class TokenText(TraceView, view="text"):
    """The text, each token coloured by how many routed layers keep it, or by the decision of one layer."""


class TokenPath(TraceView, view="path"):
    """One token through the depth: which layers it ran, its gate in each, what it left in the cache."""


class ThresholdCurve(_Routed, view="curve"):
    """K/V bytes and loss against the threshold, from the frame of `modlab.sweep`, with a marker at p."""

    def __init__(self, sweep: pd.DataFrame, p: float = 0.5, **traits: Any) -> None:
        points = curve(sweep)
        if len(points) < 2:
            raise ModlabError(f"A curve needs two thresholds or more; the sweep has {len(points)}.")
        super().__init__(**{"points": points, "threshold": p, **traits})

    def _svg(self) -> str:
        return curve_svg(self.points)
