"""`modlab convert`: routers for a model, saved with it."""

from __future__ import annotations

import argparse
from collections.abc import Callable

from modlab.cli.flags import (
    Command,
    add_dataclass_flags,
    given_flags,
    read_layers,
    read_name,
    read_path,
    read_thresholds,
)
from modlab.cli.models import add_model_flags, check_target, load_model, save_model


def add(command: Command) -> None:
    """The parser of this command."""
    from modlab.config import MoDConfig

    sub = command(
        "convert",
        run,
        "give a model routers and save it as a Mixture-of-Depths model",
        "Right after conversion with the default settings the model computes what it did before: the routers "
        "are open and have to be trained (`modlab train`) before anything is left out. By default routers "
        "decide whose keys and values stay in the cache; with --skip layer, which tokens skip a layer. "
        "This is for settings of your own: `modlab fit` and `modlab train` convert a dense model themselves, "
        "by a recipe.",
    )
    sub.add_argument("source", metavar="SRC", type=read_name, help="model to convert: a hub id or a folder")
    sub.add_argument(
        "target", metavar="DST", type=read_path, help="folder for the converted model and its tokenizer"
    )
    sub.add_argument("--overwrite", action="store_true", help="replace what lies in DST")
    sub.add_argument(
        "--preset",
        choices=("default", "paper", "topk"),
        default="default",
        help="what the flags change; default is the plain form, MoDConfig(), and no recipe; paper and "
        "topk skip alternate layers as a whole",
    )
    add_model_flags(sub)
    flags = sub.add_argument_group("MoDConfig", "given flags change the preset")
    add_dataclass_flags(
        flags,
        MoDConfig,
        special={
            "layers": ("alternate|inner|all|1,3,5", read_layers),
            "p": ("P|1=0.5,3=0.6", read_thresholds),
        },
        leave_out={"format_version"},
    )


def run(options: argparse.Namespace) -> int:
    """Runs the command and returns its exit status."""
    from modlab.config import MoDConfig

    changes = given_flags(options, MoDConfig)
    presets: dict[str, Callable[..., MoDConfig]] = {
        "default": MoDConfig,
        "paper": MoDConfig.paper,
        "topk": MoDConfig.topk,
    }
    config = presets[options.preset](**changes)  # wrong settings are refused before the model is loaded
    check_target(options.target, options.overwrite)

    import modlab

    model, tokenizer = load_model(options, options.source)
    modlab.convert(model, config)
    save_model(model, tokenizer, options.target)
    print(
        f"{options.target}: {len(model.mod.layers)} of {model.mod.num_layers} layers routed "
        f"{model.mod.layers}, operator {config.operator}, skip {config.skip}, gate {config.gate}"
    )
    return 0
