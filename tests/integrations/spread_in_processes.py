"""Run by `accelerate launch` in test_tensor_parallel.py: one model over all processes, each with its heads.

spread_in_processes.py MODEL OUT
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

import modlab
from modlab.errors import ModlabError
from tests.helpers.spread import found_by


def main(folder: str, out: Path) -> None:
    warnings.simplefilter("ignore")  # transformers renames the argument
    model = AutoModelForCausalLM.from_pretrained(folder, tp_plan="auto").eval()
    try:
        modlab.convert(model, modlab.MoDConfig(gates="kv_head"))
        refused = ""
    except ModlabError as error:
        refused = str(error)
    part = sum(getattr(p, "to_local", lambda p=p: p)().numel() for p in model.parameters())
    rank = torch.distributed.get_rank()
    torch.save({"refused": refused, "part": part} | found_by(model), out / f"rank_{rank}.pt")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
