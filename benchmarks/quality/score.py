"""Measures of a trained arm, on held-out text, with hard routing by the packed code that users run.

At the thresholds it was trained to, and at thresholds moved (`modlab.calibrate`) to other KV savings: one
trained model, many operating points.
"""

from __future__ import annotations

import contextlib
import warnings
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.quality.arms import Arm
from benchmarks.quality.corpus import Corpus
from benchmarks.quality.cost import flops_share
from benchmarks.quality.scale import Scale
from modlab.cache.stored import recent_share, unbounded_keep_ratio
from modlab.errors import ModlabError
from modlab.measure import calibrate, evaluate
from modlab.probes import generation_health, recall, retrieval
from modlab.routing.state import is_converted

SAVINGS = (1.3, 1.5, 1.8, 2.2, 2.5)
UNMOVED = ("static", "random")  # their routing does not look at thresholds
EVAL_BATCH = 8

Point = dict[str, Any]


def autocast(device: str) -> Any:
    """bf16 on a GPU, as in training."""
    return torch.autocast("cuda", torch.bfloat16) if device == "cuda" else contextlib.nullcontext()


def score(
    model: Any, arm: Arm, corpus: Corpus, scale: Scale, judge: Any, deep: bool, device: str
) -> list[Point]:
    """The operating points of a trained model, the trained one first.

    Args:
        model: dense or converted, its mechanism active.
        arm: what it is.
        corpus: held-out rows; a part of them is for calibration alone.
        scale: sizes.
        judge: the dense base, rates generated text.
        deep: also recall, retrieval and generation at the trained point and at 1.8x.
        device: "cuda" or "cpu".
    """
    calibration, corpus = _split(corpus)
    points = [_point(model, arm, corpus, scale, device) | {"point": "trained"}]
    if deep:
        points[0] |= _deep(model, corpus, scale, judge, device)
    if not is_converted(model) or arm.mechanism in UNMOVED or arm.mod is None or arm.mod.get("skip") == "mlp":
        return points
    recent = recent_share(model.mod.config, scale.seq_len)
    for saving in SAVINGS:
        keep = unbounded_keep_ratio(saving, len(model.mod.layers), scale.layers, recent)
        if not 0.02 < keep < 0.98:
            continue
        try:
            with autocast(device), warnings.catch_warnings():
                calibrate(model, calibration, keep_ratio=keep, tolerance=0.003, max_passes=15)
        except ModlabError as error:  # gates that are alike: the point does not exist
            points.append({"point": f"{saving}x", "unreachable": str(error).splitlines()[0]})
            continue
        points.append(_point(model, arm, corpus, scale, device) | {"point": f"{saving}x", "asked": keep})
        if deep and saving == 1.8:
            points[-1] |= _deep(model, corpus, scale, judge, device)
    return points


def _split(corpus: Corpus) -> tuple[list[Tensor], Corpus]:
    """Batches for calibration, and the corpus without them. They hold the sources in the shares in which they
    are scored, so that the saving asked for is the saving got; one number is fitted to them."""
    batches, rest = [], {}
    for name, rows in corpus.heldout.items():
        count = min(2 * EVAL_BATCH, max(1, len(rows) // 4))
        batches += list(rows[:count].long().split(EVAL_BATCH))
        rest[name] = rows[count:]
    return batches, replace(corpus, heldout=rest)


def _point(model: Any, arm: Arm, corpus: Corpus, scale: Scale, device: str) -> Point:
    """Loss, keep ratio, KV saving and executed operations at the present thresholds."""
    losses, tokens = {}, {}
    kept: dict[int, float] = {}
    for name, rows in corpus.heldout.items():
        torch.manual_seed(0)  # for random routing
        found = evaluate(model, rows, batch_size=EVAL_BATCH, cache=False, autocast=lambda: autocast(device))
        losses[name], tokens[name] = found.loss, found.predicted_tokens
        for layer in model.mod.layers if is_converted(model) else []:
            share = len(rows) / sum(map(len, corpus.heldout.values()))
            kept[layer] = kept.get(layer, 0.0) + share * found.keep_ratio_by_layer[layer]
    total = sum(tokens.values())
    skip = model.mod.skip.name if kept else None
    stored = {}
    if kept:
        recent = recent_share(model.mod.config, scale.seq_len)
        stored = {layer: model.mod.skip.stored_share(share, recent) for layer, share in kept.items()}
    mlp_kept = {i: float(share) for i, share in getattr(model, "mod_mlp_kept", {}).items()}
    keep_ratio = sum(kept.values()) / len(kept) if kept else 1.0
    return {
        "loss": sum(losses[n] * tokens[n] for n in losses) / total,
        "loss_by_source": losses,
        "keep_ratio": keep_ratio,
        "keep_by_layer": kept,
        "kv_saving": scale.layers / (scale.layers - len(stored) + sum(stored.values())),
        "flops_share": flops_share(
            model.config, scale.seq_len, skip, kept, mlp_kept, all_keys=arm.mechanism == "shared-kv"
        ),
        "thresholds": {i: float(p) for i, p in model.mod.thresholds.items()} if kept else {},
    }


def loss_of(model: Any, corpus: Corpus, scale: Scale, device: str) -> float:
    """Held-out loss of a dense model, over the rows that operating points are measured on."""
    loss: float = _point(model, Arm("base", "", None, kv_saving=None), _split(corpus)[1], scale, device)[
        "loss"
    ]
    return loss


def _deep(model: Any, corpus: Corpus, scale: Scale, judge: Any, device: str) -> Point:
    """Recall over distances, retrieval of values, and health of generated text."""
    if is_converted(model) and model.mod.masked:
        return {}  # generates without a cache only
    text = list(corpus.heldout["python"].long())
    settings: dict[str, Any] = {
        "distances": scale.distances, "rows": scale.recall_rows, "progress": False
    }  # fmt: skip
    with autocast(device):
        recalled = recall(model, _rows(text), **settings)
        found = retrieval(model, _rows(text), corpus.tokenizer, **settings)
        prompts, new = scale.generated
        length = min(128, scale.seq_len // 4)
        health = generation_health(
            model,
            _rows(text),
            judge=judge,
            prompts=prompts,
            prompt_tokens=length,
            new_tokens=new,
            progress=False,
        )
    return {
        "recall": recalled.to_dict("records"),
        "retrieval": found.to_dict("records"),
        "generation": health.to_dict(),
    }


def _rows(rows: list[Tensor]) -> list[Tensor]:
    return [row[None] for row in rows]
