"""Tests in several processes are bounded in time and leave none behind, whatever becomes of them."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.helpers.launch import launch

WORKER = """\
import os, pathlib, sys, time
here, wrong = pathlib.Path(sys.argv[1]), sys.argv[2]
own = os.environ["RANK"]
(here / f"new_{own}").write_text(str(os.getpid()))
(here / f"new_{own}").rename(here / f"pid_{own}")
while len(list(here.glob("pid_*"))) < 2:
    time.sleep(0.05)
if wrong == "one fails" and own == "1":
    raise SystemExit("rank 1 has failed")
time.sleep(600)
"""


@pytest.fixture
def over_once_both_are_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Time is over when both processes have begun."""

    def communicate(process: Any, timeout: float) -> Any:
        while process.poll() is None and len(list(tmp_path.glob("pid_*"))) < 2:
            time.sleep(0.05)
        raise subprocess.TimeoutExpired(process.args, timeout)

    monkeypatch.setattr(subprocess.Popen, "communicate", communicate)


def assert_gone(folder: Path) -> None:
    processes = [int((folder / f"pid_{rank}").read_text()) for rank in range(2)]
    assert not any(map(_runs, processes))


def _runs(process: int) -> bool:
    """Those whose parent is gone may wait for somebody to ask how they ended."""
    try:
        return psutil.Process(process).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_processes_are_gone_when_one_of_them_fails(tmp_path: Path) -> None:
    """The other one would sleep on."""
    (tmp_path / "worker.py").write_text(WORKER)
    with pytest.raises(AssertionError, match="rank 1 has failed"):
        launch(tmp_path / "worker.py", 2, tmp_path, "one fails")
    assert_gone(tmp_path)


@pytest.mark.usefixtures("over_once_both_are_here")
def test_processes_are_gone_when_their_time_is_over(tmp_path: Path) -> None:
    (tmp_path / "worker.py").write_text(WORKER)
    with pytest.raises(subprocess.TimeoutExpired):
        launch(tmp_path / "worker.py", 2, tmp_path, "none ends")
    assert_gone(tmp_path)
