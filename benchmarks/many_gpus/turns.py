"""Commands that take turns on the GPUs: the next one begins as soon as as many are free as it needs.

Parts that are not timed share GPUs with each other. The next part is started ahead where it is known which
GPUs it will get: it imports, and then waits for a file (`wait_for_turn`) before it touches any of them.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import tempfile
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

TURN = "MODLAB_MANY_GPUS_TURN"
"""Environment variable that names the file whose being there says that a part may use its GPUs."""


def wait_for_turn() -> None:
    """Called by a part that has imported what it needs."""
    file = os.environ.get(TURN)
    while file is not None and not os.path.exists(file):
        time.sleep(0.05)


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
    turn: Path
    began: float = 0.0
    until: float = 0.0
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
        self.ahead: _Running | None = None

    def run(self, parts: Iterable[Part]) -> list[Part]:
        """All parts in their order; those that were not begun."""
        waiting = list(parts)
        with tempfile.TemporaryDirectory() as folder:
            self.folder = Path(folder)
            try:
                while self.running or (waiting and self.left > LEAST):
                    while waiting and self.left > LEAST and self._has_room(waiting[0]):
                        self._begin(waiting.pop(0))
                    if waiting and self.left > LEAST:
                        self._start_ahead(waiting[0])
                    time.sleep(0.1)
                    for one in list(self.running):
                        self._look(one)
            finally:
                for one in [*self.running, *([self.ahead] if self.ahead else [])]:
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

    def _start_ahead(self, part: Part) -> None:
        """Starts a part that cannot begin yet, once, where its GPUs are known: it needs all of them, or one
        part has all of them until it begins."""
        held_by_one = any(one.part.timed and one.gpus == self.gpus for one in self.running)
        if self.ahead is None and (held_by_one or part.gpus == len(self.gpus)):
            self.ahead = self._started(part, self.gpus[: part.gpus])

    def _started(self, part: Part, gpus: list[int]) -> _Running:
        command, environment = self.begin(part, gpus)
        mark = uuid.uuid4().hex
        turn = self.folder / mark
        with open(self.log(part), "w") as log:
            process = subprocess.Popen(
                command,
                env={**environment, MARK: mark, TURN: str(turn)},
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        return _Running(part, process, mark, gpus, turn)

    def _begin(self, part: Part) -> None:
        one = self.ahead or self._started(part, self._free(part)[: part.gpus])
        self.ahead = None
        one.turn.touch()
        one.began = time.monotonic()
        one.until = min(one.began + part.limit, self.deadline)
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
