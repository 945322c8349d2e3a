"""The Triton kernel against the reference, in Triton's interpreter: odd heads, windows, hard evictions."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

CHECK = """
from benchmarks.real_models.speed import check_kernel
for heads, groups, T, window in ((4, 2, 384, 128), (3, 1, 256, 100), (2, 2, 128, 200)):
    found = check_kernel("cpu", heads, groups, 16, T, window)
    print(found)
    assert set(found) == {"out", "dq", "dk", "dv", "d_weight"}
    assert all(value < 1e-5 for name, value in found.items() if (name, T) != ("d_weight", 128)), found
"""


def test_result_and_gradients_are_the_references() -> None:
    # A process of its own: the interpreter is switched on before Triton is imported.
    done = subprocess.run(
        [sys.executable, "-c", CHECK],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
