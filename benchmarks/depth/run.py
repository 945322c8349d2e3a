"""Runs arms on a model: convert, distil, set the threshold, measure; one line of JSON an arm."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

import modlab
from benchmarks.depth import compute, removal, tasks
from benchmarks.depth.arms import Arm, arm_named
from benchmarks.depth.distil import Plan, by_package, distil
from benchmarks.depth.measure import dense, measure
from benchmarks.depth.model import load
from benchmarks.depth.prefill import time_pair
from benchmarks.depth.saved import Saved
from benchmarks.depth.scores import start_from_scores
from benchmarks.depth.start import start
from benchmarks.real_models.evaluate import MEASURED, Dense
from benchmarks.real_models.mixture import Mixture
from benchmarks.real_models.run import rounded
from benchmarks.real_models.texts import Data

CALIBRATED, SCORED, FITTED = 4, 16, 32
"""Training rows on which a threshold is set or removal is chosen, on which scores are regressed, and to which
projections are fitted."""
SAVED = ("added", "all")
"""What trains of the arms whose weights are kept: a call that ends early has not trained for nothing."""

Task = Callable[[Any], dict[str, np.ndarray]]
"""Says which items a model gets right, by task."""


class Study:
    """A model, its texts and where results go.

    Args:
        folder: of the model.
        out: folder for rows.jsonl and trained weights.
        questions: folder of the tasks' files, or None.
        items: of each task.
        measured: rows of each text.
        problems: of HumanEval.
        timed: tokens after a prompt that are timed with it; 0 times nothing.
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
        timed: int = 0,
    ) -> None:
        self.folder, self.device, self.data, self.out = folder, device, data, out
        self.questions, self.items, self.measured = questions, items, measured
        self.problems, self.timed = problems, timed
        self.start_from = start or f"{folder.name}-kv"
        self.begun = time.monotonic()
        self.known: Dense | None = None
        self.order: dict[str, list[int]] = {}  # of removal, which arms share
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
        """One arm, from the dense model, or from what an earlier call trained and did not come to measure, to
        its row. What says most is measured first, and the row is written each time that it says more.

        Args:
            seconds: of distillation, instead of the plan's tokens.
        """
        arm = arm_named(name)
        model = load(self.folder, self.device)
        self._know(model)
        facts: dict[str, Any] = {
            "plan": dataclasses.asdict(plan), "arm_fields": dataclasses.asdict(arm), "limit_s": seconds,
        }  # fmt: skip
        saved = Saved(self.out / f"added_{name.replace('/', '-')}", self.folder, whole=arm.trains == "all")
        if (told := self._told(saved, arm, facts)) is not None:
            self.say(f"{name} was trained by an earlier call, and is measured")
            facts, model = told, saved.load(self.device, model.dtype)
            if facts.get("distillation", {}).get("cut"):
                self._calibrate(model, arm, plan, facts)
        else:
            facts |= self._make(model, arm, plan, seconds, facts, saved)
            if modlab.is_converted(model) and arm.trains in SAVED:
                saved.save(model, facts)
        if arm.published and "distillation" in facts:
            seen = facts["distillation"]["tokens"] / len(self.data.stream)
            facts["distillation"]["epochs"] = round(seen, 3)
        self.say(f"{name} is there")
        found = measure(model, arm, self.data, self._known(), facts.get("removed", []))
        row = {
            "model": self.folder.name, "arm": name, "seed": plan.seed,
            "tokens": facts.get("distillation", {}).get("tokens", 0),
            "compute_asked": arm.compute if arm.compute < 1 else None,
            **found, "tasks": {}, **facts,
        }  # fmt: skip
        gap = " ".join(f"{value:+.3f}" for value in found["recall_gap"].values())
        self.say(f"RESULT {name} compute {found['compute']:.3f} KL {found['kl_far']:.4f} recall {gap}")
        asked = self._asked()
        self._write(row | ({"left": len(asked) + bool(self.timed)} if asked or self.timed else {}))
        if self.timed and modlab.is_converted(model):
            row["latency"] = self._timed(model)
            self.say(f"{name} timed")
        right: dict[str, np.ndarray] = {}
        known: dict[str, np.ndarray] = {}
        for at, (label, task) in enumerate(asked.items()):
            self._write(row | {"left": len(asked) - at})  # of the tasks: time may run out in any of them
            known |= self._right_of_dense(label, task)
            right |= task(model)
            row["tasks"] = tasks.paired(right, known)
            self.say(f"{name} asked {label}")
        self._write(row)
        return row

    def _make(
        self,
        model: Any,
        arm: Arm,
        plan: Plan,
        seconds: float | None,
        known: dict[str, Any],
        saved: Saved,
    ) -> dict[str, Any]:
        """Makes the arm of a dense model, in place; what there is to tell of it. During training what there
        is by then is saved, with what is `known` of it."""
        facts: dict[str, Any] = {}
        mixture = Mixture(self.data.stream, self.data.lines, plan.seed)
        plain = self._plain(plan)
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
            self.say("projections fitted")
        if arm.trains == "lora":
            _add_lora(model)

        def kept(told: dict[str, Any]) -> None:
            saved.save(model, known | facts | {"distillation": told})

        if plan.tokens and (arm.published or arm.trains == "added"):
            text = self._plain(plan) if arm.published else mixture
            facts["distillation"] = by_package(model, arm, text, plan, self.say, seconds, kept)
        elif plan.tokens and arm.trains != "none":
            minutes = seconds and seconds / 60
            facts["distillation"] = distil(model, arm, mixture, plan, self.say, minutes)
        self._calibrate(model, arm, plan, facts)
        return facts

    def _plain(self, plan: Plan) -> Mixture:
        """Rows of text alone, the same for the same plan."""
        return Mixture(self.data.stream, self.data.lines, plan.seed + 1, 0.0, 0.0)

    def _calibrate(self, model: Any, arm: Arm, plan: Plan, facts: dict[str, Any]) -> None:
        """Sets the threshold, where one is aimed at, with keys and values as they are to be stored."""
        if arm.int8:
            modlab.set_kv_cache_dtype(model, "int8")
        if arm.pull not in ("target", "topk"):
            return
        keep = facts["keep_asked"] if arm.pull == "target" else model.mod.config.capacity
        rows = self._plain(plan).rows(CALIBRATED, plan.length).to(self.device)
        modlab.calibrate(model, [{"input_ids": rows}], keep_ratio=keep)

    def _told(self, saved: Saved, arm: Arm, asked: dict[str, Any]) -> dict[str, Any] | None:
        """What an earlier call of this folder told of the arm that it left there; None without one of this
        plan, this limit in seconds, this arm and this start."""
        told = saved.told()
        start = Path(self.start_from).name if arm.started else None
        if told is None or told.get("start", {}).get("from") != start:
            return None
        return told if asked.items() <= told.items() else None

    def _know(self, model: Any) -> None:
        if self.known is None:
            self.known = dense(model, self.data, self.measured)
            self.say("dense measured")

    def _right_of_dense(self, label: str, task: Task) -> dict[str, np.ndarray]:
        """What the dense model gets right; each folder of results asks it once."""
        path = self.out / f"dense_{self.folder.name}_{label}.npz"
        if not path.exists():
            right = task(load(self.folder, self.device))
            part = path.with_suffix(".part.npz")
            np.savez(part, **right)  # type: ignore[arg-type]
            part.replace(path)
            self.say(f"dense asked {label}")
        with np.load(path) as right:
            return dict(right)

    def _timed(self, model: Any) -> dict[str, Any]:
        """Of a prompt of the measured length, and of tokens after it."""
        return time_pair(load(self.folder, self.device), model, self.data.texts["wikitext"], self.timed)

    def _known(self) -> Dense:
        assert self.known is not None
        return self.known

    def _asked(self) -> dict[str, Task]:
        """By label, what says of a model which items of some tasks it gets right."""
        if self.questions is None:
            return {}
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(self.folder)
        fields: dict[str, Any] = {"tokenizer": tokenizer, "folder": self.questions}
        asked: dict[str, Task] = {f"tasks_{self.items}": partial(tasks.right, items=self.items, **fields)}
        if self.problems:
            humaneval = partial(tasks.written, problems=self.problems, **fields)
            asked[f"humaneval_{self.problems}"] = humaneval
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
