"""`modlab train`: routers and weights of a Mixture-of-Depths model."""

from __future__ import annotations

import argparse
import contextlib
import itertools
import shlex
from dataclasses import replace
from typing import Any

from modlab.cli.flags import (
    INTERRUPTED,
    Command,
    add_dataclass_flags,
    add_kv_cache_dtype,
    given_flags,
    read_floats,
    read_integers,
    read_name,
    read_path,
)
from modlab.cli.models import add_data_flags, add_model_flags, load_model, row_length, store_as_asked
from modlab.errors import ModlabError


def add(command: Command) -> None:
    """The parser of this command."""
    from modlab.recipes import RECIPES, TRAINED
    from modlab.training.config import TrainConfig

    sub = command(
        "train",
        run,
        "train the routers of a model, and its weights where the recipe says so",
        "A dense MODEL is converted first, as the recipe says (`modlab convert` offers all settings). "
        "Log, checkpoints and at the end the model (DIR/model) lie in DIR. Ctrl-C saves a checkpoint; "
        "the same command with --resume auto goes on from there.",
    )
    sub.add_argument("model", metavar="MODEL", type=read_name, help="model to train")
    sub.add_argument(
        "--out", metavar="DIR", type=read_path, required=True, help="folder for all that the run leaves"
    )
    add_data_flags(sub, required=True)
    sub.add_argument(
        "--heldout-tokens",
        metavar="N",
        type=int,
        default=65536,
        help="held-out tokens to evaluate on; 0: none",
    )
    sub.add_argument(
        "--recipe", choices=TRAINED,
        help="how a dense MODEL is converted and trained (default: default); flags given with it win:\n"
        + "\n".join(f"- {name}: {recipe.summary}" for name, recipe in RECIPES.items() if name in TRAINED),
    )  # fmt: skip
    sub.add_argument(
        "--kv-saving", metavar="X", type=float,
        help="with --recipe: how many times smaller the K/V cache is to be, fewer bits included (default: "
        "the recipe's own)",
    )  # fmt: skip
    sub.add_argument(
        "--start", metavar="ROUTERS", type=read_name,
        help="with a dense MODEL: routers that its conversion starts from (a folder, a hub id, or some that "
        "ship), wherever both have them; routers are not fitted then, and --ramp is 0 by default; with "
        "--recipe speed only what is above the point of leaving learns, in steps of 4 rows (4,096 tokens: "
        "--seq-len), at one saving (--lr 5e-4 --router-lr 2e-3 --freeze-below)",
    )  # fmt: skip
    sub.add_argument(
        "--router-hidden", metavar="UNITS", type=int,
        help="with a dense MODEL: units of the hidden layer in each router, 0: a linear router "
        "(default: the recipe's)",
    )  # fmt: skip
    add_kv_cache_dtype(
        sub, "keys and values of routed layers; routers are trained at full precision",
        unsaid="of a dense MODEL the recipe's, else as MODEL was saved",
    )  # fmt: skip
    sub.add_argument("--teacher", metavar="MODEL", type=read_name, help="dense model for --kl")
    sub.add_argument("--dense", action="store_true", help="leave a dense MODEL dense (a control run)")
    distil = sub.add_argument_group("with --objective distil")
    distil.add_argument(
        "--fit-tokens", metavar="N", type=int,
        help="tokens that routers (where prompts leave, projections) are fitted to before a fresh run "
        "(default: as `modlab fit`); 0: none",
    )  # fmt: skip
    distil.add_argument(
        "--repeats", action=argparse.BooleanOptionalAction, default=True,
        help="passages and key-value lines come again in some of the rows, at all distances",
    )  # fmt: skip
    distil.add_argument(
        "--passages", metavar="SHARE", type=float,
        help="of the rows, in which passages come again (default: 0.25)",
    )  # fmt: skip
    distil.add_argument(
        "--lines", metavar="SHARE", type=float,
        help="of the rows, in which key-value lines come again (default: 0.2)",
    )  # fmt: skip
    distil.add_argument(
        "--near", metavar="SHARE", type=float,
        help="of the repetitions, at most a quarter of a row on (default: 0, all distances equally often)",
    )  # fmt: skip
    distil.add_argument(
        "--lengths", metavar="T,T", type=read_integers,
        help="batches of rows of these lengths in turn, of --batch-size times --seq-len tokens each; "
        "--seq-len is the longest of them by default",
    )  # fmt: skip
    add_model_flags(sub)
    flags = sub.add_argument_group(
        "TrainConfig",
        "defaults are those of a MODEL that is converted already; for a dense one the recipe sets some of "
        "them itself, as DIR/run.json then says",
    )
    add_dataclass_flags(
        flags,
        TrainConfig,
        special={
            "betas": ("B1,B2", read_floats),
            "keep_range": ("LOW,HIGH", read_floats),
            "recent_range": ("LOW,HIGH", read_integers),
        },
        leave_out={"out"},
    )


