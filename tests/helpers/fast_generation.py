"""Models, prompts and comparisons that the tests of fast generation share."""

from __future__ import annotations

import functools
from typing import Any

import torch

import modlab
from modlab.engine.compiled import Compiler
from modlab.engine.engine import Engine
from modlab.engine.prefill import prefill
from modlab.engine.tables import LayerStep
from tests.helpers.models import routed_llama

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
NEW = 40
SETTINGS = [
    {"do_sample": True, "temperature": 0.7, "top_k": 20},
    {"repetition_penalty": 1.3},
    {"num_return_sequences": 3, "do_sample": True},
]
"""Of `generate`, under which the tokens are the ordinary path's too."""

llama_on_device = functools.partial(routed_llama, device=DEVICE, scale=2.4)
"""The tiny converted Llama where its engine is tested, with few undecided gates."""


def prompts(*lengths: int, seed: int = 0, vocabulary: int = 500) -> dict[str, torch.Tensor]:
    """Random prompts, padded on the left."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, vocabulary, (len(lengths), max(lengths)), generator=generator)
    mask = torch.ones_like(ids)
    for row, n in enumerate(lengths):
        mask[row, : max(lengths) - n] = 0
    ids[mask == 0] = 0
    return {"input_ids": ids.to(DEVICE), "attention_mask": mask.to(DEVICE)}


def generated(model: Any, inputs: dict[str, torch.Tensor], **kwargs: Any) -> list[list[int]]:
    torch.manual_seed(3)
    return model.generate(**inputs, **{"do_sample": False, "max_new_tokens": NEW, **kwargs}).tolist()


def both_ways(model: Any, inputs: dict[str, torch.Tensor], **kwargs: Any) -> dict[str, Any]:
    """Generates the ordinary and the fast way, checks that the tokens are the same; what the report says."""
    want = generated(model, inputs, **kwargs)
    modlab.enable_fast_generation(model, compile=False)
    got = generated(model, inputs, **kwargs)
    last = modlab.fast_generation_report(model)["last"]
    modlab.disable_fast_generation(model)
    assert last["fast"], last["why"]
    assert got == want
    return last


def use_engine(model: Any, **settings: Any) -> Engine:
    """Switches fast generation on with an engine of these settings, uncompiled and unchecked."""
    modlab.enable_fast_generation(model, compile=False, check=False)
    engine = model.__dict__["mod_engine"] = Engine(model, compile=False, **settings)
    return engine


def stepped(
    engine: Engine, ids: torch.Tensor, mask: torch.Tensor, prompt: int, *bounds: int
) -> tuple[list[Any], list[LayerStep]]:
    """Runs `prompt` of the tokens at once and the others one by one, whatever they were chosen to be.

    Args:
        ids: token ids of the rows [B, T].
        mask: of the prompts, at least [B, prompt].
        bounds: what `prefill` takes after them.

    Returns:
        the buffers and the tables of all layers.
    """
    with torch.no_grad():
        _, buffers, counts = prefill(engine, ids[:, :prompt], mask[:, :prompt], *bounds)
        step = engine.step(len(ids))
        step.tables.attach(buffers, prompt, counts)
        for at in range(prompt, ids.shape[1]):
            step.tables.choice.token.copy_(ids[:, at, None])
            step.run()
        step.tables.read_lengths()
    return buffers, step.tables.layers


def masks_of_two_rows(model: Any, kept: str, length: int) -> dict[int, torch.Tensor]:
    """Forced routing by layer, bool [2, length]: "all", "none", "some" tokens kept, or one of the "rows"."""
    generator = torch.Generator().manual_seed(2)
    share = {"all": 1.0, "none": 0.0, "some": 0.5, "rows": 0.0}[kept]
    masks = {i: torch.rand(2, length, generator=generator) < share for i in model.mod.layers}
    if kept == "rows":  # one row keeps everything, the other nothing
        for mask in masks.values():
            mask[1] = True
    return masks


def stored_at_thresholds(model: Any, inputs: dict[str, torch.Tensor], thresholds: Any) -> list[int]:
    """Tokens stored in all layers after a generation at each threshold, fast generation on."""
    totals = []
    for p in thresholds:
        modlab.set_threshold(model, p)
        generated(model, inputs, eos_token_id=None)
        totals.append(sum(map(sum, modlab.fast_generation_report(model)["last"]["kept_tokens"])))
    return totals


class LayersOnly(Compiler):
    """Leaves what stands outside the layers as it is."""

    def whole(self, name: str, function: Any) -> Any:
        return function
