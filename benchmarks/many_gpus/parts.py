"""What is measured, in order of value, and the command of each part."""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import dataclass
from pathlib import Path

SHARDED, KILLED, RESUMED = "fsdp2", "killed", "resumed"
STARTED_BY_LAUNCHER = ("ddp", SHARDED, KILLED, "tensor parallel")
ONE, ONE_LARGE = "one", "one large"
INFERENCE = ("alone", "tensor parallel", "device_map")


@dataclass(frozen=True)
class Part:
    """One command.

    Attributes:
        what: "one" and "one large" (models of one GPU), "ddp", "fsdp2": training, in scenes (`training.py`);
            "killed": a sharded run to its end, then the same one, which a process does not survive;
            "resumed": that one taken up by one GPU; "alone", "tensor parallel", "device_map": inference;
            "notebook"; "large shape": inference of a model of random weights.
        models: folders, from small to large; or the name of a shape.
        gpus: that it needs.
        limit: seconds that it may take.
        timed: whether it needs its GPUs to itself. Of the others as many run at once as there are.
    """

    what: str
    models: tuple[str, ...]
    gpus: int
    limit: float = 100.0
    timed: bool = True

    @property
    def name(self) -> str:
        """As the results call it."""
        return self.what

    @property
    def file(self) -> str:
        """Name of its files, without suffix."""
        return self.name.replace(" ", "_")


LARGE_SHAPE = "llama-3-70b"


def parts(models: list[str], gpus: int) -> list[Part]:
    """All parts but the large shape, the most valuable first; `models` from small to large. A limit is about
    one and a half times what a part was thought to take: one that hangs does not cost all the others. What is
    taken up comes after what is killed, which needs all GPUs: it is not begun before that one has ended."""
    sizes = tuple(dict.fromkeys((models[0], models[-1])))
    small, large = sizes[:1], sizes[-1:]
    return [
        Part("ddp", sizes, gpus, 170),
        Part(KILLED, small, gpus, 75),
        Part(ONE, small, 1, 100),
        *([Part(ONE_LARGE, large, 1, 90)] if large != small else []),
        Part(RESUMED, small, 1, 75, timed=False),
        *(Part(what, large, 1 if what == "alone" else gpus, 100, timed=False) for what in INFERENCE),
        Part("notebook", small, gpus, 80, timed=False),
        Part(SHARDED, sizes, gpus, 120),
    ]


def command(part: Part, options: argparse.Namespace, work: Path) -> list[str]:
    """What runs a part."""
    launch = [sys.executable]
    if part.what in STARTED_BY_LAUNCHER:
        launch += ["-m", "accelerate.commands.launch", "--num_machines", "1", "--mixed_precision", "no"]
        launch += ["--dynamo_backend", "no", "--num_processes", str(options.gpus)]
        launch += ["--main_process_port", "0"]  # a free one
        if part.what in (SHARDED, KILLED) and not options.toy:  # on a CPU accelerate looks at no such flag
            launch += ["--use_fsdp", "--fsdp_version", "2", "--fsdp_cpu_ram_efficient_loading", "false"]
        else:
            launch += ["--multi_gpu"]
    own = ["--out", str(work), "--work", str(work), "--model", *part.models, "--gpus", str(options.gpus)]
    own += ["--part", part.what, "--file", part.file]
    for name in ("length", "context", "steps", "memory", "rows"):
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
        "OMP_NUM_THREADS": "4",  # the launcher would say 1, with which weights are slow to load
        "CUDA_VISIBLE_DEVICES": ",".join(map(str, gpus)),
    }
    if options.toy:
        more |= {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return {**os.environ, **more}
