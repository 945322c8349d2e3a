"""The command line: `modlab lab | convert | train | eval | sweep | bench`, also as `python -m modlab`.

Heavy modules are imported by the handlers, so that `modlab --help` answers at once. A mistake the user can
correct ends in a message of a few lines on stderr and exit status 2; `--traceback` shows where it came from.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import shlex
import sys
import types
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modlab import __version__
from modlab.errors import ModlabError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    import pandas

BAD_INPUT = 2  # exit status of everything the user can correct; 1 is a run that failed, as of a notebook cell
INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status.

    Args:
        argv: arguments without the program's name; those of this process if None.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    arguments, passed_on = split_passed_on(arguments)
    options = build_parser().parse_args(arguments, argparse.Namespace(passed_on=passed_on))
    try:
        status: int = options.run(options)
        return status
    except (ModlabError, OSError) as problem:
        if options.traceback:
            raise
        print(f"modlab: error: {problem}", file=sys.stderr)
        return BAD_INPUT
    except KeyboardInterrupt:
        print("modlab: interrupted", file=sys.stderr)
        return INTERRUPTED


def split_passed_on(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """What this parser reads, and what belongs to another: all that follows `bench`, and in `lab` what
    follows `--` (argparse would hand the first of it to the optional DIR)."""
    arguments = list(arguments)
    command = next((i for i, word in enumerate(arguments) if not word.startswith("-")), len(arguments))
    name = arguments[command : command + 1]
    if name == ["bench"]:
        passed_on = [word for word in arguments[command + 1 :] if word != "--traceback"]
        ours = ["--traceback"] if "--traceback" in arguments else []
        return [*ours, "bench"], passed_on
    if name == ["lab"] and "--" in arguments:
        end = arguments.index("--")
        return arguments[:end], arguments[end + 1 :]
    return arguments, []


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = argparse.ArgumentParser(
        prog="modlab",
        description="Turn a causal language model into a Mixture-of-Depths model; train and measure it.",
        epilog="`modlab COMMAND --help` explains one. MODEL is 'demo', 'demo-dense', a folder or a hub id.",
    )
    parser.add_argument("--version", action="version", version=f"modlab {__version__}")
    # Accepted before and after the command: SUPPRESS keeps the second from undoing the first.
    common = argparse.ArgumentParser(add_help=False)
    for target, default in ((parser, False), (common, argparse.SUPPRESS)):
        target.add_argument(
            "--traceback", action="store_true", default=default, help="show the full traceback of errors"
        )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def command(name: str, run: Callable[[argparse.Namespace], int], summary: str, text: str = "") -> Any:
        sub = commands.add_parser(
            name,
            parents=[common],
            help=summary,
            description=f"{summary[0].upper()}{summary[1:]}. {text}".strip(),
            formatter_class=_HelpFormatter,
        )
        sub.set_defaults(run=run)
        return sub

    _add_lab(command)
    _add_convert(command)
    _add_train(command)
    _add_eval(command)
    _add_sweep(command)
    _add_bench(command)
    return parser


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows defaults, but not those that say nothing (None, False, an empty list)."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default in (None, False, argparse.SUPPRESS) or action.default == []:
            return action.help
        return super()._get_help_string(action)


Command = Callable[..., Any]

# ---- lab ----


def _add_lab(command: Command) -> None:
    sub = command(
        "lab",
        _lab,
        "copy the guided notebooks to a folder and open JupyterLab there",
        "A notebook that you changed is never overwritten, unless you ask for it. "
        "JupyterLab gets what follows -- (`modlab lab DIR -- --port=9999`); only this machine can reach it.",
    )
    sub.add_argument(
        "folder", metavar="DIR", nargs="?", type=Path, default=Path("modlab-notebooks"), help="folder"
    )
    sub.add_argument("--overwrite", action="store_true", help="replace notebooks that were changed")
    sub.add_argument(
        "--no-browser", action="store_true", help="print the address instead of opening a browser"
    )
    sub.add_argument(
        "--execute",
        action="store_true",
        help="only run the quickstart, and write quickstart.executed.ipynb and quickstart.html beside it",
    )
    sub.add_argument(
        "--timeout", metavar="S", type=int, default=600, help="with --execute: longest time for one cell"
    )


def _lab(options: argparse.Namespace) -> int:
    from modlab import lab

    for line in lab.copy_notebooks(options.folder, options.overwrite).lines(options.folder):
        print(line)
    if not options.execute:
        return lab.open_lab(options.folder, not options.no_browser, options.passed_on)
    done = lab.execute(options.folder / lab.QUICKSTART, timeout_s=options.timeout)
    print(f"executed notebook: {done.notebook}\npage: {done.page}")
    if done.error:
        print(f"\nmodlab: a cell failed:\n{done.error}", file=sys.stderr)
        return 1
    return 0


# ---- convert ----


def _add_convert(command: Command) -> None:
    from modlab.config import MoDConfig

    sub = command(
        "convert",
        _convert,
        "give a model routers and save it as a Mixture-of-Depths model",
        "Right after conversion with the default settings the model computes what it did before: the routers "
        "are open and have to be trained (`modlab train`) before anything is skipped.",
    )
    sub.add_argument("source", metavar="SRC", help="model to convert: a hub id or a folder")
    sub.add_argument(
        "target", metavar="DST", type=Path, help="folder for the converted model and its tokenizer"
    )
    sub.add_argument("--overwrite", action="store_true", help="replace what lies in DST")
    sub.add_argument(
        "--preset", choices=("default", "paper", "topk"), default="default", help="what the flags change"
    )
    _add_model_flags(sub)
    flags = sub.add_argument_group("MoDConfig", "given flags change the preset")
    add_dataclass_flags(
        flags,
        MoDConfig,
        special={"layers": ("alternate|all|1,3,5", _layers), "p": ("P|1=0.5,3=0.6", _thresholds)},
        leave_out={"format_version"},
    )


def _convert(options: argparse.Namespace) -> int:
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

    model, tokenizer = _load(options, options.source)
    modlab.convert(model, config)
    _save(model, tokenizer, options.target)
    print(
        f"{options.target}: {len(model.mod.layers)} of {model.mod.num_layers} layers routed "
        f"{model.mod.layers}, operator {config.operator}, skip {config.skip}, gate {config.gate}"
    )
    return 0


# ---- train ----


def _add_train(command: Command) -> None:
    from modlab.train_config import TrainConfig

    sub = command(
        "train",
        _train,
        "train the routers and the weights of a Mixture-of-Depths model",
        "A dense MODEL is converted first, with the default settings (`modlab convert` offers all others). "
        "Log, checkpoints and at the end the model (DIR/model) lie in DIR. Ctrl-C saves a checkpoint; "
        "the same command with --resume auto goes on from there.",
    )
    sub.add_argument("model", metavar="MODEL", help="model to train")
    sub.add_argument(
        "--out", metavar="DIR", type=Path, required=True, help="folder for all that the run leaves"
    )
    _add_data_flags(sub, required=True)
    sub.add_argument(
        "--heldout-tokens",
        metavar="N",
        type=int,
        default=65536,
        help="held-out tokens to evaluate on; 0: none",
    )
    sub.add_argument("--teacher", metavar="MODEL", help="dense model for --kl")
    sub.add_argument("--dense", action="store_true", help="leave a dense MODEL dense (a control run)")
    _add_model_flags(sub)
    flags = sub.add_argument_group("TrainConfig")
    add_dataclass_flags(flags, TrainConfig, special={"betas": ("B1,B2", _floats)}, leave_out={"out"})


def _train(options: argparse.Namespace) -> int:
    from modlab.train_config import TrainConfig

    config = TrainConfig(**given_flags(options, TrainConfig))
    config.check()  # before a model is loaded and text is tokenised for nothing
    if config.kl and options.teacher is None:
        raise ModlabError(f"--kl {config.kl} needs --teacher MODEL.")

    import modlab
    from modlab.data import packed

    model, tokenizer = _load(options, options.model)
    if not modlab.is_converted(model) and not options.dense:
        modlab.convert(model)
        print(f"{options.model} is dense: converted, routed layers {model.mod.layers}")
    teacher = _load(options, options.teacher)[0] if options.teacher else None

    def rows(split: str, limit: int | None) -> Any:
        length = _seq_len(options, model)
        return packed(options.data, tokenizer, length, split, limit_tokens=limit, seed=config.seed)

    data = rows("train", options.limit_tokens)
    heldout = rows("heldout", options.heldout_tokens) if options.heldout_tokens else None
    result = modlab.train(model, data, config, eval_data=heldout, teacher=teacher, tokenizer=tokenizer)
    last = result.history.iloc[-1].dropna().to_dict() if len(result.history) else {}
    shown = {
        name: last[name] for name in ("loss", "eval_loss", "keep_ratio", "eval_keep_ratio") if name in last
    }
    figures = ", ".join(f"{name} {value:.4f}" for name, value in shown.items())
    print(f"{result.stopped} after {result.steps:,} steps, {result.tokens:,} tokens, {result.seconds:,.0f} s")
    print(f"{options.out}: {figures}")
    return INTERRUPTED if result.interrupted else 0


# ---- eval ----


def _add_eval(command: Command) -> None:
    sub = command("eval", _eval, "measure held-out loss, keep ratio of each layer and KV saving")
    sub.add_argument("model", metavar="MODEL", help="model to measure, dense or converted")
    _add_data_flags(sub, required=True, tokens=65536)
    sub.add_argument(
        "--split",
        choices=("heldout", "train", "all"),
        help="which documents of the source (default: heldout; all for a local file or folder)",
    )
    sub.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    _add_model_flags(sub)


def _eval(options: argparse.Namespace) -> int:
    import modlab
    from modlab import measure
    from modlab.bench import circumstances

    model, tokenizer = _load(options, options.model)
    rows = _rows(options, model, tokenizer)
    result = measure.evaluate(model, rows, seq_len=rows.seq_len)
    facts: dict[str, Any] = {
        "model": options.model,
        "data": options.data,
        "split": rows.split,
        "seq_len": rows.seq_len,
        "predicted_tokens": result.predicted_tokens,
        "loss": result.loss,
        "perplexity": result.perplexity,
        "keep_ratio": result.keep_ratio,
        "kv_bytes": result.kv_bytes,
        "dense_kv_bytes": result.dense_kv_bytes,
        "kv_saving": result.kv_saving,
    }
    layers = [
        {"layer": layer, "threshold": model.mod.thresholds[layer], "keep_ratio": kept}
        for layer, kept in result.keep_ratio_by_layer.items()
    ]
    if options.json:
        command = {"command": shlex.join(["modlab", *sys.argv[1:]])}
        print(
            json.dumps(
                facts | {"layers": layers} | command | circumstances(model.device, model.dtype), indent=2
            )
        )
        return 0
    for name, value in facts.items():
        print(f"{name:<17} {value:,.4f}" if isinstance(value, float) else f"{name:<17} {value}")
    if modlab.is_converted(model):
        print(f"\n{'layer':>5} {'threshold':>9} {'kept':>6}")
        for row in layers:
            print(f"{row['layer']:>5} {row['threshold']:>9.3f} {row['keep_ratio']:>6.1%}")
    else:
        print("\nno routed layers: the model is dense")
    return 0


# ---- sweep ----


def _add_sweep(command: Command) -> None:
    sub = command(
        "sweep",
        _sweep,
        "measure loss, memory and time of a converted model at several thresholds",
        "One row a threshold. Give --text, --text-file or --data.",
    )
    sub.add_argument("model", metavar="MODEL", help="converted model")
    sub.add_argument("--text", metavar="TEXT", nargs="+", default=[], help="text to measure on")
    sub.add_argument("--text-file", metavar="FILE", type=Path, nargs="+", default=[], help="UTF-8 text files")
    _add_data_flags(sub, required=False, tokens=8192)
    sub.add_argument("--split", choices=("heldout", "train", "all"), help="with --data: as for `modlab eval`")
    sub.add_argument(
        "--thresholds",
        metavar="P",
        type=float,
        nargs="+",
        default=[0.0, 0.1, 0.3, 0.5, 0.7, 0.9],
        help="values in [0, 1); 0 keeps every token",
    )
    sub.add_argument(
        "--repeats", metavar="N", type=int, default=5, help="timed calls a threshold; 0: no times"
    )
    sub.add_argument("--csv", metavar="FILE", type=Path, help="write the table to a CSV file")
    sub.add_argument("--plot", metavar="FILE", type=Path, help="write a page with the curves (.html)")
    _add_model_flags(sub)


def _sweep(options: argparse.Namespace) -> int:
    import modlab

    if options.data and (options.text or options.text_file):
        raise ModlabError("give either --data or texts (--text, --text-file), not both.")
    texts = [*options.text, *(_read_text(path) for path in options.text_file)]
    if not options.data and not texts:
        raise ModlabError("nothing to measure on: give --text, --text-file or --data.")
    for number, text in enumerate(texts, 1):
        if not text.strip():
            raise ModlabError(f"text {number} of {len(texts)} is empty: give some text to measure on.")
    for path in filter(None, (options.csv, options.plot)):
        if not path.resolve().parent.is_dir():
            raise ModlabError(f"{path} cannot be written: there is no folder {path.resolve().parent}.")

    model, tokenizer = _load(options, options.model)
    source = _rows(options, model, tokenizer) if options.data else texts
    table = modlab.sweep(
        model,
        tokenizer,
        source,
        thresholds=options.thresholds,
        seq_len=_seq_len(options, model),
        repeats=options.repeats,
    )
    print(table.to_string(index=False, float_format=lambda value: f"{value:.4g}"))
    if options.csv:
        table.to_csv(options.csv, index=False)
        print(f"table: {options.csv}")
    if options.plot:
        options.plot.write_text(_sweep_page(table, options.model), encoding="utf-8")
        print(f"page: {options.plot}")
    return 0


def _sweep_page(table: pandas.DataFrame, model: str) -> str:
    """Loss over KV saving as a page that needs no network (plotly's own code is inside)."""
    import plotly.graph_objects as go

    figure = go.Figure(
        go.Scatter(
            x=table["kv_saving"],
            y=table["loss"],
            text=[f"p = {p:g}" for p in table["threshold"]],
            customdata=table[["keep_ratio", "kv_bytes", "perplexity"]],
            mode="lines+markers+text",
            textposition="top center",
            hovertemplate="%{text}<br>kept %{customdata[0]:.1%}<br>KV %{customdata[1]:,} bytes"
            "<br>perplexity %{customdata[2]:.3f}<extra></extra>",
        )
    )
    figure.update_layout(title=f"{model}: what each threshold costs and saves")
    figure.update_xaxes(title="KV saving (dense bytes / allocated bytes)")
    figure.update_yaxes(title="loss (nats a token)")
    page: str = figure.to_html(include_plotlyjs=True)
    return page


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as problem:
        raise ModlabError(
            f"{path} is not UTF-8 text ({problem.reason} at byte {problem.start})."
        ) from problem


# ---- bench ----


def _add_bench(command: Command) -> None:
    command("bench", _bench, "run benchmarks of this modlab on this machine, dense beside Mixture-of-Depths")


def _bench(options: argparse.Namespace) -> int:
    from modlab import bench

    return bench.main(options.passed_on)  # has its own parser, and so its own --help


# ---- models, data and files, as every command handles them ----


def _add_model_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--device", help="where the model runs: cpu, cuda, cuda:1 ... (default: cuda if there is one)"
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="of the weights (default: as saved; demo: float32)",
    )


