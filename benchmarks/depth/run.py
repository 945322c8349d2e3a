"""Runs arms on a model: convert, distil, set the threshold, measure; one line of JSON an arm."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

import modlab
from benchmarks.depth import compute, removal, tasks
from benchmarks.depth.arms import Arm, arm_named
from benchmarks.depth.distil import Plan, by_package, distil
from benchmarks.depth.measure import dense, measure
from benchmarks.depth.model import load
from benchmarks.depth.scores import start_from_scores
from benchmarks.depth.start import start
from benchmarks.real_models.evaluate import MEASURED, Dense
from benchmarks.real_models.mixture import Mixture
from benchmarks.real_models.run import rounded
from benchmarks.real_models.texts import Data

CALIBRATED, SCORED, FITTED = 4, 16, 32
"""Training rows on which a threshold is set or removal is chosen, on which scores are regressed, and to which
projections are fitted."""
FACTS = "distilled.json"
"""Next to the weights that an arm added: what its row tells of how they came about."""


class Study:
    """A model, its texts and where results go.

    Args:
        folder: of the model.
        out: folder for rows.jsonl and trained weights.
        questions: folder of the tasks' files, or None.
        items: of each task.
        measured: rows of each text.
        problems: of HumanEval.
        start: K/V routers that arms start from which say so; by default those that ship for the model.
    """

    def __init__(
        self,
        folder: Path,
        device: str,
        data: Data,
        out: Path,
        questions: Path | None = None,
        items: int = 1000,
        measured: int = MEASURED,
        start: str | None = None,
        problems: int = 0,
    ) -> None:
        self.folder, self.device, self.data, self.out = folder, device, data, out
        self.questions, self.items, self.measured = questions, items, measured
        self.problems = problems
        self.start_from = start or f"{folder.name}-kv"
        self.begun = time.monotonic()
        self.known: Dense | None = None
        self.order: dict[str, list[int]] = {}  # of removal, which arms share
        self.dense_right: dict[str, np.ndarray] = {}
        out.mkdir(parents=True, exist_ok=True)

    def say(self, text: str) -> None:
        print(f"[{time.monotonic() - self.begun:6.1f}] {self.folder.name} {text}", flush=True)

    @property
    def measured_length(self) -> int:
        """Tokens of the rows that operations are counted for."""
        return int(self.data.recall.rows.shape[1])

    def done(self, name: str, seed: int) -> bool:
        """Whether an earlier call of this folder has come to the arm's row."""
        return any(_of(row) == (self.folder.name, name, seed) for row in self._rows() if "left" not in row)

    def _rows(self) -> list[dict[str, Any]]:
        path = self.out / "rows.jsonl"
        return (
            [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
            if path.exists()
            else []
        )

    def _write(self, row: dict[str, Any]) -> None:
        """In the place of what the arm had come to before."""
        rows = [other for other in self._rows() if _of(other) != _of(row)]
        lines = [json.dumps(one) for one in [*rows, rounded(row)]]
        (self.out / "rows.part").write_text("\n".join(lines) + "\n", encoding="utf-8")
        (self.out / "rows.part").replace(self.out / "rows.jsonl")

    def run(self, name: str, plan: Plan, seconds: float | None = None) -> dict[str, Any]:
        """One arm, from the dense model, or from what an earlier call distilled and did not come to measure,
        to its row.

        Args:
            seconds: of distillation, instead of the plan's tokens.
        """
        arm = arm_named(name)
        model = load(self.folder, self.device)
        self._know(model)
        facts: dict[str, Any] = {"plan": dataclasses.asdict(plan), "arm_fields": dataclasses.asdict(arm)}
        saved = self.out / f"added_{name.replace('/', '-')}"
        if (told := self._saved(saved, arm, facts)) is not None:
            self.say(f"{name} was distilled by an earlier call, and is measured")
            facts, distilled = told, modlab.load(saved, base=str(self.folder), dtype=model.dtype)[0]
            model = cast(Any, distilled).to(self.device).eval()
        else:
            facts |= self._make(model, arm, plan, seconds)
            if modlab.is_converted(model) and arm.trains == "added":
                self._save(model, saved, facts)
        removed: list[int] = facts.get("removed", [])
        found = measure(model, arm, self.data, self._known(), removed)
        row = {
            "model": self.folder.name, "arm": name, "seed": plan.seed,
            "tokens": facts.get("distillation", {}).get("tokens", 0),
            "compute_asked": arm.compute if arm.compute < 1 else None,
            **found, "tasks": {}, **facts,
        }  # fmt: skip
        right: dict[str, np.ndarray] = {}
        for task, left in zip(asked := self._asked(), range(len(asked), 0, -1), strict=True):
            self._write({**row, "left": left})  # of the tasks: time may run out in any of them
            right |= task(model)
            row["tasks"] = tasks.paired(right, self.dense_right)
        self._write(row)
        gap = " ".join(f"{value:+.3f}" for value in found["recall_gap"].values())
        self.say(f"RESULT {name} compute {found['compute']:.3f} KL {found['kl_far']:.4f} recall {gap}")
        return row

    def _make(self, model: Any, arm: Arm, plan: Plan, seconds: float | None) -> dict[str, Any]:
        """Makes the arm of a dense model, in place; what there is to tell of it."""
        facts: dict[str, Any] = {}
        mixture = Mixture(self.data.stream, self.data.lines, plan.seed)
        plain = Mixture(self.data.stream, self.data.lines, plan.seed + 1, 0.0, 0.0)
        rows = plain.rows(CALIBRATED, plan.length).to(self.device)
        if arm.removes:
            facts["removed"] = self._remove(model, arm, rows)
        else:
            modlab.convert(model, modlab.MoDConfig(**arm.mod))
            model.mod.what_if = True
            if arm.started:
                facts["start"] = start(model, self.start_from, arm.ratio)
        if arm.pull == "target":
            plan = dataclasses.replace(plan, keep=_keep(model, arm, self.measured_length))
            facts["keep_asked"] = plan.keep
        if arm.scored:
            facts["scores_r2"] = start_from_scores(
                model, plain.rows(SCORED, plan.length).to(self.device).split(1), plan.keep
            )
        if arm.fitted:
            shares = modlab.fit_projections(model, plain.rows(FITTED, plan.length))
            facts["fitted"] = {str(index): share for index, share in shares.items()}
        if arm.trains == "lora":
            _add_lora(model)
        if plan.tokens and arm.trains == "added":
            facts["distillation"] = by_package(model, arm, mixture, plan, self.say, seconds)
        elif plan.tokens and arm.trains != "none":
            minutes = seconds and seconds / 60
            facts["distillation"] = distil(model, arm, mixture, plan, self.say, minutes)
        if arm.pull in ("target", "topk"):
            keep = plan.keep if arm.pull == "target" else model.mod.config.capacity
            modlab.calibrate(model, [{"input_ids": rows}], keep_ratio=keep)
        return facts

    def _save(self, model: Any, at: Path, facts: dict[str, Any]) -> None:
        """What was added, so that a call that ends before it is measured has not distilled for nothing."""
        (at / FACTS).unlink(missing_ok=True)
        modlab.save_routers(model, at, self.folder.name)
        (at / FACTS).write_text(json.dumps(facts, default=float), encoding="utf-8")

    def _saved(self, at: Path, arm: Arm, asked: dict[str, Any]) -> dict[str, Any] | None:
        """What an earlier call of this folder told of the arm that it left there; None without one of this
        plan, this arm and this start."""
        if not (at / FACTS).exists():
            return None
        told: dict[str, Any] = json.loads((at / FACTS).read_text(encoding="utf-8"))
        start = Path(self.start_from).name if arm.started else None
        same = {name: told[name] for name in asked} == asked and told.get("start", {}).get("from") == start
        return told if same else None

    def _know(self, model: Any) -> None:
        if self.known is None:
            self.known = dense(model, self.data, self.measured)
            for task in self._asked():
                self.dense_right |= task(model)
            self.say("dense measured")

    def _known(self) -> Dense:
        assert self.known is not None
        return self.known

    def _asked(self) -> list[Callable[[Any], dict[str, np.ndarray]]]:
        """What says of a model which items of some tasks it gets right."""
        if self.questions is None:
            return []
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(self.folder)
        asked: list[Callable[[Any], dict[str, np.ndarray]]]
        asked = [partial(tasks.right, tokenizer=tokenizer, folder=self.questions, items=self.items)]
        if self.problems:
            asked.append(
                partial(tasks.written, tokenizer=tokenizer, folder=self.questions, problems=self.problems)
            )
        return asked

    def _remove(self, model: Any, arm: Arm, rows: torch.Tensor) -> list[int]:
        """As many as bring the operations nearest to what is asked."""
        L, T = model.config.num_hidden_layers, self.measured_length
        key = "layers" if arm.removes == "layer" else "attentions"
        count = min(range(L), key=lambda n: abs(compute.removed(model.config, T, **{key: n}) - arm.compute))
        known = self.order.get(arm.removes, [])
        if len(known) < count:
            known = self.order[arm.removes] = removal.greedy(model, arm.removes, count, rows[:1], known)
        chosen = known[:count]
        removal.remove(model, arm.removes, chosen)
        return sorted(chosen)


def _of(row: dict[str, Any]) -> tuple[str, str, int]:
    """What tells rows apart."""
    return row["model"], row["arm"], row["seed"]


def _keep(model: Any, arm: Arm, T: int) -> float:
    """Keep ratio for what the arm aims at: a K/V saving, or operations."""
    config = model.mod.config
    if arm.ratio > 1:
        recent = min(config.recent_stored / T, 1 / 8)
        return max((1 / arm.ratio - recent) / (1 - recent), 2 * config.keep_first / T)
    return compute.keep_for(model.config, T, config.skip, len(model.mod.layers), arm.compute)


def _add_lora(model: Any) -> None:
    """Adapters of rank 32 on all linear maps of the layers, inside the model."""
    from peft import LoraConfig, inject_adapter_in_model

    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    inject_adapter_in_model(LoraConfig(r=32, lora_alpha=64, target_modules=names), model)
