"""The settings of a training run and their refusals."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from modlab.errors import ModlabError, check_count
from modlab.routing.recent_tokens import check_recent_range

Objective = Literal["auto", "distil", "target", "budget", "load", "bce", "none"]
Precision = Literal["auto", "bf16", "no"]

LARGEST_SEED = 2**31
"""Each process counts its rank on top, and NumPy takes 32 bits."""


@dataclass
class TrainConfig:
    """Settings of `modlab.train`. Every default works; `steps`, `tokens` or `max_minutes` says how long.

    Attributes:
        out: folder for log.jsonl, checkpoints/ and the final model/; None writes nothing.
        steps: optimiser steps.
        tokens: tokens to train on, instead of `steps` (rounded up to whole steps).
        max_minutes: with `steps` or `tokens`: this call stops after so many minutes, with a checkpoint to
            resume from. Alone: the run is that long, and all schedules follow the clock.
        batch_size: rows per process and forward.
        grad_accum: forwards per optimiser step. A step sees batch_size * grad_accum * processes rows, and its
            gradient is that of one forward over all of them. With more than one, objectives of the whole
            batch ("target", "budget", "load", "distil") take a second forward of each part, without gradient.
        lr: peak learning rate.
        router_lr: peak learning rate of the routers; None means `lr`, with objective="distil" 0.01.
        warmup: linear warm-up, in steps, or as a share of the run if below 1.
        min_lr_ratio: the cosine ends at this share of the peak.
        cooldown: share of the run, at its end, over which the rates fall along the cosine; 1 is all of it, 0
            leaves them at their peak.
        weight_decay: of matrices; vectors and routers have none.
        betas: of AdamW.
        max_grad_norm: gradients are clipped to this norm.
        mixed_precision: "bf16" autocast, "no", or "auto": bf16 on CUDA, none elsewhere. Weights and optimiser
            are fp32 during training in either case (but for a frozen base); the model gets its own dtypes
            back afterwards.
        objective: "distil" (KL to the dense model, which is the same weights with routing off, and a
            one-sided pull of the keep ratio down to its target; the base stays frozen, adapters are trained),
            "target" (a two-sided penalty pulls the gates until the thresholds keep keep_ratio),
            "budget" (the thresholds follow the gates, so that keep_ratio is kept at every step), "load" (the
            paper's), "bce" (top-k), "none", or "auto": target for threshold routing, bce for top-k, none for
            a dense model.
        keep_ratio: what "target" and "budget" aim at: mean share of tokens kept in the routed layers, in
            (0, 1]. With the default layers 0.45 is 1.8x less K/V in a model of 16 layers; `modlab.recipe`
            works it out for others.
        keep_range: one model for many thresholds; the run ends at the threshold for keep_ratio, which lies
            between these two. "budget": each step keeps another share, spread evenly between them. "distil":
            the target falls to the first, and of each two rows of a step one keeps some other share of the
            range, drawn evenly by ratio.
        recent_range: with "distil" and a keep_range: how many of the latest tokens are seen whether kept or
            not (`MoDConfig.keep_recent`), from the second at 2x less K/V to the first at 16x. Each step has
            one of these numbers, and its rows with thresholds of their own are near that saving; rows of the
            target have it too, so their `kl` goes up and down from step to step. `modlab.set_kv_saving`
            sets it with the threshold; a run ends at those of its keep_ratio.
        row_weight: with "distil" and a keep_range: rows with thresholds of their own count (the furthest
            ratio of any row by now / theirs) ** row_weight times in the loss. KL grows faster than the
            ratio, so that with 0 the furthest rows decide what routers learn; 1 lets rows of 2x say as much
            as rows of 16x.
        lam: weight of the target, budget or distillation's pull.
        per_layer: every layer has to keep keep_ratio, instead of their mean.
        alpha: weight of the load term.
        bce: weight of the top-k term.
        hold: share of the run before the ramp, in which everything is kept.
        ramp: share of the run over which the target falls from 1 to keep_ratio (with "distil": over which the
            ratio grows evenly; 0.7 was studied; 0 begins at keep_ratio: of routers that were
            fitted or trained).
        calibrate: after a whole run with "distil", "target" or "budget", shift the gates (or, where they
            enter the output, the thresholds) so that keep_ratio of the first training batches is kept, within
            0.004 (with per_layer: by each layer, within 0.02). With "distil" it is that of `eval_data`, where
            there is some: it is nearer to texts of later use than rows with repetitions are.
        what_if: share of steps, evenly spread, in which routed layers run on all tokens so that skipped
            tokens give the router a gradient too (`model.mod.what_if`); with skip="kv", in which they attend
            to all keys, weighed by their gates. The rest run packed.
        kl: weight of KL(teacher || model); needs `teacher=`.
        freeze_base: train routers only; with "distil" the base is frozen anyway, and adapters are too.
            The other weights keep their type, so that a bf16 model takes no more memory than its size and its
            activations.
        freeze_below: with a skip whose prompt tokens leave and objective="distil": routers below the point of
            leaving stay as they are, but for the shift of all gates at the begin and the end of a run, which
            takes ones that are trained (`modlab.start_from`). Nothing is computed backwards there.
        seed: of the data order and all random number generators.
        log_every: steps between two log lines (the only place where the device is waited for).
        eval_every: steps between two evaluations on `eval_data`; 0 evaluates at the end only.
        eval_batches: batches a held-out evaluation uses; 0 uses all.
        save_every: steps between two checkpoints; 0 saves one only when the run is cut short.
        keep_last: checkpoints kept.
        resume: None starts afresh and refuses a folder that holds a run; "auto" takes up the newest
            checkpoint in `out`, or starts if there is none yet; a path names the checkpoint, and later ones
            in `out` are deleted. Data, conversion, objective, batch and seed have to be as before; lengths,
            rates, weight decay, betas and other settings may change, which run.json notes.
        compile: torch.compile a dense model; of a converted one the layers, each by itself.
        num_workers: loader processes for data that is not preloaded.
    """

    out: str | Path | None = None
    steps: int | None = None
    tokens: int | None = None
    max_minutes: float | None = None
    batch_size: int = 8
    grad_accum: int = 1
    lr: float = 3e-4
    router_lr: float | None = None
    warmup: float = 0.02
    min_lr_ratio: float = 0.1
    cooldown: float = 1.0
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    max_grad_norm: float = 1.0
    mixed_precision: Precision = "auto"
    objective: Objective = "auto"
    keep_ratio: float = 0.45
    keep_range: tuple[float, float] | None = None
    recent_range: tuple[int, int] | None = None
    row_weight: float = 0.0
    lam: float = 2.0
    per_layer: bool = False
    alpha: float = 0.01
    bce: float = 0.01
    hold: float = 0.0
    ramp: float = 0.2
    calibrate: bool = True
    what_if: float = 1.0
    kl: float = 0.0
    freeze_base: bool = False
    freeze_below: bool = False
    seed: int = 0
    log_every: int = 10
    eval_every: int = 0
    eval_batches: int = 0
    save_every: int = 0
    keep_last: int = 2
    resume: str | Path | None = None
    compile: bool = False
    num_workers: int = 2

    def check(self) -> None:
        """Refuse impossible settings, each with what to do.

        Raises:
            ModlabError: a field has a value that cannot work.
        """
        if self.steps is not None and self.tokens is not None:
            raise ModlabError(f"Both steps={self.steps} and tokens={self.tokens} are set; give one of them.")
        if self.steps is None and self.tokens is None and self.max_minutes is None:
            raise ModlabError("How long to train? Set one of steps, tokens or max_minutes.")
        self._check_counts()
        for name in ("max_minutes", "router_lr"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ModlabError(f"{name}={value} has to be above 0.")
        for name in ("lr", "max_grad_norm"):
            if not getattr(self, name) > 0:
                raise ModlabError(f"{name}={getattr(self, name)} has to be above 0.")
        for name in ("warmup", "weight_decay", "row_weight", "lam", "alpha", "bce", "kl"):
            if not getattr(self, name) >= 0:
                raise ModlabError(f"{name}={getattr(self, name)} has to be 0 or more.")
        for name in ("hold", "ramp", "what_if", "min_lr_ratio", "cooldown"):
            if not 0 <= getattr(self, name) <= 1:
                raise ModlabError(f"{name}={getattr(self, name)} is a share and has to lie in [0, 1].")
        if not 0 < self.keep_ratio <= 1:
            raise ModlabError(
                f"keep_ratio={self.keep_ratio} has to lie in (0, 1]: 0.25 keeps a quarter, 1 everything."
            )
        if self.hold + self.ramp > 1:
            raise ModlabError(f"hold={self.hold} and ramp={self.ramp} together are more than the whole run.")
        if self.keep_range is not None:
            self._check_range(self.keep_range)
        self._check_distils()
        for name, allowed in (("objective", Objective), ("mixed_precision", Precision)):
            if getattr(self, name) not in get_args(allowed):
                raise ModlabError(
                    f"{name}={getattr(self, name)!r} is not one of {', '.join(get_args(allowed))}."
                )
        if len(self.betas) != 2 or not all(0 <= b < 1 for b in self.betas):
            raise ModlabError(f"betas={self.betas} has to be two numbers in [0, 1).")
        if self.out is None and (self.save_every or self.resume is not None):
            raise ModlabError(f"save_every={self.save_every}, resume={self.resume!r} need a folder: set out.")

    def _check_distils(self) -> None:
        """What only a distillation has."""
        if self.recent_range is not None:
            check_recent_range(self.recent_range)
            if self.objective != "distil" or self.keep_range is None:
                raise ModlabError(
                    f"recent_range={self.recent_range} needs objective='distil' and a keep_range: the tokens "
                    "go with savings."
                )
        if self.freeze_below and self.objective != "distil":
            raise ModlabError(
                f"freeze_below=True needs objective='distil', not {self.objective!r}: others train the base "
                "too, or know of no point of leaving."
            )
        if self.row_weight and (self.objective != "distil" or self.keep_range is None):
            raise ModlabError(
                f"row_weight={self.row_weight} needs objective='distil' and a keep_range: it weighs rows by "
                "their savings."
            )

    def _check_range(self, keep_range: tuple[float, ...]) -> None:
        """Two shares around the target, and with "distil" a row for either kind of threshold."""
        if len(keep_range) != 2:
            raise ModlabError(f"keep_range={keep_range} has to be two shares, (low, high).")
        low, high = keep_range
        if not 0 < low <= self.keep_ratio <= high <= 1:
            raise ModlabError(
                f"keep_range={keep_range} has to be (low, high) in (0, 1] with keep_ratio="
                f"{self.keep_ratio} between them."
            )
        if self.objective not in ("budget", "distil"):
            raise ModlabError(f"keep_range needs objective='budget' or 'distil'; it is {self.objective!r}.")
        if self.objective == "distil" and self.batch_size * self.grad_accum < 2:
            raise ModlabError(
                "keep_range gives every other row of a step a threshold of its own, so steps need two rows, "
                f"not batch_size={self.batch_size} and grad_accum={self.grad_accum}: raise one of them, or "
                "leave keep_range out."
            )

    def _check_counts(self) -> None:
        """Whole numbers; generators of random numbers take no seed below 0 nor beyond 32 bits."""
        for name in ("steps", "tokens"):
            if (value := getattr(self, name)) is not None:
                check_count(name, value)
        for name in ("batch_size", "grad_accum", "log_every", "keep_last"):
            check_count(name, getattr(self, name))
        for name in ("seed", "eval_every", "eval_batches", "save_every", "num_workers"):
            check_count(name, getattr(self, name), least=0)
        if self.seed >= LARGEST_SEED:
            raise ModlabError(f"seed={self.seed}: give a whole number below {LARGEST_SEED:,}.")

    def to_dict(self) -> dict[str, Any]:
        """The settings as JSON-ready values."""
        return {k: str(v) if isinstance(v, Path) else v for k, v in asdict(self).items()}
