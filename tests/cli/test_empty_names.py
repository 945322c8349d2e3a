"""An empty name, of a shell variable that is not set, is refused: it would mean the current folder."""

from __future__ import annotations

import argparse

import pytest

import modlab
from modlab import cli
from modlab.bench.command import _parser as bench_parser
from modlab.cli.program import build_parser
from modlab.errors import ModlabError

CALLS = [
    ["lab", ""], ["convert", "demo-dense", ""], ["convert", "", "out"], ["eval", "", "--data", "x.txt"],
    ["eval", "demo", "--tasks", "t", "--include-path", " "],
    ["probe", "", "--data", "x.txt"],
    ["probe", "demo", "--data", "x.txt", "--judge", ""],
    ["sweep", ""], ["sweep", "demo", "--text-file", ""], ["sweep", "demo", "--text", "a", "--csv", ""],
    ["train", "", "--data", "x.txt", "--out", "o"], ["train", "demo", "--data", "x.txt", "--out", ""],
    ["train", "demo", "--data", "x.txt", "--out", "o", "--teacher", ""],
    ["bench", "prefill", "--out", ""],
]  # fmt: skip


@pytest.mark.parametrize("words", CALLS, ids=" ".join)
def test_an_empty_name_is_refused_before_anything_is_done(words, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        cli.main(words)
    assert stopped.value.code == cli.BAD_INPUT
    assert "the name is empty ('.' is the current folder)" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


PLACES = ("DIR", "DST", "SRC", "FILE", "MODEL", "RESULT", "FOLDER")


def path_like(parser: argparse.ArgumentParser):
    """The arguments of a parser and its commands that name a file, a folder, a model or data."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for sub in action.choices.values():
                yield from path_like(sub)
        elif action.metavar in PLACES or action.dest == "out":
            yield action


def test_no_argument_was_forgotten() -> None:
    found = [*path_like(build_parser()), *path_like(bench_parser())]
    assert len(found) > 15
    for action in found:
        with pytest.raises(argparse.ArgumentTypeError):
            action.type("")  # type: ignore[misc]


@pytest.mark.parametrize("call", [lambda: modlab.load(""), lambda: modlab.load("demo-kv", base=" ")])
def test_load_refuses_it_too(call) -> None:
    with pytest.raises(ModlabError, match="is empty: give a hub id or a folder"):
        call()
