"""`modlab.fit_routers`: routers in one forward pass over some text, without training.

Each row is a text that is read twice. What the second copy reads of the first says what each key is worth
(`scores.py`); linear gates are solved for in closed form, their hidden layer is fitted on what these leave
(`regression.py`). Usable at 2x at once, and the start from which distillation goes further.

Shape letters: C tokens of one copy.
"""

from __future__ import annotations

import contextlib
import copy
import math
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from modlab.errors import ModlabError
from modlab.hf.anatomy import decoder_layers
from modlab.hf.model import check_model, context_length, device_of, eval_mode
from modlab.routing.router import Router
from modlab.routing.state import Routing, routing_of, set_threshold, thresholds_restored
from modlab.routing.trained import Trained
from modlab.training.calibration import calibrate_trained, common, keep_with_recent, saving_text
from modlab.training.contexts import contexts, prompt_ids
from modlab.training.fit_config import FitConfig
from modlab.training.fit_pass import FitPass, sample_size

ON_GPU = {"tokens": 196_608, "context": 2048, "batch_size": 4, "hidden_steps": 400}
ON_CPU = {"tokens": 16_384, "context": 1024, "batch_size": 1, "hidden_steps": 0}
SAVINGS = (1.5, 2.0, 3.0, 4.0)
"""Whose thresholds fitted routers know."""

CALIBRATION_TOKENS = 4096
"""On a CPU, eight times as many on a GPU: read a few times for the thresholds."""


@dataclass
class Fit:
    """What `fit_routers` has done.

    Attributes:
        tokens: of text that routers were fitted to.
        r2: share of the variance of log scores within held-out rows that the gates explain.
        r2_linear: the same of their linear part alone.
        keep_ratio: share of held-out text that is kept now, mean over routed layers.
        seconds: all of it.
        keep_ratio_by_layer: of each routed layer.
    """

    tokens: int
    r2: float
    r2_linear: float
    keep_ratio: float
    seconds: float
    keep_ratio_by_layer: dict[int, float] = field(default_factory=dict)

    def __repr__(self) -> str:
        """What a notebook shows: no more digits than say something."""
        return (
            f"Fit(tokens={self.tokens}, r2={self.r2:.3f}, r2_linear={self.r2_linear:.3f}, "
            f"keep_ratio={self.keep_ratio:.3f}, seconds={self.seconds:.0f})"
        )


