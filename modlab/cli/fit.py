"""`modlab fit`: routers in one forward pass over some text, without training."""

from __future__ import annotations

import argparse
from typing import Any

from modlab.cli.flags import (
    Command,
    add_dataclass_flags,
    add_kv_cache_dtype,
    given_flags,
    read_integers,
    read_name,
    read_path,
)
from modlab.cli.models import add_model_flags, check_target, load_model, save_model, store_as_asked
from modlab.errors import ModlabError


def add(command: Command) -> None:
    """The parser of this command."""
    from modlab.training.fit_config import FitConfig

    sub = command(
        "fit",
        run,
        "fit the routers of a model to what its keys are worth, without training",
        "A dense SRC is converted first: a gate a KV head in all layers. One forward pass over some text "
        "says how much a later copy of it reads each key; routers are solved for in closed form. Good for 2x "
        "less K/V at once; `modlab train` goes further from there.",
    )
    sub.add_argument("source", metavar="SRC", type=read_name, help="model, dense or converted with skip kv")
    sub.add_argument("target", metavar="DST", type=read_path, help="folder for the model and its tokenizer")
    sub.add_argument("--overwrite", action="store_true", help="replace what lies in DST")
    sub.add_argument(
        "--data",
        metavar="SOURCE",
        required=True,
        help="text like that of later use: a hub data set, a .txt/.json/.jsonl file or a folder of them, or "
        "'python': this machine's own",
    )
    sub.add_argument(
        "--kv-saving", metavar="X", type=float,
        help="of a dense SRC: how many times smaller the K/V cache is to be, eight bits "
        "included (default: 2 by routing)",
    )  # fmt: skip
    add_kv_cache_dtype(
        sub, "keys and values of routed layers, once they are fitted",
        unsaid="of a dense SRC auto, else as it was saved",
    )  # fmt: skip
    add_model_flags(sub)
    add_dataclass_flags(
        sub.add_argument_group("FitConfig"),
        FitConfig,
        special={"recent_range": ("LOW,HIGH", read_integers)},
    )


def run(options: argparse.Namespace) -> int:
    """Runs the command and returns its exit status."""
    from modlab.training.fit_config import FitConfig

    given = given_flags(options, FitConfig)
    FitConfig(**given).check()  # before a model is loaded
    check_target(options.target, options.overwrite)

    import modlab

    model, tokenizer = load_model(options, options.source)
    config = _converted(model, options, given)
    found = modlab.fit_routers(model, options.data, config, tokenizer=tokenizer)
    save_model(model, tokenizer, options.target)
    print(
        f"{options.target}: fitted to {found.tokens:,} tokens in {found.seconds:,.0f} s, R² {found.r2:.3f}, "
        f"keep ratio {found.keep_ratio:.3f}"
    )
    return 0


def _converted(model: Any, options: argparse.Namespace, given: dict[str, Any]) -> Any:
    """The settings of the fit; a dense model is converted by the recipe."""
    import modlab

    if not modlab.is_converted(model):
        mod_config, config = modlab.recipe(
            "quick", model, kv_saving=options.kv_saving, kv_cache_dtype=options.kv_cache_dtype, **given
        )
        modlab.convert(model, mod_config)
        return config
    store_as_asked(options, model)
    if options.kv_saving is not None:
        raise ModlabError("--kv-saving is for a dense model; of a converted one say --keep-ratio.")
    return modlab.FitConfig(**given)
