"""Several processes of one script, as `accelerate launch` starts them."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 480


def launch(script: Path | str, processes: int, *arguments: object) -> str:
    """Runs a script (or "-m module") in so many processes on the CPU; fails if one of them does.

    All of them are gone afterwards, also after a failure or when their time is over.

    Returns:
        what they printed.
    """
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_machines", "1"]
    command += ["--num_processes", str(processes), "--mixed_precision", "no", "--dynamo_backend", "no"]
    if processes > 1:
        # the launcher of local process groups carries this name on CPUs too; port 0 picks a free one
        command += ["--multi_gpu", "--main_process_port", "0"]
    return finished([*command, *str(script).split(), *map(str, arguments)])


def python_path() -> str:
    """PYTHONPATH of a process that imports this checkout, and what else this one has on it (another
    transformers, say)."""
    return os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))


def finished(command: list[str]) -> str:
    """The output of a command that has to succeed, its processes in a group that is ended with it."""
    return together([command])[0]


def together(commands: list[list[str]], **more: str) -> list[str]:
    """The outputs of commands that run at the same time, as one on each machine; all have to succeed.

    Args:
        more: variables of their environment.
    """
    environment = {**os.environ, "PYTHONPATH": python_path(), "OMP_NUM_THREADS": "1", **more}
    environment["ACCELERATE_USE_CPU"] = "true"
    running = [
        subprocess.Popen(
            command,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        for command in commands
    ]
    try:
        outputs = [one.communicate(timeout=SECONDS) for one in running]
    finally:
        for one in running:
            _end(one)
    for one, (_, errors) in zip(running, outputs, strict=True):
        assert one.returncode == 0, errors[-4000:]
    return [printed for printed, _ in outputs]


def _end(one: subprocess.Popen[str]) -> None:
    """Ends a command and what it has started: the launcher gives each worker a session of its own, and ends
    them when it is asked to end."""
    if one.poll() is None:
        one.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            one.wait(20)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(one.pid, signal.SIGKILL)
    one.wait()
