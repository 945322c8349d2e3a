"""Run by `accelerate launch` in test_tensor_parallel.py: one model over all processes, each with its heads.

spread_in_processes.py MODEL FEW ROUNDED OUT

FEW is a model with fewer KV heads than there are processes, ROUNDED MODEL with keys and values in eight bits.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

import modlab
from modlab.errors import ModlabError
from modlab.warn import ModlabWarning
from tests.helpers.spread import GATES, found_by


def main(folder: str, few: str, rounded: str, out: Path) -> None:
    warnings.simplefilter("ignore")  # transformers renames the argument
    model = AutoModelForCausalLM.from_pretrained(folder, tp_plan="auto").eval()
    part = sum(getattr(p, "to_local", lambda p=p: p)().numel() for p in model.parameters())
    too_few = AutoModelForCausalLM.from_pretrained(few, tp_plan="auto").eval()
    refused = {
        "prompt": refusal(model, skip="prompt"),
        "kv+prompt": refusal(model, skip="kv+prompt", gates="kv_head"),
        "few": refusal(too_few, gates="kv_head"),
        "int8": refusal(model, kv_cache_dtype="int8"),
    }
    told = {"recipe": warning_of(lambda: modlab.recipe("default", model, steps=1))}
    told["loaded"] = warning_of(lambda: modlab.load(rounded, tp_plan="auto"))
    modlab.convert(model, modlab.MoDConfig(layers="all"))
    refused["int8, live"] = refusal_of(lambda: modlab.set_kv_cache_dtype(model, "int8"))
    refused["fast"] = refusal_of(lambda: modlab.enable_fast_generation(model))
    modlab.revert(model)
    refused["fast, dense"] = refusal_of(lambda: modlab.enable_fast_generation(model))
    found = {gates: found_by(model, gates) for gates in GATES}
    rank = torch.distributed.get_rank()
    torch.save({"refused": refused, "told": told, "part": part} | found, out / f"rank_{rank}.pt")


def refusal(model: Any, **settings: Any) -> str:
    """Why the model cannot be converted so."""
    before = {name: type(module) for name, module in model.named_modules()}
    said = refusal_of(lambda: modlab.convert(model, modlab.MoDConfig(**settings)))
    assert {name: type(module) for name, module in model.named_modules()} == before
    return said


def warning_of(action: Callable[[], Any]) -> tuple[str, str]:
    """What modlab says to something that is done otherwise, and how keys and values are stored then."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        made, *_ = action()
    said = " ".join(str(one.message) for one in caught if issubclass(one.category, ModlabWarning))
    config = made.mod.config if isinstance(made, torch.nn.Module) else made
    return said, config.kv_cache_dtype


def refusal_of(action: Callable[[], object]) -> str:
    """What is said to something that cannot be done; "" if it can."""
    try:
        action()
    except ModlabError as error:
        return str(error)
    return ""


if __name__ == "__main__":
    main(*sys.argv[1:4], Path(sys.argv[4]))