def _add_data_flags(parser: argparse.ArgumentParser, required: bool, tokens: int | None = None) -> None:
    parser.add_argument(
        "--data",
        metavar="SOURCE",
        required=required,
        help="a hub data set, a .txt/.json/.jsonl file or a folder of them, or 'python': this machine's own",
    )
    parser.add_argument(
        "--seq-len", metavar="T", type=int, help="tokens a row (default: the model's context, at most 2048)"
    )
    parser.add_argument("--limit-tokens", metavar="N", type=int, default=tokens, help="use at most N tokens")


def _load(options: argparse.Namespace, name: str) -> tuple[Any, Any]:
    """The model, on its device and in eval mode, and its tokenizer."""
    import torch

    import modlab

    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    loaded: tuple[Any, Any] = modlab.load(name, **({"dtype": options.dtype} if options.dtype else {}))
    model, tokenizer = loaded
    try:
        model.to(device)
    except (RuntimeError, AssertionError) as problem:  # torch raises either for a device that is not there
        reason = str(problem).splitlines()[0]
        raise ModlabError(f"--device {device}: {reason}") from problem
    return model.eval(), tokenizer


class _Rows:
    """Packed rows of --data, and how they were made; iterates over long [T] tensors."""

    def __init__(self, dataset: Any, split: str, seq_len: int) -> None:
        self.dataset, self.split, self.seq_len = dataset, split, seq_len

    def __iter__(self) -> Iterator[Any]:
        return (row["input_ids"] for row in self.dataset)


