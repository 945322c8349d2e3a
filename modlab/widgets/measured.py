"""MeasuredView: a view of one text and one model, which runs it at other thresholds, or runs another text."""

from __future__ import annotations

from typing import Any

import traitlets as t

from modlab.data.pieces import as_text, encode
from modlab.hf.model import context_length
from modlab.hf.names import given_cache
from modlab.traces.routing_trace import RoutingTrace
from modlab.traces.run import run_traced
from modlab.widgets.jobs import Job
from modlab.widgets.model_access import trained_for, using
from modlab.widgets.pictures.page import MAX_TOKENS, group_of, payload, summary
from modlab.widgets.views import ModelView, TraceView


class MeasuredView(TraceView, ModelView):
    """A view of one text and one model.

    Attributes:
        text: what is shown. `set_text` changes it, and so does the box in the widget.
        text_note: what the reader should know of it: that only its beginning is shown.
    """

    text = t.Unicode("", read_only=True)  # stays in Python: the browser has its tokens
    text_note = t.Unicode("").tag(sync=True)

    def __init__(self, model: Any, tokenizer: Any, text: str, **traits: Any) -> None:
        self._model, self._tokenizer = model, tokenizer
        text = as_text(tokenizer, text)
        with using(model):
            trace, output = run_traced(model, tokenizer, text)
        super().__init__(trace, **traits)
        self.set_trait("text", text)
        self._show(trace, given_cache(output))
        self._refine(None)

    def set_text(self, text: str) -> None:
        """Show another text; the run goes on in the background, `wait()` waits for it.

        A text that is longer than the model's context is cut at its end, and `text_note` says so.
        """
        self._jobs.start(lambda job: self._change_text(text, job), failure=_TEXT_FAILED)

    def _change_text(self, text: str, job: Job | None) -> None:
        with using(self._model, job, "Running the text"):
            shown, note = fitting(self._model, self._tokenizer, as_text(self._tokenizer, text))
            trace, output = run_traced(self._model, self._tokenizer, shown)
            if job is not None:
                job.check()
            with self.hold_sync():
                self.cursor, self.locked, self.text_note = -1, False, note
                if self.group == group_of(self._trace):  # else its maker chose another one
                    self.group = group_of(trace)
                self._take(trace, output)
                self.set_trait("text", shown)
        self._refine(job)

    def _take(self, trace: RoutingTrace, output: Any) -> None:
        """Show the first run of another text; what belonged to the text before is forgotten."""
        self._show(trace, given_cache(output))

    def _measure(self, p: float | dict[int, float], job: Job | None) -> None:
        """Set the thresholds, run the text, show what was measured."""
        from modlab.routing.state import set_threshold, thresholds_restored_on_error

        with using(self._model, job, "Running the text"), thresholds_restored_on_error(self._model):
            set_threshold(self._model, p)
            trace, output = run_traced(self._model, self._tokenizer, self.text)
            self._show(trace, given_cache(output))
        self._refine(job)

    def _refine(self, job: Job | None) -> None:
        """What else is worth a run, once the text is on the page."""

    def _show(self, trace: RoutingTrace, cache: Any) -> None:
        measured = {**summary(trace, cache.nbytes, cache.dense_nbytes), **self._known()}
        # A number that always differs, so that a second run at the same p is seen as news too.
        measured["run"] = self.summary.get("run", 0) + 1
        self._trace = trace
        with self.hold_sync():
            for name, value in payload(trace).items():
                if name not in ("group", "summary"):  # the group may be another one; the summary is told last
                    setattr(self, name, value)
            if self.layer_thresholds:
                self.layer_thresholds = measured["ps"]
            self.summary = measured

    def _known(self) -> dict[str, Any]:
        """More for the summary, known before the run."""
        return {"trained": trained_for(self._model)}

    def _work(self, content: dict[str, Any]) -> Any:
        if content.get("type") != "text":
            return None
        return lambda job: self._change_text(str(content["text"]), job)

    def _failure(self, content: dict[str, Any]) -> str:
        return _TEXT_FAILED if content.get("type") == "text" else super()._failure(content)


_TEXT_FAILED = "This text could not be run; what shows is the text before."


def fitting(model: Any, tokenizer: Any, text: str) -> tuple[str, str]:
    """The text, or as much of its beginning as model and views take, and a note that says what was cut.

    Raises:
        ModlabError: the text is empty.
    """
    context = context_length(model)
    limit = min(context or MAX_TOKENS, MAX_TOKENS)
    pieces = encode(tokenizer, text)[1]
    if len(pieces) <= limit:
        return text, ""
    count, keep = len(pieces), limit
    while (count := len(encode(tokenizer, part := "".join(pieces[:keep]))[0])) > limit:
        keep -= count - limit  # cut elsewhere, a text may have more tokens
    why = "this model reads no more" if limit == context else "the views draw no more"
    return part, f"These are the first {count:,} of {len(pieces):,} tokens: {why}."
