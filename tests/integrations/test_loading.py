"""Every process loads a checkpoint, whatever accelerate's launcher says, and its word stands afterwards."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest

from modlab.integrations.fsdp import FIRST_LOADS, every_process_loads


@pytest.mark.parametrize("said", ["true", "false"])
def test_the_launchers_word_stands_afterwards(said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FIRST_LOADS, said)
    with every_process_loads(), every_process_loads():
        assert os.environ[FIRST_LOADS] == "false"
    assert os.environ[FIRST_LOADS] == said


def test_without_it_nothing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(FIRST_LOADS, raising=False)
    with every_process_loads():
        assert FIRST_LOADS not in os.environ
    assert FIRST_LOADS not in os.environ


def test_threads_that_load_at_once_leave_it_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FIRST_LOADS, "true")
    together = Barrier(4)

    def load(number: int) -> list[str]:
        together.wait()
        found = []
        for _ in range(200):
            with every_process_loads():
                found.append(os.environ[FIRST_LOADS])
        return found

    with ThreadPoolExecutor(4) as pool:
        found = [value for values in pool.map(load, range(4)) for value in values]
    assert set(found) == {"false"} and os.environ[FIRST_LOADS] == "true"
