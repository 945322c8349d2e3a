"""Programs of others: right ones pass, and no way out of the tests does."""

from __future__ import annotations

import pytest

from benchmarks.real_models.measured.sandbox import all_pass, passes


def test_programs_pass_that_come_to_their_end() -> None:
    assert all_pass(["x = 1", "assert 1 == 2", "import math\nprint(math.pi)"]) == [True, False, True]


@pytest.mark.parametrize(
    "program",
    [
        "import sys\nsys.exit(0)",
        "import os\nos._exit(0)",
        "raise SystemExit",
        "while True: pass",
        "x = bytearray(1 << 31)",
        "def f(:",
        "open('big', 'wb').write(bytes(1 << 22))",
        "import os\nos.system('true')",
    ],
)
def test_others_do_not(program: str) -> None:
    assert not passes(program, seconds=3.0)


def test_what_it_writes_stays_in_a_folder_that_goes(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert passes("open('note', 'w').write('x')")
    assert not list(tmp_path.iterdir())
