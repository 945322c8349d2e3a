"""The dense side in a file: run once, the same for everybody, and of this model only."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.real_models.evaluate import Dense
from benchmarks.real_models.measured import dense_side
from benchmarks.real_models.measured.far import Far
from benchmarks.real_models.measured.product import Product
from benchmarks.real_models.texts import Data
from modlab.errors import ModlabError


def test_a_record_is_the_same_by_the_file_and_without(product: Product, data: Data, tmp_path: Path) -> None:
    file = tmp_path / "dense.pt"
    fars = [Far(product, data, 2), Far(product, data, 2, file), Far(product, data, 2, file)]
    assert [path.name for path in tmp_path.iterdir()] == ["dense.pt"]
    with product.at(0.6):
        one, *others = (far.by_cache() for far in fars)
    assert others == [one, one] and one["kl_far"] > 0


def test_what_is_there_is_not_run_again(
    product: Product, data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "dense.pt"
    Far(product, data, 2, file)
    monkeypatch.setattr(Far, "_dense", lambda self: pytest.fail("run again"))
    Far(product, data, 2, file)


def test_whoever_comes_second_waits(
    product: Product, data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, ran = tmp_path / "dense.pt", []
    known = Far(product, data, 2).dense
    (tmp_path / f"{file.name}.claim").write_text(str(os.getppid()))  # of a process that is alive
    slept = threading.Event()

    def sleep(seconds: float) -> None:
        slept.set()
        (tmp_path / f"{file.name}.claim").unlink(missing_ok=True)  # and that ended without a file

    def run() -> Dense:
        assert slept.is_set()
        ran.append(1)
        return known

    monkeypatch.setattr(dense_side.time, "sleep", sleep)
    found = dense_side.shared(file, product, data, 2, run)
    assert ran == [1] and all(torch.equal(found.states[name], known.states[name]) for name in known.states)


@pytest.mark.parametrize("other", ["rows", "texts", "weights"])
def test_another_dense_side_is_refused(product: Product, data: Data, tmp_path: Path, other: str) -> None:
    file, changed = tmp_path / "dense.pt", dict[str, Any](product=product, data=data, rows=2)
    Far(**changed, dense=file)
    if other == "rows":
        changed["rows"] = 1
    elif other == "texts":
        changed["data"] = Data(**{**vars(data), "retrieval": data.recall})
    else:
        product.head_VD = product.head_VD * 1.5
    with pytest.raises(ModlabError, match="is the dense side of weights .*, and this is weights .*delete it"):
        Far(**changed, dense=file)
