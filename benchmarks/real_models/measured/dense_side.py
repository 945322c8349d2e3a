"""What the dense model does on the texts and probes, in a file that several processes and runs share.

The base is frozen, so all routers of a model have the same dense side. On a GPU that four processes share
each of them would take most of a minute to run it once more.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.real_models.evaluate import Dense
from benchmarks.real_models.measured.pieces import WAIT, Folder
from benchmarks.real_models.measured.product import Product
from benchmarks.real_models.texts import COUNTED, Data
from modlab.errors import ModlabError


def shared(file: Path, product: Product, data: Data, rows: int, run: Callable[[], Dense]) -> Dense:
    """The dense side of the file; where there is none one process runs it, and others wait.

    Args:
        rows: of each text.
        run: makes it.

    Raises:
        ModlabError: the file is of another model, other texts, another number of rows or another dtype.
    """
    of, folder = _of(product, data, rows), Folder(file.parent)
    while not file.exists():
        if folder.claim(file.name):
            try:
                if not file.exists():
                    _write(file, of, run())
            finally:
                folder.release(file.name)
        else:
            time.sleep(WAIT)
    return _read(file, of, product)


def _write(file: Path, of: str, dense: Dense) -> None:
    """Whole or not at all."""
    part = file.with_name(f".{file.name}.{os.getpid()}")
    states = {name: states.cpu() for name, states in dense.states.items()}
    copies, right = torch.from_numpy(dense.copies), torch.from_numpy(dense.right)
    torch.save({"of": of, "states": states, "copies": copies, "right": right}, part)
    part.replace(file)


def _read(file: Path, of: str, product: Product) -> Dense:
    found: dict[str, Any] = torch.load(file, weights_only=True)
    if found["of"] != of:
        raise ModlabError(
            f"{file} is the dense side of {found['of']}, and this is {of}: give another file, or delete it."
        )
    states = {name: states.to(product.device) for name, states in found["states"].items()}
    return Dense(states, found["copies"].numpy(), found["right"].numpy())


def _of(product: Product, data: Data, rows: int) -> str:
    """Of what it is the dense side: the vocabulary's matrix stands for the weights."""
    texts = [data.texts[name][:rows] for name in COUNTED]
    asked = [of for probe in (data.recall, data.retrieval) for of in (probe.rows, probe.spans)]
    sums = product.head_VD.float().sum(0).cpu().numpy()
    said = [_digest([sums]), _digest([*texts, *asked])]
    return f"weights {said[0]} in {product.dtype}, texts {said[1]}, {rows} rows"


def _digest(arrays: list[np.ndarray]) -> str:
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()[:12]