def _rows(options: argparse.Namespace, model: Any, tokenizer: Any) -> _Rows:
    """The rows that --data, --split, --seq-len and --limit-tokens name."""
    from modlab.data import packed

    split = options.split or ("all" if Path(options.data).exists() else "heldout")
    length = _seq_len(options, model)
    limit = options.limit_tokens if options.limit_tokens is None else max(options.limit_tokens, length)
    dataset = packed(
        options.data, tokenizer, seq_len=length, split=None if split == "all" else split, limit_tokens=limit
    )
    return _Rows(dataset, split, length)


def _seq_len(options: argparse.Namespace, model: Any) -> int:
    """Tokens a row: as asked for, within the model's context."""
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 2048
    length = options.seq_len or min(context, 2048)
    if not 2 <= length <= context:
        raise ModlabError(
            f"--seq-len {length}: rows must hold 2 to {context} tokens, the context of this model."
        )
    return length


def check_target(folder: Path, overwrite: bool) -> None:
    """Refuse a target that holds something already: a saved model is never mixed with another."""
    if folder.exists() and not folder.is_dir():
        raise ModlabError(f"{folder} is a file; give the name of a folder.")
    if folder.is_dir() and any(folder.iterdir()) and not overwrite:
        raise ModlabError(
            f"the folder {folder} is not empty: name another one, or give --overwrite to replace it."
        )


