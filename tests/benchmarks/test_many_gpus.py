"""The call that measures several GPUs: its parts take turns, have limits, and leave nothing behind."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import psutil

from benchmarks.many_gpus.compared import compared
from benchmarks.many_gpus.parts import Part, parts
from benchmarks.many_gpus.turns import Ended, Turns

SLEEP = "import time; time.sleep(600)"


class Ran:
    """Turns of commands, each a Python program by the name of its part."""

    def __init__(self, folder: Path, programs: dict[str, str], gpus: int = 2, seconds: float = 600) -> None:
        self.programs, self.given = programs, dict[str, list[int]]()
        self.ended: dict[str, Ended] = {}
        self.turns = Turns(
            gpus, seconds, self.begin, lambda part: folder / f"{part.what}.log",
            lambda part, ended: self.ended.update({part.what: ended}),
        )  # fmt: skip

    def begin(self, part: Part, gpus: list[int]) -> tuple[list[str], dict[str, str]]:
        self.given[part.what] = gpus
        return [sys.executable, "-c", self.programs[part.what]], dict(os.environ)


def test_parts_share_the_gpus_in_their_order(tmp_path: Path) -> None:
    """Two of one GPU side by side, and one of both after them, though one of the two fails."""
    meet = (
        "import pathlib, sys, time\n"
        f"folder = pathlib.Path({str(tmp_path)!r})\n"
        "(folder / sys.argv[1]).touch()\n"
        "while len(list(folder.glob('here *'))) < 2: time.sleep(0.05)\n"
    )
    programs = {
        "a": f"import sys; sys.argv.append('here a')\n{meet}",
        "b": f"import sys; sys.argv.append('here b')\n{meet}sys.exit(3)",
        "both": "print('done')",
    }
    ran = Ran(tmp_path, programs)
    assert ran.turns.run([Part("a", "m", 1), Part("b", "m", 1), Part("both", "m", 2)]) == []
    assert ran.given == {"a": [0], "b": [1], "both": [0, 1]}
    assert {name: one.code for name, one in ran.ended.items()} == {"a": 0, "b": 3, "both": 0}
    assert ran.ended["a"].together == ["m b"] and ran.ended["both"].together == []
    assert (tmp_path / "both.log").read_text() == "done\n"


def test_what_a_part_leaves_behind_is_ended(tmp_path: Path) -> None:
    """Processes in sessions of their own, as the launcher starts them."""
    program = (
        "import subprocess, sys\n"
        f"one = subprocess.Popen([sys.executable, '-c', {SLEEP!r}], start_new_session=True)\n"
        "print(one.pid)"
    )
    ran = Ran(tmp_path, {"leaves": program})
    ran.turns.run([Part("leaves", "m", 1)])
    assert (ran.ended["leaves"].code, ran.ended["leaves"].left_over) == (0, 1)
    assert not psutil.pid_exists(int((tmp_path / "leaves.log").read_text()))


def test_limits_end_parts_and_the_call(tmp_path: Path) -> None:
    ran = Ran(tmp_path, {"long": SLEEP, "next": ""}, gpus=1)
    assert ran.turns.run([Part("long", "m", 1, limit=0.5), Part("next", "m", 1)]) == []
    assert (ran.ended["long"].code, ran.ended["next"].code) == (None, 0)
    late = Ran(tmp_path, {"never": ""}, seconds=0)
    assert [part.what for part in late.turns.run([Part("never", "m", 1)])] == ["never"]
    assert not late.ended


def test_all_parts_have_names_of_their_own() -> None:
    found = parts(["models/small", "models/large"], 2)
    assert len({part.file for part in found}) == len(found)
    assert [part.name for part in found[:2]] == ["small one distilled", "large one distilled"]
    alone = parts(["models/small"], 2)
    assert len({part.file for part in alone}) == len(alone) and len(alone) < len(found)


def test_several_gpus_are_compared_with_one() -> None:
    def run(losses: list[float], speed: float, first: int = 1) -> dict[str, Any]:
        steps = [{"step": first + i, "loss": loss, "keep_ratio": 0.5} for i, loss in enumerate(losses)]
        return {"steps": steps, "tokens_per_s": speed}

    found = {
        "m one distilled": run([3.0, 2.0, 1.0], 100.0),
        "m ddp distilled": run([3.0, 2.1, 1.0], 190.0),
        "m resumed distilled": run([0.75], 100.0, first=3),
        "m fsdp2 weights": run([3.0], 1.0),
    }
    said = compared(found)
    assert said["m ddp distilled"]["tokens a second, times one GPU"] == 1.9
    assert abs(said["m ddp distilled"]["largest difference of loss"] - 0.1) < 1e-9
    assert said["m resumed distilled"]["largest difference of loss"] == 0.25
    assert said["m resumed distilled"]["steps compared"] == 1
    assert said["m fsdp2 weights"] == {}  # one GPU's part has not run
