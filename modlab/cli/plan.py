"""`modlab plan`: what a model takes on each GPU."""

from __future__ import annotations

import argparse

from modlab.cli.flags import Command, add_kv_cache_dtype, read_name


def add(command: Command) -> None:
    """The parser of this command."""
    sub = command(
        "plan",
        run,
        "work out what a model takes on each GPU, in GiB",
        "Only the model's config is read. B rows are those of each GPU where every GPU has its own (copies, "
        "DDP, FSDP2), else of all together; a total has to fit into nine tenths of the memory.",
    )
    sub.add_argument(
        "--model",
        metavar="MODEL",
        type=read_name,
        required=True,
        help="folder, hub id or a shape of modlab bench",
    )
    sub.add_argument("--gpus", metavar="N", type=int, default=1, help="how many")
    sub.add_argument("--memory", metavar="GIB", type=float, default=80.0, help="of each")
    sub.add_argument("--context", metavar="T", type=int, default=4096, help="tokens of a row")
    sub.add_argument("--batch", metavar="B", type=int, default=1, help="rows")
    sub.add_argument(
        "--kv-saving",
        metavar="X",
        type=float,
        help="of the routed cache (default: 4 by routing, times what fewer bits save)",
    )
    add_kv_cache_dtype(sub, "keys and values of the routed cache", default="auto")
    sub.add_argument(
        "--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16", help="of frozen weights"
    )
    sub.add_argument(
        "--checkpointing",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="training computes activations again",
    )
    sub.add_argument("--json", action="store_true", help="print JSON instead of a table")


def run(options: argparse.Namespace) -> int:
    """Runs the command and returns its exit status."""
    from modlab.bench.models import SHAPES
    from modlab.plan import plan

    shape = SHAPES.get(options.model)
    table = plan(
        options.model if shape is None else shape.config(options.context),
        gpus=options.gpus,
        memory=options.memory,
        context=options.context,
        batch=options.batch,
        kv_saving=options.kv_saving,
        kv_cache_dtype=options.kv_cache_dtype,
        dtype=options.dtype,
        checkpointing=options.checkpointing,
    )
    if options.json:
        print(table.to_json(orient="records", indent=2))
        return 0
    print(
        f"{options.model}: {table.attrs['parameters'] / 1e9:.2f} B parameters; {options.batch} row(s) of "
        f"{options.context:,} tokens; GiB on each of {options.gpus} GPU(s) of {options.memory:g}\n"
    )
    print(table.to_string(index=False, float_format=lambda value: f"{value:,.2f}"))
    return 0
