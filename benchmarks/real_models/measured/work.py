"""The pieces of a run on one model, in their order of value, and what they share."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from benchmarks.real_models.measured import fixed, humaneval, shots, thresholds
from benchmarks.real_models.measured.far import Far
from benchmarks.real_models.measured.pieces import Folder, Piece
from benchmarks.real_models.measured.product import Product
from benchmarks.real_models.measured.settings import DENSE, Setting, at, first_of_each
from benchmarks.real_models.texts import Data
from modlab.probes.dense_side import MADE_OF
from modlab.probes.long_tasks import ruler

CONTROLLED = (4.0, 8.0)
"""Savings at which controls are run."""
KINDS = ("far", "controls", "ruler", "humaneval", "shots")
"""In their order of value."""


@dataclass
class Sizes:
    """How much of everything.

    Attributes:
        rows: of each text.
        held: rows of each text that thresholds are set on; others than `rows`.
        lengths, samples: of RULER-kind tasks, questions a task and length.
        behind, new, problems: of HumanEval: tokens in front, tokens written, problems (None: all).
        items: questions of each many-shot task.
        batch: rows that are written at once.
        controls: which of `fixed.NAMES`.
    """

    rows: int = 8
    held: int = 2
    lengths: tuple[int, ...] = (4096, 8192)
    samples: int = 25
    behind: int = humaneval.BEHIND
    new: int = humaneval.NEW
    problems: int | None = None
    items: int = 300
    batch: int = 41
    controls: tuple[str, ...] = fixed.NAMES


class Work:
    """What the pieces of one process share.

    Args:
        questions: folder of the evaluation sets.
        folder: where pieces are left.
        dense: file of the dense side, where other processes or runs share it.
    """

    def __init__(
        self, product: Product, data: Data, questions: Path, folder: Folder, sizes: Sizes,
        dense: Path | None = None,
    ) -> None:  # fmt: skip
        self.product, self.data, self.questions = product, data, questions
        self.folder, self.sizes, self.dense = folder, sizes, dense

    @cached_property
    def far(self) -> Far:
        """With the dense side, once a process."""
        return Far(self.product, self.data, self.sizes.rows, self.dense)

    def pieces(self, settings: list[Setting], kinds: tuple[str, ...] = KINDS) -> list[Piece]:
        """All of them, by kind and in each in the order of the settings; a setting's threshold before the
        first that needs it, so that a run that is cut off has whole settings."""
        thresholds_left = {piece.name: piece for piece in map(self._threshold, settings)}
        made: list[Piece] = []
        for piece in self._measured(settings, kinds):
            made += [thresholds_left.pop(name) for name in piece.needs if name in thresholds_left]
            made.append(piece)
        return made

    def _threshold(self, setting: Setting) -> Piece:
        saving, recent = setting.saving, setting.recent
        run = partial(thresholds.find, self.product, self.data, self.sizes.held, saving, recent)
        return Piece(at("threshold", setting), run)

    def _measured(self, order: list[Setting], kinds: tuple[str, ...]) -> list[Piece]:
        made: list[Piece] = []
        given: dict[str, Callable[[list[Setting]], list[Piece]]] = {
            "far": self._far, "controls": self._controls, "ruler": self._ruler,
            "humaneval": self._humaneval, "shots": self._shots,
        }  # fmt: skip
        for kind in kinds:
            made += given[kind](order)
        return made

    def set_to(self, setting: Setting | None) -> contextlib.AbstractContextManager[None]:
        """Inside this block the model saves so much; None: it is dense."""
        if setting is None:
            return self.product.at(None)
        found = self.folder.read(at("threshold", setting))
        return self.product.at(float(found["threshold"]), int(found["recent"]))

    def _far(self, settings: list[Setting]) -> list[Piece]:
        def run(setting: Setting) -> dict[str, Any]:
            far = self.far
            with self.set_to(setting):
                return far.by_cache()

        def floor() -> dict[str, Any]:
            """All keys kept: what rounding alone makes of the measures."""
            far = self.far
            with self.product.at(0.0):
                return far.by_cache()

        made = [Piece(at("far", s), partial(run, s), (at("threshold", s),)) for s in settings]
        return [*made, Piece(at("far", 1), floor)]

    def _controls(self, settings: list[Setting]) -> list[Piece]:
        def run(name: str, setting: Setting) -> dict[str, Any]:
            gates, far = self.folder.read(at("far", setting)), self.far
            torch.manual_seed(0)
            T = self.data.recall.rows.shape[1]
            with self.set_to(setting), fixed.control(self.product, name, gates, T):
                found = far.by_rows(retrieval=True)
            return {"control": name, **found, "ratio": gates["ratio"] * gates["keys"] / found["keys"]}

        several = max(self.product.routing.gates.values()) > 1
        names = [n for n in self.sizes.controls if several or n not in ("chance per head", "whole heads")]
        return [
            Piece(at(f"control {name}", s), partial(run, name, s), (at("far", s),))
            for s in first_of_each(settings)
            if s.saving in CONTROLLED
            for name in names
        ]

    def _ruler(self, settings: list[Setting]) -> list[Piece]:
        haystack = {"input_ids": np.concatenate(list(self.data.texts["novels"])).tolist()}

        def ask(length: int, dense: pd.DataFrame | None) -> pd.DataFrame:
            return ruler(
                self.product.model, haystack, self.product.tokenizer, lengths=(length,), by_row=True,
                samples=self.sizes.samples, batch_size=self.sizes.batch, dense=dense, progress=False,
            )  # fmt: skip

        def run_dense(length: int) -> dict[str, Any]:
            with self.product.at(None):
                table = ask(length, None)
            return {"scores": _by_task(table, "score"), "made_of": table.attrs[MADE_OF],
                    "rows": table.to_dict("records")}  # fmt: skip

        def run(length: int, setting: Setting) -> dict[str, Any]:
            known = self.folder.read(at(f"ruler {length}", DENSE))
            dense = pd.DataFrame(known["rows"]).rename(columns={"score": "dense"})
            dense.attrs[MADE_OF] = known["made_of"]
            with self.set_to(setting):
                table = ask(length, dense)
            return {"scores": _by_task(table, "routed")}

        made = []
        for length in self.sizes.lengths:
            base = at(f"ruler {length}", DENSE)
            made.append(Piece(base, partial(run_dense, length)))
            made += [
                Piece(
                    at(f"ruler {length}", s),
                    partial(run, length, s),
                    (base, at("threshold", s)),
                )
                for s in settings
            ]
        return made

    def _humaneval(self, settings: list[Setting]) -> list[Piece]:
        sizes = self.sizes

        def run(setting: Setting | None) -> dict[str, Any]:
            with self.set_to(setting):
                return humaneval.measure(
                    self.product.model, self.product.tokenizer, self.questions, behind=sizes.behind,
                    new=sizes.new, batch=sizes.batch, limit=sizes.problems,
                )  # fmt: skip

        return self._with_dense("humaneval", run, settings)

    def _shots(self, settings: list[Setting]) -> list[Piece]:
        made = []
        for task in shots.SHOTS:

            def run(setting: Setting | None, task: str = task) -> dict[str, Any]:
                with self.set_to(setting):
                    return shots.measure(self.product, task, self.questions, self.sizes.items)

            made += self._with_dense(f"shots {task}", run, settings)
        return made

    def _with_dense(
        self, name: str, run: Callable[[Setting | None], dict[str, Any]], settings: list[Setting]
    ) -> list[Piece]:
        made = [Piece(at(name, DENSE), partial(run, None))]
        return made + [Piece(at(name, s), partial(run, s), (at("threshold", s),)) for s in settings]


def _by_task(table: pd.DataFrame, column: str) -> dict[str, list[float]]:
    """Scores of each task and length, question by question."""
    named = table.assign(
        name=[f"{task} {length}" for task, length in zip(table["task"], table["length"], strict=True)]
    )
    return {name: rows[column].tolist() for name, rows in named.groupby("name", sort=False)}
