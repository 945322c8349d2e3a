"""How a run ends: the model keeps the share of tokens that was asked for, on the run's own data."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable
from typing import Any

import torch

from modlab.cache.stored import recent_share, unbounded_keep_ratio
from modlab.errors import ModlabError
from modlab.hf.anatomy import attention_name, decoder_layers
from modlab.hf.model import context_length
from modlab.measure import Calibration, calibrate
from modlab.routing.recent_tokens import CALIBRATED, SAVING_TEXT, recent_at
from modlab.routing.router import Router, logit_of
from modlab.routing.state import set_keep_recent, thresholds_restored
from modlab.training.config import TrainConfig
from modlab.training.loader import Batch, Batches
from modlab.training.model import fresh_routers
from modlab.training.sharding import reshard
from modlab.warn import warn

BEGIN = 0.9
"""Keep ratio at which distillation begins at most."""

CALIBRATION_TOKENS = 2**17  # on a GPU; a sixteenth of it on a CPU


def calibrate_trained(
    model: Any,
    batches: list[Batch],
    *,
    keep_ratio: float,
    per_layer: bool = False,
    tolerance: float | None = None,
    autocast: Callable[[], contextlib.AbstractContextManager[Any]],
    accelerator: Any = None,
) -> Calibration | None:
    """Makes the model keep `keep_ratio`; leaves it as trained, with a warning, where that cannot be had or is
    interrupted.

    Where the gate only decides, its bias is shifted and the thresholds stay, which comes to the same: a user
    finds the model at the threshold it was trained with, not at 0.9998. Where the gate enters the output
    (paper, fused), or an adapter holds a copy of the router, the thresholds move.

    Args:
        batches: to read, on the model's device or not.
        keep_ratio, per_layer: as of `calibrate`.
        tolerance: 0.004 by default, 0.02 of each layer.
        autocast: gives the context that forwards run in.

    Returns:
        what was measured, with thresholds as they were found before any shift; None after a warning, and
        where the skip decides by itself.
    """
    routing, layers = model.mod, decoder_layers(model)
    if routing.skip.decides_itself:
        return None  # no gate decides
    routers: dict[int, Any] = {i: layers[i].mod_router for i in routing.layers}
    before = dict(routing.thresholds)
    shifted = routing.config.gate == "straight-through" and all(
        isinstance(router, Router) and before[i] > 0 for i, router in routers.items()
    )
    try:
        if shifted:  # from here on the gates count from each layer's own threshold
            _shift(model, {i: -logit_of(p) for i, p in before.items()})
            routing.thresholds.update(dict.fromkeys(before, 0.5))
        with autocast():
            found = calibrate(
                model,
                batches,
                keep_ratio=keep_ratio,
                per_layer=per_layer,
                tolerance=tolerance or (0.02 if per_layer else 0.004),
                max_passes=15,
                accelerator=accelerator,
            )
        if shifted:
            _shift(model, {i: -logit_of(p) for i, p in found.items()})
        return found
    except (ModlabError, RuntimeError, KeyboardInterrupt) as error:
        routing.thresholds.update(dict.fromkeys(before, 0.5) if shifted else before)
        why = str(error) or type(error).__name__
        warn(f"The thresholds stay as trained: {why}")
        return None
    finally:
        if shifted:
            _shift(model, {i: logit_of(p) for i, p in before.items()})
            routing.thresholds.update(before)


def open_gates(
    model: Any,
    batches: list[Batch],
    autocast: Callable[[], contextlib.AbstractContextManager[Any]],
    accelerator: Any = None,
    target: float = 1.0,
) -> None:
    """Before distillation: routers that were fitted or trained are shifted to where it begins, `BEGIN` or the
    `target` of its first step if that is less (`ramp=0`). Fresh ones, whose gates are all alike, are open."""
    if model.mod.skip.decides_itself:
        return
    if len(fresh_routers(model)) < len(model.mod.layers):
        calibrate_trained(
            model, batches, keep_ratio=min(BEGIN, target), tolerance=0.02, autocast=autocast,
            accelerator=accelerator,
        )  # fmt: skip


def thresholds_by_ratio(
    model: Any,
    batches: list[Batch],
    keep_range: tuple[float, float],
    recent_range: tuple[int, int] | None,
    autocast: Callable[[], contextlib.AbstractContextManager[Any]],
    accelerator: Any = None,
) -> dict[float, dict[int, float]]:
    """Thresholds by layer for the savings of `CALIBRATED` in texts of `saving_text` tokens, the recent ones
    counted, as far as they lie within the keep ratios that were trained; the model's own stay."""
    found: dict[float, dict[int, float]] = {}
    low, high = keep_range
    context = saving_text(model, batches[0]["input_ids"].shape[1])
    for ratio in CALIBRATED:
        try:
            with thresholds_restored(model), autocast():
                keep_ratio = keep_with_recent(model, recent_range, ratio, context)
                if keep_ratio < low <= 1 / ratio:  # for the recent tokens' sake
                    warn(
                        f"No threshold for {ratio:g}x: in texts of {context:,} tokens gates would have to "
                        f"keep {keep_ratio:.3g}, less than the {low:g} they are trained to (keep_range)."
                    )
                if low <= keep_ratio <= high:
                    found[ratio] = dict(
                        calibrate(
                            model, batches, keep_ratio=keep_ratio, tolerance=0.05 * keep_ratio, max_passes=15,
                            accelerator=accelerator,
                        )
                    )  # fmt: skip
        except ModlabError as error:
            warn(f"No threshold for {ratio:g}x: {error}")
    return found


