"""Programs that a model wrote, run in processes of their own: little memory, little time, an empty folder.

It keeps accidents away, not an attacker: run it where nothing can be lost.
"""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

SECONDS = 10.0
MEMORY = 1 << 30

RUNNER = """
import resource, sys
seconds, memory, word = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
for what, limit in (("AS", memory), ("CPU", seconds), ("FSIZE", 1 << 20), ("CORE", 0)):
    resource.setrlimit(getattr(resource, "RLIMIT_" + what), (limit, limit))
program, told = sys.stdin.read(), sys.__stdout__
sys.stdin = sys.stdout = sys.stderr = open("/dev/null", "r+")
import os, shutil, subprocess, socket
away = {os: "system popen fork kill killpg remove unlink rmdir rename removedirs chmod",
        shutil: "rmtree move", subprocess: "Popen run", socket: "socket"}
for module, names in away.items():
    for name in names.split():
        setattr(module, name, None)
exec(compile(program, "written", "exec"), {"__name__": "written"})
told.write(word)
told.flush()
"""


def passes(program: str, seconds: float = SECONDS) -> bool:
    """Whether the program runs to its end, in time and without an error."""
    word = secrets.token_hex(8)  # that it has come to the end is said by this, not by a status it may choose
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-I", "-c", RUNNER, str(int(seconds) + 1), str(MEMORY), word]
        try:
            done = subprocess.run(
                command, input=program, cwd=folder, capture_output=True, text=True, timeout=seconds,
                env={"PATH": os.environ.get("PATH", ""), "OPENBLAS_NUM_THREADS": "1"},
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return False
    return done.returncode == 0 and done.stdout == word


def all_pass(programs: Sequence[str], workers: int | None = None, seconds: float = SECONDS) -> list[bool]:
    """`passes` of each, several at a time."""
    with ThreadPoolExecutor(workers or max(1, (os.cpu_count() or 2) // 2)) as pool:
        return list(pool.map(lambda program: passes(program, seconds), programs))