def run(options: argparse.Namespace) -> int:
    """Runs the command and returns its exit status."""
    from modlab.training.config import TrainConfig

    given = given_flags(options, TrainConfig)
    config = _checked(options, given)  # before a model is loaded and text is tokenised for nothing
    _check_lengths(options)
    _shares(options)
    if config.kl and options.teacher is None:
        raise ModlabError(f"--kl {config.kl} needs --teacher MODEL.")

    import modlab
    from modlab.data import packed
    from modlab.training.checks import check_model
    from modlab.training.resume import find_checkpoint

    find_checkpoint(config)  # a folder that holds another run is refused at once
    model, tokenizer = load_model(options, options.model)
    taken: list[str] = []
    if not modlab.is_converted(model) and not options.dense:
        config, taken = _convert(options, model, given)
    elif options.recipe or options.start or (options.kv_saving, options.router_hidden) != (None, None):
        raise ModlabError(
            "--recipe, --kv-saving, --start and --router-hidden are for a dense MODEL that is converted; "
            "this one is not: say --objective, --keep-ratio and so on."
        )
    else:
        store_as_asked(options, model)
    config.check()  # a recipe that was not named was only perhaps the one that is trained by
    _check_distils(options, config)
    teacher = load_model(options, options.teacher)[0] if options.teacher else None
    check_model(config, model, teacher)

    def rows(split: str, limit: int | None) -> Any:
        length = row_length(options, model)
        return packed(options.data, tokenizer, length, split, limit_tokens=limit, seed=config.seed)

    data = rows("train", options.limit_tokens)
    heldout = rows("heldout", options.heldout_tokens) if options.heldout_tokens else None
    if config.objective == "distil":  # last: nothing is fitted for a run that cannot begin
        data = _distilled(options, config, model, tokenizer, data, taken)
    result = modlab.train(model, data, config, eval_data=heldout, teacher=teacher, tokenizer=tokenizer)
    _tell(options, result)
    return INTERRUPTED if result.interrupted else 0


def _convert(options: argparse.Namespace, model: Any, given: dict[str, Any]) -> tuple[Any, list[str]]:
    """Converts a dense model by a recipe and, in a fresh run, gives it the routers to start from.

    Returns:
        the recipe's settings with the flags given, and the names of the tensors that were taken.
    """
    import modlab
    from modlab.config import KV_BITS
    from modlab.recipes import DEFAULT
    from modlab.routing.router import is_router
    from modlab.training.resume import find_checkpoint

    name = options.recipe or DEFAULT
    mod_config, config = modlab.recipe(
        name, model, kv_saving=options.kv_saving, kv_cache_dtype=options.kv_cache_dtype,
        started=bool(options.start), **given,
    )  # fmt: skip
    if options.router_hidden is not None:
        mod_config = replace(mod_config, router_hidden=options.router_hidden)
    modlab.convert(model, mod_config)
    print(
        f"{options.model} is dense: converted by the recipe {name}, routed layers "
        f"{model.mod.layers}, keep ratio {config.keep_ratio:.3f}"
        + (f", what is kept in {KV_BITS[mod_config.kv_cache_dtype]}" if model.mod.ranges else "")
    )
    if not options.start or find_checkpoint(config) is not None:
        return config, []
    taken = modlab.start_from(model, options.start)
    if config.recent_range is None and model.mod.recent is not None:  # not those the routers have
        modlab.set_keep_recent(model, mod_config.keep_recent)
    new = sum(map(is_router, dict(model.named_parameters()))) - len(taken)
    print(f"{len(taken)} tensors of {options.start} are the start, {new} are new")
    return config, taken


def _tell(options: argparse.Namespace, result: Any) -> None:
    """Prints what came of a run, and what to do next."""
    last = result.history.iloc[-1].dropna().to_dict() if len(result.history) else {}
    shown = {
        name: last[name] for name in ("loss", "eval_loss", "keep_ratio", "eval_keep_ratio") if name in last
    }
    figures = ", ".join(f"{name} {value:.4f}" for name, value in shown.items())
    print(f"{result.stopped} after {result.steps:,} steps, {result.tokens:,} tokens, {result.seconds:,.0f} s")
    print(f"{options.out}: {figures}")
    if result.interrupted:
        print("next: the same command with --resume auto takes it up again")
    else:
        print(f"next: {shlex.join(['modlab', 'eval', str(options.out / 'model'), '--data', options.data])}")


def _checked(options: argparse.Namespace, given: dict[str, Any]) -> Any:
    """The settings as far as they are known before the model is: a recipe's, and the flags given with it.

    Where no recipe is named, a dense model is trained by the default one and another without: flags that fit
    either pass here.

    Raises:
        ModlabError: settings that cannot work.
    """
    from modlab.recipes import DEFAULT
    from modlab.training.config import TrainConfig

    config = TrainConfig(**given)
    if options.recipe is not None:
        _with_recipe(options.recipe, given, bool(options.start)).check()
        return config
    try:
        config.check()
    except ModlabError:
        with contextlib.suppress(ModlabError):
            _with_recipe(DEFAULT, given, bool(options.start)).check()
            return config
        raise
    return config


