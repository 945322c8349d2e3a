"""A run's clock, on seconds that the test counts."""

from __future__ import annotations

import pytest

from modlab.training.clock import Clock


class Seconds:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def started(minutes: float | None = None) -> tuple[Clock, Seconds]:
    seconds = Seconds()
    clock = Clock(minutes, now=seconds)
    seconds.now += 50  # set-up is not training
    clock.start(tokens=1000)
    return clock, seconds


def test_seconds_are_of_the_training_alone() -> None:
    clock, seconds = started()
    seconds.now += 10
    assert clock.seconds == 10
    with clock.paused():
        seconds.now += 7
    assert clock.seconds == 10
    with clock.not_training():
        seconds.now += 5
    assert clock.seconds == 15


def test_speed_leaves_out_what_is_not_training() -> None:
    clock, seconds = started()
    seconds.now += 10
    with clock.paused():
        seconds.now += 7
    with clock.not_training():
        seconds.now += 5
    assert clock.tokens_per_second(1500) == pytest.approx(50)
    clock.set_mark(1500)
    seconds.now += 4
    assert clock.tokens_per_second(1700) == pytest.approx(50)


def test_the_first_step_takes_nothing_off_a_schedule_of_minutes() -> None:
    clock, seconds = started(minutes=1)
    seconds.now += 20  # it compiles
    assert clock.share == 0
    clock.step_done()
    assert clock.share == 0
    seconds.now += 20
    clock.step_done()  # only the first one
    assert clock.share == pytest.approx(0.5) and clock.left == 20
    seconds.now += 30
    assert clock.share == 1 and clock.left == 0 and clock.is_over


def test_a_resumed_run_goes_on_where_it_was() -> None:
    clock, seconds = started(minutes=1)
    seconds.now += 30
    clock.step_done()
    seconds.now += 15
    state = clock.state(clock.share)
    assert state == {"seconds": 45, "share": 0.5}
    again, seconds = started(minutes=1)
    again.restore(state)
    assert again.seconds == 45 and again.share == 0.5
    seconds.now += 5
    again.step_done()
    seconds.now += 5
    assert again.share == pytest.approx(0.75) and not again.is_over  # this call has taken 10 seconds


def test_all_processes_go_by_the_main_ones_clock() -> None:
    seconds = Seconds()
    clock = Clock(1, of_main=lambda own: 61.0, now=seconds)
    clock.start(0)
    assert clock.is_over
    clock.step_done()
    assert clock.warm == 61.0
