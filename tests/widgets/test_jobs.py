"""Work behind a widget: the latest request wins, it can be stopped, its errors come back."""

import threading
from typing import Any

import pytest

from modlab.widgets.jobs import Cancelled, Job, Jobs


@pytest.fixture
def told() -> list[dict[str, Any]]:
    return []


@pytest.fixture
def jobs(told: list[dict[str, Any]]) -> Jobs:
    return Jobs(told.append)


def test_a_job_runs_elsewhere_and_ends_idle(jobs: Jobs, told: list[dict[str, Any]]) -> None:
    threads: list[str] = []
    jobs.start(lambda job: threads.append(threading.current_thread().name), 7)
    assert jobs.wait(10)
    assert threads == ["modlab"] and [(t["id"], t["state"]) for t in told] == [(7, "running"), (7, "idle")]


def waits(entered: threading.Event) -> Any:
    """Work that goes on until it is cancelled."""

    def work(job: Job) -> None:
        entered.set()
        for _ in range(1000):
            job.check()
            threading.Event().wait(0.01)

    return work


def test_cancel_ends_it(jobs: Jobs, told: list[dict[str, Any]]) -> None:
    entered = threading.Event()
    jobs.start(waits(entered))
    assert entered.wait(10)
    jobs.cancel()
    assert jobs.wait(10) and told[-1]["state"] == "cancelled"


def test_the_latest_request_wins(jobs: Jobs, told: list[dict[str, Any]]) -> None:
    entered, done = threading.Event(), []
    jobs.start(waits(entered), 1)
    assert entered.wait(10)
    for number in (2, 3, 4):
        jobs.start(lambda job, number=number: done.append(number), number)
    assert jobs.wait(10)
    assert done == [4] and told[-1]["id"] == 4 and told[-1]["state"] == "idle"
    assert not [t for t in told if t["state"] == "cancelled"]  # never idle or cancelled between two


def test_errors_are_shown_and_raised(jobs: Jobs, told: list[dict[str, Any]]) -> None:
    jobs.start(lambda job: 1 // 0, failure="The picture stays.")
    with pytest.raises(ZeroDivisionError):
        jobs.wait(10)
    assert told[-1]["state"] == "failed"
    assert told[-1]["error"].startswith("The picture stays.\nZeroDivisionError")
    jobs.start(lambda job: None)
    assert jobs.wait(10) and told[-1]["error"] == ""


def test_reports_do_not_flood(jobs: Jobs, told: list[dict[str, Any]]) -> None:
    jobs.start(lambda job: [job.report("step", i / 5000) for i in range(5000)] and None)
    assert jobs.wait(30)
    assert len([t for t in told if t["text"] == "step"]) < 100 and told[1]["text"] == "step"


def test_wait_tells_a_timeout(jobs: Jobs) -> None:
    entered = threading.Event()
    jobs.start(waits(entered))
    assert entered.wait(10) and jobs.wait(0.05) is False
    jobs.cancel()
    assert jobs.wait(10)


def test_cancelled_before_it_began(jobs: Jobs) -> None:
    job = Job(1, lambda state: None)
    job.cancel()
    with pytest.raises(Cancelled):
        job.report("never")
