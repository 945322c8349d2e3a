"""Refusals of `modlab.train` that need the model or the data; `TrainConfig` has its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from modlab.data.batches import IGNORE, check_vocabulary
from modlab.errors import ModlabError
from modlab.hf.model import context_length, vocabulary_size
from modlab.routing.state import is_converted
from modlab.training.config import Objective, TrainConfig
from modlab.training.loader import Batches
from modlab.training.model import fresh_routers
from modlab.training.schedule import keep_target
from modlab.warn import warn

OF_GATES = (
    "keep_ratio", "keep_range", "recent_range", "per_layer", "lam", "alpha", "bce", "hold", "ramp", "what_if",
    "router_lr",
)  # fmt: skip
"""Settings of a run that say how gates learn what to keep."""


def choose_objective(config: TrainConfig, model: Any) -> Objective:
    """The objective that `config` means for this model.

    Raises:
        ModlabError: the settings do not fit a dense, a threshold or a top-k model.
    """
    wanted = config.objective
    if not is_converted(model):
        if wanted not in ("auto", "none"):
            raise ModlabError(
                f"objective={wanted!r} needs routers, but the model is dense: modlab.convert(model) first."
            )
        if config.freeze_base:
            raise ModlabError(
                "freeze_base=True trains routers only, but the model is dense: modlab.convert(model) first."
            )
        return "none"
    operator = model.mod.config.operator
    fitting: tuple[Objective, ...] = (
        ("bce", "none") if operator == "topk" else ("target", "budget", "load", "distil", "none")
    )
    kind = f"{operator} routing"
    if model.mod.skip.decides_itself:
        fitting = ("none", "distil")
        kind = f"skip={model.mod.skip.name!r}, where no gate decides"
        _check_no_gates(config, kind)
    if wanted == "auto":
        return fitting[0]
    if wanted not in fitting:
        raise ModlabError(f"objective={wanted!r} does not fit {kind}; use one of {', '.join(fitting)}.")
    return wanted


def _check_no_gates(config: TrainConfig, kind: str) -> None:
    for name in OF_GATES:
        if getattr(config, name) != getattr(TrainConfig, name):
            raise ModlabError(
                f"{name}={getattr(config, name)!r} says what gates are to keep and does not fit {kind}: "
                "leave it out."
            )


def check_model(config: TrainConfig, model: Any, teacher: Any) -> Objective:
    """All that is known to be wrong of a run before there is data, so before anything is fitted for it.

    Returns:
        the objective that `config` means for this model.

    Raises:
        ModlabError: settings, teacher or model do not fit one another.
    """
    objective = choose_objective(config, model)
    check_recent(config, model)
    check_below(config, model)
    check_teacher(config, model, teacher)
    check_saved(config, model)
    return objective


def check_teacher(config: TrainConfig, model: Any, teacher: Any) -> None:
    """A weight needs a teacher, a teacher a weight, and both models one vocabulary; "distil" is its own."""
    if config.objective == "distil" and (teacher is not None or config.kl):
        raise ModlabError(
            "objective='distil' learns from the model itself, with routing off: leave out the teacher and kl."
            " To learn from another model train the plain form: `modlab convert MODEL FOLDER`, then `modlab "
            "train FOLDER --kl 1 --teacher TEACHER`."
        )
    if config.kl and teacher is None:
        raise ModlabError(f"kl={config.kl} needs a teacher: train(..., teacher=dense_model), or set kl=0.")
    if teacher is None:
        return
    if not config.kl:
        raise ModlabError(
            "A teacher is given but kl=0, so it would do nothing: set kl (1.0 is a good start) or drop it."
        )
    if teacher is model:
        raise ModlabError("The teacher is the model itself. Load it a second time: its KL would always be 0.")
    if is_converted(teacher):
        raise ModlabError("The teacher is converted; a dense model is needed (modlab.revert gives it back).")
    ours, theirs = vocabulary_size(model), vocabulary_size(teacher)
    if ours != theirs:
        raise ModlabError(
            f"The teacher has {theirs} tokens in its vocabulary and the model {ours}: they have to agree."
        )


def check_fit(model: Any, source: Batches, what: str) -> None:
    """The data's first batch (all of it, where it is in memory) fits the model's context and vocabulary."""
    ids = source.data if source.preloaded else source.first["input_ids"]
    check_length(model, ids.shape[1], what)
    if ids.shape[1] < 2:
        raise ModlabError(f"{what} has rows of one token; two are needed to predict one from another.")
    check_vocabulary({**source.first, "input_ids": ids}, vocabulary_size(model), what)
    if source.predicts_nothing:
        raise ModlabError(
            f"{what} has no token to predict: all are padding (attention_mask), or every label is {IGNORE}."
        )


def check_recent(config: TrainConfig, model: Any) -> None:
    """Recent tokens by saving need a skip that has such.

    Raises:
        ModlabError: it has none.
    """
    if config.recent_range is not None and is_converted(model) and model.mod.recent is None:
        raise ModlabError(
            f"recent_range={config.recent_range}: with skip={model.mod.skip.name!r} no token is seen for "
            "being recent. Leave it out (with a recipe: recent_range=None)."
        )


def check_below(config: TrainConfig, model: Any) -> None:
    """There is something above what is to stay as it is.

    Raises:
        ModlabError: prompt tokens do not leave this model.
    """
    if config.freeze_below and (not is_converted(model) or model.mod.first_left >= model.mod.num_layers):
        kind = f"skip={model.mod.skip.name!r}" if is_converted(model) else "a dense model"
        raise ModlabError(
            f"freeze_below=True: with {kind} no prompt token leaves, and nothing would be trained. Leave it "
            "out, or convert with skip='kv+prompt'."
        )


def check_begin(config: TrainConfig, model: Any) -> None:
    """A distillation that begins at the keep ratio aimed at has routers that know which tokens matter.

    Raises:
        ModlabError: some are as conversion made them: their gates would all shut at once.
    """
    if config.objective != "distil" or not is_converted(model) or model.mod.skip.decides_itself:
        return
    if config.freeze_below and (shut := [i for i in fresh_routers(model) if i < model.mod.first_left]):
        raise ModlabError(
            f"freeze_below=True leaves routers below the point of leaving as they are, and those of layers "
            f"{shut} are fresh: they would keep everything. Start from trained ones (modlab.start_from), or "
            "leave it out (--no-freeze-below)."
        )
    target = keep_target(config, 0, 0.0)
    if target < 1 and (fresh := fresh_routers(model)):
        which = "all layers" if fresh == model.mod.layers else f"layers {fresh}"
        raise ModlabError(
            f"ramp={config.ramp:g} begins at a keep ratio of {target:g}, but the routers of {which} are "
            "fresh: their gates would be shut before they have learnt which tokens are needed. Give a ramp "
            "(0.7 was studied), fit the routers first (modlab.fit_routers), or start from trained ones "
            "(modlab.start_from)."
        )


def check_saved(config: TrainConfig, model: Any) -> None:
    """The run can end as it is to end, with the model in its folder; of adapters only those are saved.

    Raises:
        ModlabError: transformers cannot write this quantized model.
    """
    from modlab.saving.gguf import check_saving

    if config.out is None or hasattr(model, "get_base_model"):
        return
    try:
        check_saving(model)
    except ModlabError as error:
        raise ModlabError(
            f"out={str(config.out)!r}: the run would end with {Path(config.out) / 'model'}, but {error} "
            "Train it as it was before it was quantised, or quantised by bitsandbytes, or in Python with "
            "out=None, and save the routers after that."
        ) from error


def nothing_to_learn(model: Any, length: int) -> str:
    """Why rows of at most `length` tokens teach the routers nothing; "" if they do."""
    if not is_converted(model):
        return ""
    routing = model.mod
    needed = routing.skip.tokens_to_learn(routing.config)
    if length >= needed or routing.recent is None:
        return ""
    return (
        f"rows of at most {length} tokens, but with skip={routing.skip.name!r} a token attends to its latest "
        f"{routing.config.keep_recent} (keep_recent) whatever the routers say: none of them would learn. "
        f"Rows of {needed} tokens are the least, several times as many are better; or let fewer recent "
        "tokens stay: modlab.set_keep_recent(model, N) (modlab convert --keep-recent N)."
    )


def check_rows_teach(model: Any, source: Batches, objective: Objective) -> None:
    """Rows are long enough for routers to matter; a remark where only the first batch is known."""
    if objective == "none":
        return
    if reason := nothing_to_learn(model, source.first["input_ids"].shape[1]):
        if source.preloaded:
            raise ModlabError(f"The data has {reason}")
        warn(f"The first batch has {reason}")


def check_length(model: Any, length: int, what: str) -> None:
    """No row is longer than the model's context."""
    context = context_length(model)
    if context is not None and length > context:
        raise ModlabError(
            f"{what} has rows of {length} tokens, but the model's context is {context}: pack shorter rows."
        )


def check_processes(config: TrainConfig, source: Batches, world: int) -> None:
    """There is enough data for every process."""
    need = config.batch_size * world
    if source.kind == "rows" and len(source.data) < need:
        raise ModlabError(
            f"The data has {len(source.data)} rows, fewer than a batch of {need} "
            f"({config.batch_size} in each of {world} process(es)). Give more data or a smaller batch_size."
        )