def _save(model: Any, tokenizer: Any, folder: Path) -> None:
    """Model and tokenizer into one folder, whole or not at all."""
    from modlab.checkpoint import WEIGHT_PATTERNS, atomic_directory

    with atomic_directory(folder, replaces=WEIGHT_PATTERNS) as temporary:
        model.save_pretrained(temporary)
        if tokenizer is not None:
            tokenizer.save_pretrained(temporary)


# ---- a dataclass as command line flags ----


def add_dataclass_flags(
    parser: Any,
    config: type,
    special: dict[str, tuple[str, Callable[[str], Any]]] | None = None,
    leave_out: Iterable[str] = (),
) -> None:
    """One flag for each field of a dataclass, with its type, choices, default and the text of its docstring.

    A flag that is not given leaves no trace in the parsed options (see `given_flags`), so that the
    dataclass's own defaults stay the only ones.

    Args:
        parser: argparse parser or group.
        config: a dataclass with type hints; its docstring's "Attributes:" section explains the fields.
        special: form (for the help) and reader of the fields whose type alone does not say it.
        leave_out: fields without a flag.
    """
    hints = typing.get_type_hints(config)
    help_texts = attribute_docs(config)
    for field in dataclasses.fields(config):
        if field.name in leave_out or not field.init:
            continue
        form, reader, choices = _reader(field.name, hints[field.name], special or {})
        text = help_texts.get(field.name, "").replace("%", "%%")
        default = field.default
        if default is not dataclasses.MISSING and default is not None:
            text = f"{text} (default: {default})".strip()
        options: dict[str, Any] = {"dest": field.name, "default": argparse.SUPPRESS, "help": text}
        if reader is bool:
            options["action"] = argparse.BooleanOptionalAction
        else:
            options |= {"type": reader, "choices": choices, "metavar": form}
        parser.add_argument(f"--{field.name.replace('_', '-')}", **options)


