"""What all tests of the widgets share."""

from __future__ import annotations

import pytest

from modlab.widgets import jobs


@pytest.fixture(autouse=True)
def every_report_is_told(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """No report of a job is dropped for coming soon after another, or a fast machine would decide a test."""
    if "test_jobs" not in request.node.nodeid:
        monkeypatch.setattr(jobs, "REPORT_EVERY", 0.0)
