"""Everything that is measured on GPUs, in one run with a time limit: steps in lanes, one lane a GPU.

    python -m benchmarks.on_gpu --out build/measured --seconds 590 --commit HASH 0:tests,speed 1:corpus,base
    python -m benchmarks.on_gpu --out build/measured --seconds 590 --commit HASH all:base,arms

The steps of a lane run one after the other, lanes side by side. What is not done by the limit is ended. The
study's steps go on where they stopped when they are named again; all logs and results are packed into
OUT/measured.tar.gz.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tarfile
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BENCH = ["-m", "modlab", "bench"]
ON_8B = ["--device", "cuda", "--shape", "llama-3-8b", "--repeats", "3"]
STUDY = ["-m", "benchmarks.quality"]
STEPS = {
    "tests": ["-m", "pytest", "-q", "--tb=short", "tests/execution/test_what_if_attention.py",
              "tests/kernels/test_decode_kernels.py", "tests/kernels/test_int8_kernels.py",
              "tests/engine/test_int8.py", "tests/engine/test_engine.py",
              "tests/engine/test_prefill.py", "tests/engine/test_step.py", "tests/engine/test_forms.py",
              "tests/engine/test_heads.py", "tests/engine/test_leaving.py",
              "tests/execution/test_whole_rows.py"],
    "flex": ["-m", "pytest", "-q", "--tb=short", "tests/execution/test_what_if_attention.py"],
    "speed": [*BENCH, "speed", *ON_8B],
    "speed_kv": [*BENCH, "speed_kv", *ON_8B],
    "speed_kv_int8": [*BENCH, "speed_kv", *ON_8B, "--kv-cache-dtype", "int8"],
    "speed_leave": [*BENCH, "speed_leave", *ON_8B],
    "speed_leave_coder": [*BENCH, "speed_leave", "--device", "cuda", "--shape", "coder-1.5b",
                          "--repeats", "3"],
    "overhead": [*BENCH, "overhead", *ON_8B],
    "growth": [*BENCH, "growth", *ON_8B],
    "kept": [*BENCH, "generate", *ON_8B, "--skip", "kv", "--routed", "most", "--context", "32768",
             "--ratios", "0.5", "1.0"],
    "kept_throughput": [*BENCH, "throughput", *ON_8B, "--skip", "kv", "--routed", "most", "--ratios", "0.5",
                        "--context", "32768"],
    "corpus": [*STUDY, "corpus"],
    "base": [*STUDY, "base"],
    "arms": [*STUDY, "arms"],
}  # fmt: skip


class Lanes:
    """Runs steps until a moment, after which nothing is begun and what runs is ended."""

    def __init__(self, out: Path, seconds: float, commit: str | None, study: list[str]) -> None:
        self.out, self.commit, self.study = out, commit, study
        self.deadline = time.monotonic() + seconds
        self.outcomes: dict[str, str] = {}

    def command(self, step: str, gpus: int = 1) -> list[str]:
        """The command of a step, with what all commands of its kind are told. The base trains on several GPUs
        in as many processes."""
        launch = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", str(gpus)]
        command = [sys.executable, *(launch if step == "base" and gpus > 1 else []), *STEPS[step]]
        if STEPS[step][:2] == STUDY:
            command += self.study
            if step == "arms":
                command += ["--minutes", f"{max(0.0, self._left() - 10) / 60:.2f}"]
            if step == "arms" and self.commit:
                command += ["--commit", self.commit]
        elif STEPS[step][:3] == BENCH:
            command += ["--out", str(self.out)] + (["--commit", self.commit] if self.commit else [])
        return command

    def run(self, gpu: str, steps: list[str]) -> None:
        """One lane, on GPU number `gpu`, or on "all"."""
        environment = dict(os.environ)
        gpus = _gpu_count() if gpu == "all" else 1
        if gpu != "all":
            environment["CUDA_VISIBLE_DEVICES"] = gpu
        for step in steps:
            if self._left() <= 0:
                self.outcomes[step] = "not begun"
                continue
            begun = time.monotonic()
            with open(self.out / f"{step}.log", "w") as log:
                process = subprocess.Popen(
                    self.command(step, gpus),
                    cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
                )  # fmt: skip
                try:
                    code = process.wait(timeout=self._left())
                    outcome = f"exit {code}"
                except subprocess.TimeoutExpired:
                    os.killpg(process.pid, signal.SIGKILL)  # with the workers it started
                    process.wait()
                    outcome = "ended by the limit"
            self.outcomes[step] = f"{outcome} after {time.monotonic() - begun:.0f} s"

    def _left(self) -> float:
        return self.deadline - time.monotonic()


def _gpu_count() -> int:
    import torch

    return torch.cuda.device_count()


def parsed_lane(text: str) -> tuple[str, list[str]]:
    """ "0:tests,speed" as ("0", ["tests", "speed"])."""
    gpu, _, names = text.partition(":")
    steps = names.split(",")
    unknown = [step for step in steps if step not in STEPS]
    if unknown or not (gpu == "all" or gpu.isdigit()):
        raise argparse.ArgumentTypeError(f"{text!r}: GPU:STEP,STEP with steps among {', '.join(STEPS)}")
    return gpu, steps


def main(arguments: list[str] | None = None) -> None:
    """Reads the command line, runs the lanes, says what became of each step, packs everything."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.on_gpu", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("lanes", nargs="+", type=parsed_lane, metavar="GPU:STEP,STEP")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=3600)
    parser.add_argument("--commit", help="of this code, where git cannot say")
    parser.add_argument("--study", default="", help="more arguments for the study's steps")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    results = options.out / "quality"
    lanes = Lanes(
        options.out, options.seconds, options.commit, ["--results", str(results), *options.study.split()]
    )
    threads = [threading.Thread(target=lanes.run, args=lane) for lane in options.lanes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    packed = options.out / "measured.tar.gz"
    with tarfile.open(packed, "w:gz") as archive:
        for path in sorted(options.out.rglob("*")):
            if path.is_file() and path != packed:
                archive.add(path, path.relative_to(options.out))
    for step, outcome in lanes.outcomes.items():
        print(f"=== {step}: {outcome}")
        log = options.out / f"{step}.log"
        if log.exists():
            print("\n".join(log.read_text().splitlines()[-12:])[-1500:])


if __name__ == "__main__":
    main()