def saving_text(model: Any, row: int) -> int:
    """Tokens of the text in which savings are counted: as many as rows have, 8,192 where these are shorter
    and the model's context is not."""
    context = context_length(model)
    return max(row, SAVING_TEXT if context is None else min(SAVING_TEXT, context))


def keep_for_saving(model: Any, kv_saving: float, context: int) -> float:
    """The keep ratio of the routed layers at which a text of `context` tokens takes so many times fewer
    bytes, its latest tokens, which are there anyway, included; not above 0 where too few layers are routed,
    or the text is too short."""
    holding = sum(attention_name(layer) is not None for layer in decoder_layers(model))
    recent = recent_share(model.mod.config, context)
    return unbounded_keep_ratio(kv_saving, len(model.mod.layers), holding, recent)


def keep_with_recent(
    model: Any, recent_range: tuple[int, int] | None, kv_saving: float, context: int
) -> float:
    """As `keep_for_saving`, with the recent tokens that go with the saving, which the model has from here on;
    without a range with those that it has."""
    if recent_range is not None:
        set_keep_recent(model, recent_at(recent_range, kv_saving, context, model.mod.most_recent))
    return keep_for_saving(model, kv_saving, context)


def saving_for_keep(model: Any, keep_ratio: float) -> float:
    """The KV saving of that keep ratio where the recent tokens do not count, as `modlab.recipe` reckons."""
    holding = sum(attention_name(layer) is not None for layer in decoder_layers(model))
    return holding / (holding - len(model.mod.layers) * (1 - keep_ratio))


def common(thresholds: dict[float, dict[int, float]]) -> dict[float, float]:
    """Thresholds by saving where all layers share one, none otherwise; only as far as they rise."""
    found: dict[float, float] = {}
    for saving, by_layer in sorted(thresholds.items()):
        p = set(by_layer.values())
        if len(p) == 1 and (value := p.pop()) > max(found.values(), default=0.0):
            found[saving] = value
    return found


def calibration_batches(
    source: Batches, config: TrainConfig, latest: list[Batch], world: int, device: torch.device
) -> list[Batch]:
    """Training batches, the same tokens in any number of processes, resumed or not.

    They are the first eight batches' rows, or the last step's where the data can be had only once.

    Args:
        source: the run's data.
        config: its settings.
        latest: the last step's batches, of all processes.
        world: number of processes.
        device: the model's.
    """
    tokens = CALIBRATION_TOKENS if device.type == "cuda" else CALIBRATION_TOKENS // 16
    rows, length = source.first["input_ids"].shape
    if source.kind == "stream":
        gathered = latest
    elif source.kind == "rows":
        left = min(8 * config.batch_size * world, max(1, tokens // length))
        gathered = []
        for batch in source.iterate(config.batch_size, seed=config.seed, epochs=1):
            gathered.append({name: value[:left] for name, value in batch.items()})
            left -= len(batch["input_ids"])
            if left <= 0:
                break
    else:
        most = min(8 * world, max(1, tokens // (rows * length)))
        gathered = list(itertools.islice(source.iterate(epochs=1), most))
    return [{k: v for k, v in batch.items() if k != "labels"} for batch in gathered]


@torch.no_grad()
def _shift(model: Any, by: dict[int, float]) -> None:
    """Adds to the routers' biases, in place."""
    reshard(model)  # FSDP2 may have left copies of them behind a forward, whose changes would be lost
    layers: list[Any] = decoder_layers(model)
    for i, amount in by.items():
        layers[i].mod_router.bias.add_(amount)
