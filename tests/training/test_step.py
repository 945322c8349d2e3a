"""A step is over its whole global batch, however it is cut."""

from __future__ import annotations

import json
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from modlab.training.loop import TrainConfig, train
from modlab.training.run import Run
from tests.helpers.launch import launch
from tests.helpers.steps import CASES, ROWS, gradient, model_of
from tests.helpers.training import settings

WORKER = Path(__file__).with_name("steps_in_processes.py")
COUNTS = Path(__file__).with_name("collectives_in_processes.py")


def assert_same_step(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert value.norm() > 0 or name == "log objective", name  # it is 0 for objective="none"
        off = (found[name] - value).norm() / value.norm().clamp(min=1e-9)
        assert off < 1e-4, f"{name} is off by {off:.1%}"


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("batch_size", "grad_accum"), [(4, 2), (1, 8)])
def test_accumulated_gradients_are_those_of_one_batch(case: str, batch_size: int, grad_accum: int) -> None:
    assert_same_step(gradient(case, batch_size, grad_accum), gradient(case, ROWS, 1))


FEW = (
    "distilled",
    "target",
    "budget",
    "top-k",
    "cache, with noise",
    "one row keeps",
    "one row keeps and frozen",
    "target with adapters",
)
DISTILLED = tuple(case for case in CASES if case.startswith("distil"))


@pytest.mark.parametrize(
    ("kind", "processes", "batch_size", "grad_accum", "cases"),
    [
        ("copies", 2, 2, 2, CASES),
        ("copies", 4, 2, 1, FEW),
        ("sharded", 2, 2, 2, (*FEW, *DISTILLED)),
        ("gathered", 2, 2, 2, DISTILLED[:2]),
        ("sharded", 4, 2, 1, DISTILLED[1:3]),
    ],
    ids=["two", "four", "two, sharded", "two, gathered", "four, sharded"],
)
def test_several_processes_give_the_gradient_of_one(
    tmp_path: Path, kind: str, processes: int, batch_size: int, grad_accum: int, cases: Iterable[str]
) -> None:
    """Rows have uneven labels and padding; in some cases one process alone has tokens that run."""
    out = tmp_path / kind
    out.mkdir()
    launch(WORKER, processes, out, batch_size, grad_accum, *cases)
    ranks = [torch.load(out / f"rank_{rank}.pt") for rank in range(processes)]
    for case in cases:
        expected = gradient(case, ROWS, 1)
        for rank in ranks:
            assert_same_step(rank[case], expected)


@pytest.mark.parametrize("kind", ["copies", "sharded"])
def test_processes_wait_for_each_other_three_times_in_a_distilled_step(tmp_path: Path, kind: str) -> None:
    """For the number of tokens, for what routers kept, for all of their gradients; FSDP2 gathers each layer
    for the teacher, the student and the backward pass, and the model's ends once."""
    out = tmp_path / kind
    out.mkdir()
    launch(COUNTS, 2, out)
    found = json.loads((out / "collectives.json").read_text())
    gathers = {"c10d::_allgather_base_": 3 * 2 + 1} if kind == "sharded" else {}
    assert found == {"c10d::allreduce_": 3} | gathers


def test_the_host_waits_for_the_device_nowhere_in_a_distilled_step() -> None:
    """But where transformers asks whether positions begin again, in both forwards. Otherwise a GPU stands
    still while the next part of the step is launched, which with several is what each waits for."""
    conversion, settings = CASES["distil"]
    config = TrainConfig(
        steps=2,
        batch_size=2,
        log_every=2,
        calibrate=False,
        mixed_precision="no",
        max_grad_norm=1e9,
        **settings,
    )
    rows = torch.randint(2, 97, (4, 24), generator=torch.Generator().manual_seed(0))
    with Run(model_of(conversion), rows, config) as run:
        batches = run.batches()
        run.train_step(next(batches))
        with patch.object(run.stepping.adamw, "step"), Waits() as waits:  # on a GPU it is one fused kernel
            run.train_step(next(batches))
    assert set(waits.seen) <= {"masking_utils.py"} and len(waits.seen) <= 2, waits.seen


class Waits(TorchDispatchMode):
    """Notes the files whose calls read a value, or have a number of values for a size."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        name = function._schema.name
        by_mask = name == "aten::index" and any(i is not None and i.dtype == torch.bool for i in args[1])
        if by_mask or name in ("aten::_local_scalar_dense", "aten::nonzero", "aten::equal"):
            frames = [frame for frame in traceback.extract_stack() if "/torch/" not in frame.filename]
            self.seen.append(Path(frames[-2].filename).name)
        return function(*args, **(kwargs or {}))


def test_every_row_has_noise_of_its_own(make: Callable[..., Any], rows: torch.Tensor) -> None:
    """Of two rows alike in one step each is weighed in its own way, and another in the next step."""
    import modlab
    from modlab.execution import masked_keys

    model = make(mod=modlab.MoDConfig(keep_recent=4))
    drawn: list[torch.Tensor] = []
    real = masked_keys._uniform
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(masked_keys, "_uniform", lambda *args: drawn.append(real(*args)) or drawn[-1])
        train(model, rows[:1].repeat(8, 1), TrainConfig(**settings(steps=2, batch_size=4)))
    flat = torch.stack([row for draw in drawn for row in draw])
    assert len(flat) == 2 * 4 * len(model.mod.layers)
    assert len(torch.unique(flat, dim=0)) == len(flat)
    assert model.mod.noise is None


def test_accumulation_equals_a_larger_batch(make: Callable[..., Any], rows: torch.Tensor) -> None:
    large = train(make(), rows, TrainConfig(**settings(steps=4)))
    small = train(make(), rows, TrainConfig(**settings(steps=4, batch_size=4, grad_accum=2)))
    for a, b in zip(large.model.parameters(), small.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)
    assert small.history["loss"].tolist() == pytest.approx(large.history["loss"].tolist(), rel=1e-4)
