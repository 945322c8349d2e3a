"""Distillation of the 70B shape for ten steps, sharded by FSDP2: the peak of each GPU next to its plan.

Nobody holds all weights, neither on the host nor on a GPU. In each process all layers begin with the memory
of one, which lies on its GPU; `fully_shard` gives each layer parts of its own. So the package's own path runs
as it is, with a model that is real wherever it is asked: `modlab.convert` looks at layers by running them.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import time
from typing import Any

import torch
from accelerate import PartialState

import modlab
from benchmarks.many_gpus import worker
from benchmarks.many_gpus.large_shape import filled, shape_of, without_weights
from benchmarks.many_gpus.training import Told
from modlab.bench.models import Shape

STEPS = 10
COMPILING = 2
"""First steps, which are not timed."""

TIMES_PLAN = "largest peak, times the plan"
NO_GPU = "what was allocated: this ran on a CPU"


class Measured(Told):
    """Writes what is known after every step.

    Args:
        options: of the part.
        model: in training.
        found: the figures, to which lines and peaks are added.
        planned: GiB that the planner says.
    """

    def __init__(
        self, options: argparse.Namespace, model: Any, found: dict[str, Any], planned: float
    ) -> None:
        super().__init__()
        self.options, self.model, self.found, self.planned = options, model, found, planned

    def log(self, row: dict[str, Any]) -> None:
        """Adds a step's line, and what is held and was held at most until then."""
        lines = self.found["lines"]
        lines.append(self.said(row))
        if timed := [line["tokens_per_s"] for line in lines[COMPILING:]]:
            self.found["tokens_per_s"] = statistics.median(timed)
        self.found["weight_bytes"] = worker.weight_bytes(self.model)
        self.found["host_bytes"] = worker.of_all({f"process {worker.rank()}": _most_of_host()})
        self.found["allocated"] = peaks = worker.allocated()
        if peaks:
            self.found[TIMES_PLAN] = max(peaks.values()) / (self.planned * 2**30)
        else:
            self.found["not measured"] = NO_GPU
        worker.write(self.options, {"scenes": {_title(self.options): self.found}})


def distilled(options: argparse.Namespace) -> dict[str, Any]:
    """The one scene: routers with a gate a KV head on their own dense self, a row a GPU, base frozen."""
    began = time.perf_counter()
    if options.toy:  # on a CPU accelerate never looks at its flags
        from tests.helpers.fsdp_on_cpu import launched_with_fsdp

        launched_with_fsdp(activation_checkpointing=True)
    world, shape = worker.world(), shape_of(options)
    model = alike(shape, options.length, PartialState().device, worker.dtype(options))
    modlab.convert(model, modlab.MoDConfig(layers="all", **worker.HEADS))
    worker.scatter(model)
    planned = worker.planned(options, model.config, "routers", options.length, checkpointing=True)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 250, (STEPS * world, options.length), generator=generator)
    config = modlab.TrainConfig(
        steps=STEPS, batch_size=1, log_every=1, calibrate=False, num_workers=0, objective="distil",
        keep_ratio=0.25, ramp=0.7, router_lr=0.004,
    )  # fmt: skip
    found: dict[str, Any] = {
        "seconds until there": time.perf_counter() - began, "rows": world, "length": options.length,
        "lines": [], "planned": planned,
    }  # fmt: skip
    plan = next(line["total"] for line in planned if line["way"] == "FSDP2")
    worker.tidy()
    worker.forget_peaks()
    modlab.train(model, ids, config, monitor=Measured(options, model, found, plan))
    return {"scenes": {_title(options): found}}


def alike(shape: Shape, context: int, where: torch.device, dtype: torch.dtype) -> Any:
    """A Llama of random weights on a device, all layers in the memory of the first one."""
    torch.manual_seed(0)  # in every process the same
    model = without_weights(shape, context, dtype)
    first, *others = model.model.layers
    for module in (model.model.embed_tokens, model.model.norm, model.lm_head, first):
        filled(module, where, shape.layers)
    for layer in others:
        layer.load_state_dict(first.state_dict(), assign=True)
    with where:
        model.model.rotary_emb = type(model.model.rotary_emb)(model.config)
    return model


def _title(options: argparse.Namespace) -> str:
    return f"{options.model[0]}, base frozen, {worker.world()} rows"


def _most_of_host() -> int:
    """Most bytes of the host's memory that this process has had."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
