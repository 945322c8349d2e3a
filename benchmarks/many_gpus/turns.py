"""Commands that take turns on the GPUs: the next one begins as soon as as many are free as it needs.

Parts that are not timed share GPUs with each other.
"""

from __future__ import annotations

import contextlib
import subprocess
import time
import uuid
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from benchmarks.many_gpus.parts import Part

LEAST = 20.0
"""Seconds with fewer than which nothing is begun: no part is done in them."""

MARK = "MODLAB_MANY_GPUS_PART"
"""Environment variable by which all processes of a part are known: the launcher gives each a session of its
own, and they outlive it if it is killed."""


@dataclass
class Ended:
    """How a part ended: `code` of its command, None where its limit ended it; with which other parts it
    shared the machine; how many processes its command had left behind (they are gone now)."""

    code: int | None
    seconds: float
    together: list[str]
    left_over: int


@dataclass
class _Running:
    part: Part
    process: subprocess.Popen[bytes]
    mark: str
    gpus: list[int]
    began: float
    until: float
    together: list[str] = field(default_factory=list)


class Turns:
    """Runs parts until a moment, after which nothing is begun and what runs is ended.

    Args:
        gpus: how many there are.
        seconds: from now on.
        begin: the command and the environment of a part that is given these GPUs.
        log: where its output goes.
        ended: told of each part as soon as it has ended.
    """

    def __init__(
        self,
        gpus: int,
        seconds: float,
        begin: Callable[[Part, list[int]], tuple[list[str], dict[str, str]]],
        log: Callable[[Part], Path],
        ended: Callable[[Part, Ended], None],
    ) -> None:
        self.gpus = list(range(gpus))
        self.deadline = time.monotonic() + seconds
        self.begin, self.log, self.ended = begin, log, ended
        self.running: list[_Running] = []

    def run(self, parts: Iterable[Part]) -> list[Part]:
        """All parts in their order; those that were not begun."""
        waiting = list(parts)
        try:
            while self.running or (waiting and self.left > LEAST):
                while waiting and self.left > LEAST and self._has_room(waiting[0]):
                    self._begin(waiting.pop(0))
                time.sleep(0.1)
                for one in list(self.running):
                    self._look(one)
        finally:
            for one in self.running:
                _end(one)
        return waiting

    @property
    def left(self) -> float:
        """Seconds."""
        return self.deadline - time.monotonic()

    def _free(self, part: Part) -> list[int]:
        """GPUs that the part may have: none has a timed part, and a timed part has none with others."""
        held = [one for one in self.running if part.timed or one.part.timed]
        return [gpu for gpu in self.gpus if not any(gpu in one.gpus for one in held)]

    def _has_room(self, part: Part) -> bool:
        return part.gpus <= len(self._free(part))

    def _begin(self, part: Part) -> None:
        gpus = self._free(part)[: part.gpus]
        command, environment = self.begin(part, gpus)
        mark = uuid.uuid4().hex
        with open(self.log(part), "w") as log:
            process = subprocess.Popen(
                command, env={**environment, MARK: mark}, stdout=log, stderr=subprocess.STDOUT
            )
        now = time.monotonic()
        one = _Running(part, process, mark, gpus, now, min(now + part.limit, self.deadline))
        for other in self.running:
            other.together.append(part.name)
            one.together.append(other.part.name)
        self.running.append(one)

    def _look(self, one: _Running) -> None:
        code = one.process.poll()
        if code is None and time.monotonic() < one.until:
            return
        seconds = time.monotonic() - one.began
        left_over = _end(one)
        self.running.remove(one)
        self.ended(one.part, Ended(code, seconds, one.together, 0 if code is None else left_over))


def _end(one: _Running) -> int:
    """Kills what a part has running; how many processes that were."""
    found = [process for process in psutil.process_iter() if _has(process, one.mark)]
    for process in found:
        with contextlib.suppress(psutil.Error):
            process.kill()
    psutil.wait_procs(found, timeout=20)
    one.process.wait()
    return len(found)


def _has(process: psutil.Process, mark: str) -> bool:
    try:
        own: bool = process.environ().get(MARK) == mark
        return own and process.status() != psutil.STATUS_ZOMBIE
    except (psutil.Error, OSError):  # it has ended, or is another user's
        return False