def fit_routers(
    model: Any, data: Any, config: FitConfig | None = None, *, tokenizer: Any = None, progress: bool = True
) -> Fit:
    """Fits the routers of a converted model to what keys are worth, and sets thresholds; nothing is trained.

    One forward pass a row of [text, "repeat it", text] with the model's own dense attention, then a system of
    linear equations a layer. Works for every model type that `skip="kv"` routes, quantized bases included.
    Memory: one forward and (D + 1)² numbers a layer; where a hidden layer is fitted, up to twice `sample_mib`
    and, for a step of layers that are fitted at once, up to a GiB more.

    Args:
        model: converted with `skip="kv"`; its routers and thresholds are overwritten. What was studied is
            `MoDConfig(layers="all", gates="kv_head", router_hidden=16)` (`modlab.recipe("quick", model)`).
        data: text like that of later use: a source of `modlab.data.packed` (file, folder, data set of the
            hub, "python"), a list of texts, or token rows.
        config: see `FitConfig`.
        tokenizer: for texts, and for what asks for the repetition; token rows can do without.
        progress: show a progress bar, with R² on rows that were not fitted to yet.

    Returns:
        `Fit`: R² on held-out rows, and the keep ratio that the thresholds give there.

    Raises:
        ModlabError: a dense model, another skip (of `"prompt"` and `"kv+prompt"` projections are fitted, by
            `fit_projections`), adapters around the routers, too little text. Routers and thresholds are then
            as before, as they are after Ctrl-C.
    """
    config = FitConfig() if config is None else config
    config.check()
    check_model(model)
    _check_routers(model, routing_of(model))
    began = time.monotonic()
    device = device_of(model)
    on_gpu = device.type == "cuda"
    chosen = (ON_GPU if on_gpu else ON_CPU) | _given(config)
    prompt = prompt_ids(model, tokenizer).to(device)
    length = copy_length(model, config.context, chosen["context"], len(prompt))
    rows = contexts(model, data, tokenizer, length, chosen["tokens"], config.seed)
    fitted = len(rows) - max(1, round(config.held_out * len(rows)))
    steps = FitPass(
        model, prompt, ridge=config.ridge, hidden_steps=chosen["hidden_steps"],
        sample=sample_size(model, config.sample_mib), tokens=fitted * length, seed=config.seed,
    )  # fmt: skip
    with _undone_on_error(model):
        with eval_mode(model), torch.no_grad():
            _run(steps, rows, fitted, chosen["batch_size"], progress)
        expected = steps.open(config.keep_ratio)
        set_threshold(model, 0.5)
        read = rows[fitted:][: max(1, CALIBRATION_TOKENS * (8 if on_gpu else 1) // length)]
        routing_of(model).forget_origin()  # before thresholds are compared with those of other routers
        kept = _calibrated(model, read.to(device), config.keep_ratio)
        routing_of(model).trained = _trained(model, steps, config, fitted * length)
    mean = statistics.fmean(kept.values()) if kept else expected
    seconds = time.monotonic() - began
    return Fit(fitted * length, steps.held.r2, steps.held_linear.r2, mean, seconds, kept)


def _run(steps: FitPass, rows: Tensor, fitted: int, batch_size: int, progress: bool) -> None:
    """All forwards, and the fits between."""
    device = steps.prompt.device
    with tqdm(total=len(rows), desc="Fitting routers", unit="row", disable=not progress) as bar:
        done, solve_at = 0, batch_size
        for part in rows[:fitted].split(batch_size):
            steps.fit(part.to(device))
            done += len(part)
            bar.update(len(part))
            bar.set_postfix_str(_shown(steps.ahead.r2))
            if solve_at <= done < fitted:  # twice as many each time
                steps.solve()
                solve_at = 2 * done
        steps.finish()
        for part in rows[fitted:].split(batch_size):
            steps.hold(part.to(device))
            bar.update(len(part))
            bar.set_postfix_str(_shown(steps.held.r2))


def _trained(model: Any, steps: FitPass, config: FitConfig, tokens: int) -> Trained:
    """What is known of the routers: thresholds from 1.5x to 4x, beyond which scores alone do not carry, and
    the recent tokens that go with them in texts of `saving_text` tokens."""
    asked, savings = steps.logit_keeping(config.keep_ratio), {}
    recent: dict[float, int] = {}
    length = saving_text(model, steps.length)
    for saving in SAVINGS:
        with thresholds_restored(model):
            wanted = keep_with_recent(model, config.recent_range, saving, length)
            recent[saving] = model.mod.config.keep_recent
        if wanted > 0:
            savings[saving] = 1 / (1 + math.exp(asked - steps.logit_keeping(wanted)))
    rising = common({saving: {0: p} for saving, p in savings.items() if 0 < p < 1})
    method = f"fitted to scores of {tokens:,} tokens in closed form, nothing trained"
    recent = {saving: recent[saving] for saving in rising} if config.recent_range is not None else {}
    return Trained(savings=rising, seq_len=length, recent=recent, tokens=tokens, method=method)


def _shown(r2: float) -> str:
    return "" if r2 != r2 else f"R² {r2:.3f}"


def _given(config: FitConfig) -> dict[str, int]:
    names = ("tokens", "batch_size", "hidden_steps")
    return {name: value for name in names if (value := getattr(config, name)) is not None}


def copy_length(model: Any, asked: int | None, usual: int, prompt: int) -> int:
    """Tokens of one copy, two of which fit into the model's context with the prompt between them.

    Args:
        asked: as of `FitConfig.context`.
        usual: of a model whose context has room for them, where none are asked for.
        prompt: tokens of the prompt.

    Raises:
        ModlabError: more are asked for than fit.
    """
    context = context_length(model)
    most = None if context is None else (context - prompt) // 2
    if asked is None:
        return usual if most is None else min(usual, most)
    if most is not None and asked > most:
        raise ModlabError(
            f"context={asked}: a row holds it twice, with {prompt} tokens between, and the model's context "
            f"is {context}: give at most {most}."
        )
    return asked


def why_not_fitted(routing: Routing) -> str:
    """Why routers of this model cannot be fitted to what its dense attention shows; "" if they can."""
    skip = routing.skip
    if skip.decides_itself:
        return f"skip={skip.name!r} has no routers: who leaves follows from the position alone"
    if routing.first_left < routing.num_layers:
        return (
            f"with skip={skip.name!r} routers from layer {routing.first_left} on read the state that prompt "
            "tokens leave with, and keys there come from it by projections: the dense attention says nothing "
            "of them"
        )
    if skip.gate_form(routing.config, skip.parts[0]) != "stored":
        return f"scores say what keys are worth, but this model routes {skip.words.routed}"
    return ""


def _check_routers(model: Any, routing: Routing) -> None:
    if reason := why_not_fitted(routing):
        raise ModlabError(
            f'{reason}. Distil without a fit (TrainConfig(objective="distil")), or convert with skip="kv".'
        )
    layers = decoder_layers(model)
    for i in routing.layers:
        router: Any = layers[i].mod_router
        if not isinstance(router, Router):
            raise ModlabError(
                f"the router of layer {i} is a {type(router).__name__}: fit the routers before the model "
                "gets adapters."
            )


def _calibrated(model: Any, rows: Tensor, keep_ratio: float) -> dict[int, float]:
    """Corrects the gates by what dropping changes; keep ratios by layer, none where that could not be had."""
    if keep_ratio == 1:
        return {}
    batches = [{"input_ids": row[None]} for row in rows]
    found = calibrate_trained(
        model, batches, keep_ratio=keep_ratio, tolerance=0.01, autocast=contextlib.nullcontext
    )
    return {} if found is None else found.keep_ratio_by_layer


@contextlib.contextmanager
def _undone_on_error(model: Any) -> Iterator[None]:
    """A block that fails or is stopped leaves routers, thresholds and what is known of them as they were."""
    routing, layers = routing_of(model), decoder_layers(model)
    routers: dict[int, Any] = {i: layers[i].mod_router for i in routing.layers}
    before = {i: copy.deepcopy(router.state_dict()) for i, router in routers.items()}
    thresholds, origin = dict(routing.thresholds), (routing.source, routing.trained)
    try:
        yield
    except BaseException:
        for i, router in routers.items():
            router.load_state_dict(before[i])
        routing.thresholds.update(thresholds)
        routing.source, routing.trained = origin
        raise
