"""Warnings point at the line of the user's that they come from."""

from __future__ import annotations

import re
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch

import modlab
from modlab import data
from modlab.routing.trained import Trained
from modlab.warn import ModlabWarning, warn
from tests.helpers.models import routed_llama

OWN = {
    "modlab.somewhere": "from modlab.warn import warn\ndef go(call): call()\ndef say(): warn('said')\n",
    "torch.nn.somewhere": "def go(call): return call()\n",
    "script": "def go(call): return call()\n",
}


def module(name: str) -> Any:
    """One of that name whose lines are all in the file `name`."""
    made = types.ModuleType(name)
    exec(compile(OWN[name], name, "exec"), made.__dict__)
    return made


def test_a_warning_points_past_modlab_and_what_calls_it() -> None:
    own, torchs, script = map(module, OWN)
    with pytest.warns(ModlabWarning, match="said") as caught:
        own.go(lambda: None)
        script.go(lambda: None)
        torchs.go(own.say)
        script.go(own.say)
    assert [Path(one.filename).name for one in caught] == ["test_warn.py", "script"]


def test_a_loop_of_ones_own_is_shown_where_it_calls_the_model() -> None:
    model = routed_llama(skip="kv", keep_recent=4)
    model.mod.trained = Trained(savings={2.0: 0.4, 4.0: 0.6})
    ids = torch.randint(3, 500, (2, 24), generator=torch.Generator().manual_seed(0))
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model(ids, labels=ids).loss.backward()
    optimizer.step()
    with pytest.warns(ModlabWarning, match="learn in a loop") as caught:
        model(ids)
    assert [one.filename for one in caught] == [__file__]


def test_rows_without_a_text_are_shown_where_they_are_asked_for(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"text": null}\n', encoding="utf-8")
    with pytest.warns(ModlabWarning, match="1 of 2 rows") as caught:
        data.documents(tmp_path)
    assert [one.filename for one in caught] == [__file__]


def test_where_all_lines_are_modlabs_a_warning_is_still_given() -> None:
    code = "__name__ = 'modlab.all'; from modlab.warn import warn; warn('said')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and "ModlabWarning: said" in done.stderr


def test_all_warnings_come_this_way() -> None:
    root = Path(modlab.__file__).parent
    found = [p.name for p in root.rglob("*.py") if re.search(r"warnings\.warn\b", p.read_text("utf-8"))]
    assert found == [] and callable(warn)
