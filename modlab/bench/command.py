"""`modlab bench`: the command line of the benchmarks."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import pkgutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import torch

from modlab import skips
from modlab.bench.models import SHAPES
from modlab.bench.registry import CASES, Settings, Skipped, parts_of, takes
from modlab.bench.results import finish, own_file, plot, read, report, table, write
from modlab.config import KVCacheDtype
from modlab.errors import ModlabError


def _path(text: str) -> Path:
    """A file or folder; an empty name would mean the current folder."""
    if not text.strip():
        raise argparse.ArgumentTypeError("the name is empty ('.' is the current folder)")
    return Path(text)


def register_cases() -> None:
    """Imports every module of this folder: each registers the cases that it holds, a new one, too."""
    folder = sys.modules[str(__package__)].__path__
    for module in pkgutil.iter_modules(folder, f"{__package__}."):
        importlib.import_module(module.name)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="modlab bench",
        description="Dense against Mixture-of-Depths, measured on this machine. Without a case: the list.",
    )
    parser.add_argument("cases", nargs="*", metavar="CASE", help="cases to run, or 'all'")
    parser.add_argument("--device", default="cpu", help="cpu (default), cuda, cuda:1, ...")
    parser.add_argument("--dtype", help="float32 (default on cpu), bfloat16 (default elsewhere) or float16")
    parser.add_argument("--shape", default="wide", choices=sorted(SHAPES), help="model size (default: wide)")
    parser.add_argument(
        "--context", type=int, nargs="+", default=[2048], metavar="T", help="prompt tokens (2048)"
    )
    parser.add_argument("--batch", type=int, default=1, metavar="B", help="rows (1)")
    parser.add_argument("--layers", type=int, metavar="N", help="decoder layers, if not the shape's own")
    parser.add_argument(
        "--routed",
        default="alternate",
        choices=("alternate", "most", "all"),
        help="routed layers (alternate); most: all but the first two and the last two",
    )
    parser.add_argument(
        "--skip",
        default="layer",
        choices=skips.names(),
        help="what a skipped token leaves out (layer; of the default conversion it is kv, nearest to "
        "which comes --skip kv --routed most)",
    )
    parser.add_argument(
        "--kv-cache-dtype",
        default="auto",
        choices=get_args(KVCacheDtype),
        help="how routed layers store keys and values (auto: as the model does); int8 with --skip kv",
    )
    parser.add_argument(
        "--ratios",
        type=float,
        nargs="+",
        default=[0.10, 0.25, 0.50, 1.00],
        metavar="R",
        help="shares of tokens that routed layers keep (0.1 0.25 0.5 1)",
    )
    parser.add_argument("--repeats", type=int, default=7, metavar="N", help="timed rounds (7)")
    parser.add_argument(
        "--decode-tokens", type=int, default=40, metavar="N", help="tokens decoded a round (40)"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of weights and tokens (0)")
    parser.add_argument(
        "--only", nargs="+", default=(), metavar="PART", help="parts of a case, where the list names some"
    )
    parser.add_argument(
        "--out",
        type=_path,
        default=Path("benchmarks/results"),
        help="folder for the result files (benchmarks/results)",
    )
    parser.add_argument(
        "--commit", metavar="HASH", help="commit of this source tree, where git is not there to ask"
    )
    parser.add_argument("--no-save", action="store_true", help="print only")
    parser.add_argument(
        "--plot", type=_path, metavar="RESULT", help="draw a result file as an HTML page next to it"
    )
    return parser


def _settings(options: argparse.Namespace) -> Settings:
    try:
        device = torch.device(options.device)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ModlabError(f"--device {options.device}: {reason}") from error
    name = options.dtype or ("float32" if device.type == "cpu" else "bfloat16")
    dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}.get(name)
    if dtype is None:
        raise ModlabError(f"--dtype {name}: choose float32, bfloat16 or float16.")
    for flag, value in (
        ("--batch", options.batch),
        ("--repeats", options.repeats),
        ("--context", min(options.context)),
        ("--decode-tokens", options.decode_tokens),
        ("--layers", 1 if options.layers is None else options.layers),
    ):
        if value < 1:
            raise ModlabError(f"{flag} {value}: must be at least 1.")
    for ratio in options.ratios:
        if not 0.0 < ratio <= 1.0:
            raise ModlabError(f"--ratios {ratio}: a keep ratio lies in (0, 1].")
    return Settings(
        device=device,
        dtype=dtype,
        shape=options.shape,
        contexts=tuple(options.context),
        batch=options.batch,
        routed=options.routed,
        skip=options.skip,
        layers=options.layers,
        ratios=tuple(options.ratios),
        repeats=options.repeats,
        decode_tokens=options.decode_tokens,
        seed=options.seed,
        only=tuple(options.only),
        kv_cache_dtype=options.kv_cache_dtype,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Runs cases, prints their tables and writes their result files.

    Args:
        argv: arguments after `modlab bench`; those of the process by default.

    Returns:
        exit status: 0, or 1 if every case asked for was skipped.
    """
    register_cases()
    argv = list(sys.argv[1:] if argv is None else argv)
    options = _parser().parse_args(argv)
    if options.plot:
        page = options.plot.with_suffix(".html")
        plot(read(options.plot)).write_html(page, include_plotlyjs=True)
        print(f"wrote {page}")
        return 0
    if not options.cases:
        for name, run in sorted(CASES.items()):
            print(f"{name:10} {(run.__doc__ or '').splitlines()[0]}")
            if parts_of(name):
                print(f"{'':10} --only: {', '.join(parts_of(name))}")
        print("\nrun them with: modlab bench CASE ... (modlab bench --help lists sizes and devices)")
        return 0
    names = sorted(CASES) if options.cases == ["all"] else options.cases
    for name in names:
        if name not in CASES:
            raise ModlabError(f"there is no benchmark {name!r}; there are {', '.join(sorted(CASES))}.")
        unknown = sorted(set(options.only) - set(parts_of(name)))
        if unknown:
            raise ModlabError(
                f"--only {' '.join(unknown)}: {name} has no such part; it has "
                f"{', '.join(parts_of(name)) or 'none, and runs whole'}."
            )
        if not takes(name, options.kv_cache_dtype):
            can = [other for other in sorted(CASES) if takes(other, options.kv_cache_dtype)]
            raise ModlabError(
                f"--kv-cache-dtype {options.kv_cache_dtype}: {name} is not measured so; "
                f"{', '.join(can) or 'nothing yet'} can be."
            )
    settings = _settings(options)
    ran = 0
    for name in names:
        result = report(name, settings, argv, options.commit)
        try:
            with contextlib.nullcontext() if options.no_save else own_file(result, options.out) as path:
                _run(name, settings, result, path)
        except Skipped as reason:
            print(f"skipped {reason}")
            continue
        ran += 1
    return 0 if ran else 1


def _run(name: str, settings: Settings, result: dict[str, Any], path: Path | None) -> None:
    """Adds the rows of a case to its result, and writes it after each: a run that is cut off leaves what it
    measured."""
    for row in CASES[name](settings):
        result["rows"].append(row)
        print(table([row], header=len(result["rows"]) == 1), flush=True)
        if path is not None:
            write(result, path)
    finish(result)
    if path is not None:
        write(result, path)
        print(f"wrote {path}")
