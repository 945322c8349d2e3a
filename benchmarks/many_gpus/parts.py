"""What is measured, in order of value, and the command of each part."""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import dataclass
from pathlib import Path

COPIES, SHARDED, KILLED, RESUMED = "ddp", "fsdp2", "killed", "resumed"
OF_TWO = {COPIES: "ddp two", SHARDED: "fsdp2 two"}
"""What more than two GPUs are held against, next to one."""

ONE, ONE_LARGE = "one", "one large"
TENSOR_PARALLEL = "tensor parallel"
INFERENCE = ("alone", TENSOR_PARALLEL, "device_map")
LARGE_SHAPE = "llama-3-70b"
LARGE_SPREAD, LARGE_BY_HEADS = f"{LARGE_SHAPE} device_map", f"{LARGE_SHAPE} tensor parallel"
LARGE_DISTILLED = f"{LARGE_SHAPE} distilled"
LARGE = (LARGE_SPREAD, LARGE_BY_HEADS, LARGE_DISTILLED)

SHARDS = (SHARDED, OF_TWO[SHARDED], KILLED, RESUMED, LARGE_DISTILLED)
"""Parts whose processes, where there are several, are launched with FSDP2."""

IN_ONE_PROCESS = (ONE, ONE_LARGE, "alone", "device_map", "notebook", LARGE_SPREAD)


@dataclass(frozen=True)
class Part:
    """One command.

    Attributes:
        what: "one" and "one large" (models of one GPU), "ddp", "fsdp2", "ddp two", "fsdp2 two": training, in
            scenes (`training.py`); "killed": a sharded run to its end, then the same one, which a process
            does not survive; "resumed": that one taken up by half as many GPUs; "alone", "tensor parallel",
            "device_map": inference; "notebook"; `LARGE`: a shape with random weights.
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


def parts(models: list[str], gpus: int) -> list[Part]:
    """All parts of the models, the most valuable first; `models` from small to large. A limit is about one
    and a half times what a part was thought to take: one that hangs does not cost all the others. What is
    taken up comes after what is killed, which needs all GPUs: it is not begun before that one has ended."""
    sizes = tuple(dict.fromkeys((models[0], models[-1])))
    small, large = sizes[:1], sizes[-1:]
    return [
        Part(COPIES, sizes, gpus, 220),
        Part(KILLED, small, gpus, 75),
        Part(ONE, small, 1, 150),
        *([Part(ONE_LARGE, large, 1, 130)] if large != small else []),
        *([Part(name, large, 2, 130) for name in OF_TWO.values()] if gpus > 2 else []),
        Part(RESUMED, small, max(1, gpus // 2), 75, timed=False),
        *(Part(what, large, 1 if what == "alone" else gpus, 100, timed=False) for what in INFERENCE),
        Part("notebook", small, gpus, 80, timed=False),
        Part(SHARDED, sizes, gpus, 170),
    ]


def large_parts(gpus: int) -> list[Part]:
    """The parts of the large shape, which need no folder of a model; one GPU has no others to share with."""
    limits = {LARGE_SPREAD: 200, LARGE_BY_HEADS: 150, LARGE_DISTILLED: 240}
    wanted = limits if gpus > 1 else {LARGE_SPREAD: limits[LARGE_SPREAD]}
    return [Part(what, (LARGE_SHAPE,), gpus, limit) for what, limit in wanted.items()]


def chosen(only: list[str], models: list[str], gpus: int) -> list[Part]:
    """The parts of a call.

    Args:
        only: their names, `LARGE_SHAPE` for all of the large shape; empty: all but these.
        models: folders, from small to large; may be empty where none is asked for.
    """
    named = {name for one in only for name in (LARGE if one == LARGE_SHAPE else [one])}
    of_models = parts(models, gpus) if models else []
    if not only:
        return of_models
    return [part for part in [*large_parts(gpus), *of_models] if part.what in named]


def command(part: Part, options: argparse.Namespace, work: Path) -> list[str]:
    """What runs a part."""
    launch = [sys.executable]
    if part.what not in IN_ONE_PROCESS and part.gpus > 1:
        launch += ["-m", "accelerate.commands.launch", "--num_machines", "1", "--mixed_precision", "no"]
        launch += ["--dynamo_backend", "no", "--num_processes", str(part.gpus)]
        launch += ["--main_process_port", "0"]  # a free one
        if part.what in SHARDS and not options.toy:  # on a CPU accelerate looks at no such flag
            launch += ["--use_fsdp", "--fsdp_version", "2", "--fsdp_cpu_ram_efficient_loading", "false"]
            launch += ["--fsdp_activation_checkpointing", str(part.what == LARGE_DISTILLED).lower()]
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
