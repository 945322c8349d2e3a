"""Run by `accelerate launch` in test_zero.py, with DeepSpeed's first stage.

zero_in_processes.py steps OUT BATCH_SIZE GRAD_ACCUM CASE...
zero_in_processes.py run OUT OBJECTIVE
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

import modlab
from tests.helpers.deepspeed_on_cpu import launched_with_deepspeed
from tests.helpers.runs import began, model_for, rows
from tests.helpers.steps import after_steps


def main(what: str, out: Path, *more: str) -> None:
    launched_with_deepspeed()
    if what == "steps":
        batch_size, grad_accum, *cases = more
        found = {case: after_steps(case, int(batch_size), int(grad_accum)) for case in cases}
        torch.save(found, out / f"rank_{torch.distributed.get_rank()}.pt")
    else:
        run(out, more[0])


def run(out: Path, objective: str) -> None:
    """A run that is taken up; the model is afterwards as before, but for its weights."""
    model = model_for(objective)
    before = {name: (p.dtype, p.requires_grad) for name, p in model.named_parameters()}
    result = modlab.train(model, rows(), began(out, 2, objective), eval_data=rows()[:3])
    assert {name: (p.dtype, p.requires_grad) for name, p in model.named_parameters()} == before
    ids = rows()[torch.distributed.get_rank() :][:2]
    model(ids, labels=ids).loss.backward()  # with no hook of the engine's, each process has its own gradients
    assert model.model.layers[1].mlp.up_proj.weight.grad.norm() > 0
    torch.save(result.history.to_dict("list"), out / f"history_{torch.distributed.get_rank()}.pt")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), *sys.argv[3:])
