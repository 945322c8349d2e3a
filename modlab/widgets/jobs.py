"""Work behind a widget: in a thread, the latest request first, with progress, stoppable, its errors shown.

A widget's callback must come back at once: in some front ends it runs in the kernel's only thread, where the
message that stops a computation would wait for the computation's end.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

from modlab.errors import ModlabError

REPORT_EVERY = 0.1  # seconds between two messages of one job

Work = Callable[["Job"], None]


class Cancelled(Exception):
    """The computation was stopped, or a newer request took its place."""


class Job:
    """One computation in progress: it tells how far it is, and learns that it is no longer wanted."""

    def __init__(self, number: int, publish: Callable[[dict[str, Any]], None]) -> None:
        self.number = number
        self._publish = publish
        self._stop = threading.Event()
        self._told = 0.0

    def cancel(self) -> None:
        """Ask it to end at its next `report` or `check`."""
        self._stop.set()

    def check(self) -> None:
        """Raises Cancelled if the result is no longer wanted."""
        if self._stop.is_set():
            raise Cancelled

    def report(self, text: str, fraction: float = 0.0) -> None:
        """Tell what is being done and how much of it is behind, in 0..1; too frequent reports are dropped.

        Raises:
            Cancelled: the result is no longer wanted.
        """
        self.check()
        now = time.monotonic()
        if now - self._told >= REPORT_EVERY:
            self._told = now
            self._publish(state(self.number, "running", text, fraction))


def state(
    number: int, name: str = "idle", text: str = "", fraction: float = 0.0, error: str = ""
) -> dict[str, Any]:
    """What the browser is told of a job; js/job.js reads it."""
    return {"id": number, "state": name, "text": text, "fraction": float(fraction), "error": error}


class Jobs:
    """At most one job at a time; a new one stops the one before.

    Args:
        publish: called, from the job's thread, with each new `state`.
    """

    def __init__(self, publish: Callable[[dict[str, Any]], None]) -> None:
        self._publish = publish
        self._changed = threading.Condition()
        self._next: tuple[Work, Job, str] | None = None
        self._current: Job | None = None
        self._busy = False
        self._number = 0
        self._error: BaseException | None = None

    def start(self, work: Work, number: int | None = None, failure: str = "") -> None:
        """Run `work(job)` in the background.

        Args:
            number: the browser's number of this request; by default the next one.
            failure: a sentence to begin an error message with.
        """
        with self._changed:
            self._number = max(self._number + 1, number or 0)
            job = Job(self._number if number is None else number, self._publish)
            self._next = (work, job, failure)
            self._error = None
            if self._current is not None:
                self._current.cancel()
            if not self._busy:
                self._busy = True
                threading.Thread(target=self._loop, name="modlab", daemon=True).start()

    def cancel(self) -> None:
        """Stop what is running or waiting."""
        with self._changed:
            if self._next is not None:
                self._next[1].cancel()
            if self._current is not None:
                self._current.cancel()

    def wait(self, timeout: float | None = None) -> bool:
        """Until nothing runs. Raises what the last job failed with; False if `timeout` seconds passed."""
        try:
            with self._changed:
                done = self._changed.wait_for(lambda: not self._busy, timeout)
                error, self._error = self._error, None
        except KeyboardInterrupt:
            self.cancel()
            raise
        if done and error is not None:
            raise error
        return done

    def _loop(self) -> None:
        while True:
            with self._changed:
                if self._next is None:
                    self._busy = False
                    self._changed.notify_all()
                    return
                (work, job, failure), self._next = self._next, None
                self._current = job
            ended = self._run(work, job, failure)
            with self._changed:
                self._current = None
                followed = self._next is not None
            if not followed or ended["state"] == "failed":
                self._publish(ended)

    def _run(self, work: Work, job: Job, failure: str) -> dict[str, Any]:
        try:
            job.check()
            self._publish(state(job.number, "running"))
            work(job)
        except Cancelled:
            return state(job.number, "cancelled")
        except Exception as problem:
            with self._changed:
                self._error = problem
            # Nobody sees an exception in a thread: the widget shows it.
            return state(job.number, "failed", error=f"{failure}\n{_said(problem)}".strip())
        return state(job.number)


def _said(problem: Exception) -> str:
    """An error for a reader of the page: ours are sentences; of others the kind helps to find the cause."""
    return str(problem) if isinstance(problem, ModlabError) else f"{type(problem).__name__}: {problem}"


def answer_anywhere(widget: Any) -> None:
    """Leave it to the front end in which of the kernel's shells this widget's messages are handled.

    JupyterLab asks for another shell than the main one, so that a slider answers while a cell runs. But
    ipykernel 7.4 ties a widget to the shell that spoke last to the browser, at first the main one, in which
    a waiting cell would keep the Stop button waiting, too. Other versions have no such tie: nothing is done.
    """
    if widget.comm is not None:
        vars(widget.comm).pop("_reply_subshell_id", None)
