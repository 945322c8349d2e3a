"""What is measured, in order of value, and the command of each part."""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import dataclass
from pathlib import Path

DISTILLED, WEIGHTS = "distilled", "weights"
"""What a part trains: routers, on their own dense self; or all weights, on the loss and a teacher."""

STARTED_BY_LAUNCHER = ("ddp", "fsdp2", "killed", "skipping ddp", "skipping fsdp2", "tensor parallel")
SHARDED = ("fsdp2", "killed", "skipping fsdp2")


@dataclass(frozen=True)
class Part:
    """One command.

    Attributes:
        what: "one", "ddp", "fsdp2"; "killed" (FSDP2, a process is killed) and "resumed" (by one GPU);
            "skipping one", "skipping ddp" and "skipping fsdp2"; "alone", "tensor parallel", "device_map"
            (inference); "notebook".
        model: a folder.
        gpus: that it needs.
        limit: seconds that it may take.
        kind: of training, `DISTILLED` or `WEIGHTS`; "" elsewhere.
    """

    what: str
    model: str
    gpus: int
    limit: float = 100.0
    kind: str = ""

    @property
    def name(self) -> str:
        """As the results call it."""
        return " ".join(filter(None, (Path(self.model).name, self.what, self.kind)))

    @property
    def file(self) -> str:
        """Name of its files, without suffix."""
        return self.name.replace(" ", "_")


def parts(models: list[str], gpus: int) -> list[Part]:
    """All parts, the most valuable first; `models` from small to large."""
    small, large = models[0], models[-1]
    sizes = list(dict.fromkeys((small, large)))
    found = [Part("one", model, 1, kind=DISTILLED) for model in sizes]
    found += [Part(way, model, gpus, kind=DISTILLED) for way in ("ddp", "fsdp2") for model in sizes]
    found += [Part("alone", large, 1), Part("one", small, 1, kind=WEIGHTS)]
    found += [Part("tensor parallel", large, gpus), Part("device_map", large, gpus)]
    found += [Part("killed", small, gpus, 90, DISTILLED)]
    found += [Part("resumed", small, 1, 90, DISTILLED), Part("skipping one", small, 1, 60)]
    found += [Part("skipping fsdp2", small, gpus, 60), Part("notebook", small, gpus, 90)]
    found += [Part(way, small, gpus, kind=WEIGHTS) for way in ("ddp", "fsdp2")]
    found += [Part("skipping ddp", small, gpus, 60)]
    if large != small:
        found += [Part("one", large, 1, kind=WEIGHTS)]
        found += [Part(way, large, gpus, kind=WEIGHTS) for way in ("ddp", "fsdp2")]
    return found


def command(part: Part, options: argparse.Namespace, rows: int, work: Path) -> list[str]:
    """What runs a part; `rows` of a global batch."""
    launch = [sys.executable]
    if part.what in STARTED_BY_LAUNCHER:
        launch += ["-m", "accelerate.commands.launch", "--num_machines", "1", "--mixed_precision", "no"]
        launch += ["--dynamo_backend", "no", "--num_processes", str(options.gpus)]
        launch += ["--main_process_port", "0"]  # a free one
        if part.what in SHARDED and not options.toy:  # on a CPU accelerate does not know FSDP
            launch += ["--use_fsdp", "--fsdp_version", "2", "--fsdp_cpu_ram_efficient_loading", "false"]
        else:
            launch += ["--multi_gpu"]
    own = ["--out", str(work), "--work", str(work), "--model", part.model, "--gpus", str(options.gpus)]
    own += ["--part", part.what, "--kind", part.kind, "--file", part.file, "--rows", str(rows)]
    for name in ("length", "context", "steps", "memory"):
        own += [f"--{name}", str(getattr(options, name))]
    own += ["--toy"] if options.toy else []
    return [*launch, "-m", "benchmarks.many_gpus", *own]


def environment(options: argparse.Namespace, gpus: list[int]) -> dict[str, str]:
    """The variables of a part that may use these GPUs."""
    more = {
        "NCCL_NVLS_ENABLE": "0",
        "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1",
        "PYTHONUNBUFFERED": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTORCH_NVML_BASED_CUDA_CHECK": "1",  # the notebook forks, and may not have touched a GPU
        "OMP_NUM_THREADS": "8",  # the launcher would say 1, with which weights are slow to load
        "CUDA_VISIBLE_DEVICES": ",".join(map(str, gpus)),
    }
    if options.toy:
        more |= {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return {**os.environ, **more}