def _with_recipe(name: str, given: dict[str, Any], started: bool = False) -> Any:
    """The settings of a recipe with the flags given. A share within its range stands in for the saving's,
    which `recipe` checks once it knows the model."""
    from modlab.recipes import RECIPES
    from modlab.training.config import TrainConfig

    fields = {**RECIPES[name].train, **(RECIPES[name].started if started else {}), **given}
    if "keep_ratio" not in fields and fields.get("keep_range") is not None:
        fields["keep_ratio"] = sum(fields["keep_range"]) / len(fields["keep_range"])
    return TrainConfig(**fields)


def _check_lengths(options: argparse.Namespace) -> None:
    """Rows are as long as the longest of `--lengths`, which are cut from them.

    Raises:
        ModlabError: rows that are shorter.
    """
    if not options.lengths:
        return
    longest = max(options.lengths)
    if options.seq_len is None:
        options.seq_len = longest
    elif options.seq_len < longest:
        raise ModlabError(
            f"--lengths {','.join(map(str, options.lengths))} are cut from rows of --seq-len "
            f"{options.seq_len} tokens: leave --seq-len out, or say at least {longest}."
        )


def _check_distils(options: argparse.Namespace, config: Any) -> None:
    """Flags that change a distillation are for one.

    Raises:
        ModlabError: a flag that nothing would use.
    """
    names = ("fit_tokens", "passages", "lines", "near", "lengths")
    unused = [f"--{name.replace('_', '-')}" for name in names if getattr(options, name) is not None]
    if unused and config.objective != "distil":
        raise ModlabError(
            f"{', '.join(unused)}: used with --objective distil only; this run's is {config.objective!r}."
        )


def _shares(options: argparse.Namespace) -> dict[str, float]:
    """Of rows with repeated passages and with repeated lines, and of repetitions that are near, as
    `data.with_repeats` takes them.

    Raises:
        ModlabError: shares that are none, or are asked for together with --no-repeats.
    """
    from modlab.data.far import LINES_SHARE, PASSAGES_SHARE, check_shares

    asked = {"passages": options.passages, "lines": options.lines, "near": options.near}
    given = {name: share for name, share in asked.items() if share is not None}
    if not options.repeats:
        if given:
            flags = " ".join(f"--{name} {share:g}" for name, share in given.items())
            raise ModlabError(f"--no-repeats leaves no rows for {flags}: give one or the other.")
        return {"passages": 0.0, "lines": 0.0, "near": 0.0}
    shares = {"passages": PASSAGES_SHARE, "lines": LINES_SHARE, "near": 0.0, **given}
    check_shares(**shares)
    return shares


def _fit(options: argparse.Namespace, model: Any, tokenizer: Any, data: Any, taken: list[str]) -> None:
    """Before a fresh run: routers are fitted, or projections above the point of leaving, unless the tensors
    `taken` from elsewhere hold them."""
    import modlab
    from modlab.execution.projections import PROJECTIONS
    from modlab.training.fit import why_not_fitted

    leaves = model.mod.first_left < model.mod.num_layers
    if not leaves and not taken and (reason := why_not_fitted(model.mod)):
        print(f"Nothing is fitted first: {reason}")
    elif not leaves and not taken:
        settings = modlab.FitConfig(tokens=options.fit_tokens)
        print(modlab.fit_routers(model, data, settings, tokenizer=tokenizer))
    elif leaves and not any(f".{PROJECTIONS}." in name for name in taken):
        tokens = options.fit_tokens or (131_072 if model.device.type == "cuda" else 16_384)
        rows = itertools.islice(data, max(1, tokens // row_length(options, model)))
        shares = modlab.fit_projections(model, rows).values()
        print(
            f"Projections above layer {model.mod.first_left} are fitted: {sum(shares) / len(shares):.2f} of "
            "what copies miss of the dense model's keys and values is there now"
        )


def _distilled(
    options: argparse.Namespace, config: Any, model: Any, tokenizer: Any, data: Any, taken: list[str]
) -> Any:
    """The rows or batches of a distillation; routers or projections of a fresh run are fitted to them
    first."""
    from modlab.data import mixed_lengths, with_repeats
    from modlab.training.resume import find_checkpoint

    shares, rows = _shares(options), data
    if options.lengths:
        tokens = config.batch_size * row_length(options, model)
        rows = mixed_lengths(
            data, tokenizer, lengths=options.lengths, tokens=tokens, seed=config.seed, **shares
        )
    elif shares["passages"] + shares["lines"] > 0:
        rows = with_repeats(data, tokenizer, seed=config.seed, **shares)
    if options.fit_tokens != 0 and model.mod.trained is None and find_checkpoint(config) is None:
        _fit(options, model, tokenizer, data, taken)
    return rows
