"""What all commands share: exit statuses, a dataclass as flags, readers of values, the look of the help."""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import types
import typing
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

Command = Callable[..., Any]
"""Makes the parser of one command: ``command(name, run, summary, text)``."""


BAD_INPUT = 2
"""Exit status of everything the user can correct; 1 is a run that failed, as of a notebook cell."""

INTERRUPTED = 130
"""Exit status of Ctrl-C."""


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows defaults as one gives them, but not those that say nothing (None, False, an empty list), and
    keeps the line breaks of a help text."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default in (None, False, argparse.SUPPRESS) or action.default in ([], ()):
            return action.help
        if isinstance(action.default, (list, tuple, float)):
            between = "," if action.nargs is None else " "
            return f"{action.help} (default: {as_given(action.default, between)})"
        return super()._get_help_string(action)

    def _split_lines(self, text: str, width: int) -> list[str]:
        lines: list[str] = []
        for part in text.splitlines():
            lines += super()._split_lines(part, width)
        return lines


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
            text = f"{text} (default: {as_given(default)})".strip()
        options: dict[str, Any] = {"dest": field.name, "default": argparse.SUPPRESS, "help": text}
        if reader is bool:
            options["action"] = argparse.BooleanOptionalAction
        else:
            options |= {"type": reader, "choices": choices, "metavar": form}
        parser.add_argument(f"--{field.name.replace('_', '-')}", **options)


def add_kv_cache_dtype(
    parser: argparse.ArgumentParser, text: str, default: str | None = None, unsaid: str = "as MODEL was saved"
) -> None:
    """`--kv-cache-dtype`: `text` says of what; `unsaid`, what holds where it is not given."""
    from modlab.config import KVCacheDtype

    parser.add_argument(
        "--kv-cache-dtype", choices=typing.get_args(KVCacheDtype), default=default, help=f"{text}: auto, in "
        "the model's own type; int8, in eight bits, about half of the bytes; k6v4, keys in six and values in "
        "four, about a third"
        + ("" if default else f" (default: {unsaid})"),
    )  # fmt: skip


def as_given(value: Any, between: str = ",") -> str:
    """A default as it is written on a command line: 128,1024 and not (128, 1024), 0.667 of two thirds."""
    if isinstance(value, (list, tuple)):
        return between.join(as_given(part) for part in value)
    return f"{value:.3g}" if isinstance(value, float) and value < 100 else str(value)


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


def read_path(text: str) -> Path:
    """A file or folder. An empty name would mean the current folder, as when a shell variable is not set."""
    return Path(read_name(text))


def read_name(text: str) -> str:
    """A model, a source of data: anything but nothing."""
    if not text.strip():
        raise argparse.ArgumentTypeError("the name is empty ('.' is the current folder)")
    return text


def read_floats(text: str) -> tuple[float, ...]:
    """Numbers as in 0.9,0.95."""
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError as problem:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of numbers such as 0.9,0.95") from problem


def read_integers(text: str) -> tuple[int, ...]:
    """Whole numbers as in 256,1024."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as problem:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a list of whole numbers such as 256,1024"
        ) from problem


def read_layers(text: str) -> str | list[int]:
    """alternate, inner, all, or indices as in 1,3,5."""
    if re.fullmatch(r"-?\d+(,-?\d+)*", text):
        return [int(part) for part in text.split(",")]
    return text  # MoDConfig knows which words it takes, and says so


def read_thresholds(text: str) -> float | dict[int, float]:
    """One threshold, or one a layer as in 1=0.5,3=0.6."""
    try:
        if "=" in text:
            return {int(layer): float(p) for layer, _, p in (part.partition("=") for part in text.split(","))}
        return float(text)
    except ValueError as problem:
        raise argparse.ArgumentTypeError(
            f"{text!r} is neither a number nor of the form 1=0.5,3=0.6"
        ) from problem
