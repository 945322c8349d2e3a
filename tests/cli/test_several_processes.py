"""`accelerate launch -m modlab eval`, `sweep`, `probe`: one process prints what all have found."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from modlab.cli.program import main
from tests.helpers.launch import launch

OWN = {"command", "date"}
"""What two calls of the same thing need not agree on."""


@pytest.mark.parametrize(
    "arguments",
    [
        ["eval", "demo", "--json"],
        ["probe", "demo", "--json", "--only", "recall", "--distances", "40,80", "--passage", "16"],
        ["sweep", "demo", "--thresholds", "0.2", "0.6", "--repeats", "0"],
    ],
    ids=["eval", "probe", "sweep"],
)
def test_one_process_prints_what_all_have_found(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("".join(f"def f{i}(x):\n    return x + {i}\n\n" for i in range(400)))
    own = ["--rows", "6"] if arguments[0] == "probe" else ["--seq-len", "192", "--limit-tokens", "1344"]
    arguments = [*arguments, "--data", str(text), *own]
    printed = launch("-m modlab", 2, *arguments)
    assert main(arguments) == 0
    alone = capsys.readouterr().out
    if "--json" not in arguments:
        assert printed == alone
        return
    found, expected = json.loads(printed), json.loads(alone)
    assert found.keys() == expected.keys()
    for name in found.keys() - OWN:
        assert found[name] == near(expected[name]), name


def near(value: object) -> object:
    """The same but for rounding, however nested."""
    if isinstance(value, dict):
        return {name: near(one) for name, one in value.items()}
    if isinstance(value, list):
        return [near(one) for one in value]
    return pytest.approx(value, rel=1e-6) if isinstance(value, float) else value