def given_flags(options: argparse.Namespace, config: type) -> dict[str, Any]:
    """The fields of the dataclass that were given on the command line."""
    names = {field.name for field in dataclasses.fields(config)}
    return {name: value for name, value in vars(options).items() if name in names}


def attribute_docs(config: type) -> dict[str, str]:
    """The "Attributes:" section of a docstring: field name -> text on one line."""
    section = re.search(
        r"^ *Attributes:\n(.*?)(?:\n\S|\n *\n *[A-Z]\w*:\n|\Z)", config.__doc__ or "", re.S | re.M
    )
    if not section:
        return {}
    lines = section[1].splitlines()
    indent = min((len(line) - len(line.lstrip()) for line in lines if line.strip()), default=0)
    texts: dict[str, str] = {}
    name = ""
    for line in lines:
        start = re.match(rf" {{{indent}}}(\w+)(?: \([^)]*\))?: *(.*)", line)
        if start:
            name = start[1]
            texts[name] = start[2]
        elif name and line.strip():
            texts[name] += " " + line.strip()
    return {name: text.replace("`", "") for name, text in texts.items()}


def _reader(
    name: str, hint: Any, special: dict[str, tuple[str, Callable[[str], Any]]]
) -> tuple[str | None, Callable[[str], Any], tuple[str, ...] | None]:
    """How a field of this name and type is read from one argument: form in the help, reader, choices."""
    form = name.upper()
    if name in special:
        return *special[name], None
    if typing.get_origin(hint) is typing.Literal:
        return None, str, typing.get_args(hint)
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        parts = [part for part in typing.get_args(hint) if part is not type(None)]
        if set(parts) == {str, Path}:
            return form, str, None
        return _reader(name, parts[0], special) if len(parts) == 1 else (form, _json, None)
    return form, hint if hint in (bool, int, float, str, Path) else _json, None


def _json(text: str) -> Any:
    """A value of a type that has no simpler form on a command line."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as problem:
        raise argparse.ArgumentTypeError(f"{text!r} is not JSON: {problem}") from problem


def _floats(text: str) -> tuple[float, ...]:
    """Numbers as in 0.9,0.95."""
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError as problem:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of numbers such as 0.9,0.95") from problem


def _layers(text: str) -> str | list[int]:
    """alternate, all, or indices as in 1,3,5."""
    if re.fullmatch(r"-?\d+(,-?\d+)*", text):
        return [int(part) for part in text.split(",")]
    return text  # MoDConfig knows which words it takes, and says so


def _thresholds(text: str) -> float | dict[int, float]:
    """One threshold, or one a layer as in 1=0.5,3=0.6."""
    try:
        if "=" in text:
            return {int(layer): float(p) for layer, _, p in (part.partition("=") for part in text.split(","))}
        return float(text)
    except ValueError as problem:
        raise argparse.ArgumentTypeError(
            f"{text!r} is neither a number nor of the form 1=0.5,3=0.6"
        ) from problem
