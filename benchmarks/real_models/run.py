"""Runs arms on a model: fit, distil, save, set thresholds, measure; one line of JSON a result."""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.real_models import evaluate, scores
from benchmarks.real_models.arms import ARMS, Arm
from benchmarks.real_models.base import Base
from benchmarks.real_models.controls import controls
from benchmarks.real_models.distil import Plan, distil
from benchmarks.real_models.gates import Gates
from benchmarks.real_models.mixture import Mixture
from benchmarks.real_models.texts import Data

WINDOW = 128


class Study:
    """A model, its texts and where results go.

    Args:
        out: folder for rows.jsonl and gates.
    """

    def __init__(self, name: str, base: Base, data: Data, out: Path, seed: int = 0) -> None:
        self.name, self.base, self.data, self.out, self.seed = name, base, data, out, seed
        self.begun = time.monotonic()
        self.known: evaluate.Dense | None = None
        out.mkdir(parents=True, exist_ok=True)

    def say(self, text: str) -> None:
        print(f"[{time.monotonic() - self.begun:6.1f}] {self.name} {text}", flush=True)

    def train(self, arm_name: str, tokens: int, minutes: float | None = None, **changes: Any) -> Gates:
        """Makes the arm's gates and saves them."""
        arm = ARMS[arm_name]
        torch.manual_seed(self.seed)
        gates = Gates(self.base.shape, arm.form).to(self.base.device)
        facts: dict[str, Any] = {"model": self.name, "arm": arm_name, "seed": self.seed}
        if arm.score_rows:
            rows = changes.pop("score_rows", arm.score_rows)
            facts["scores"] = dataclasses.asdict(self._fit(gates, rows))
        if arm.plan is not None:
            plan = Plan(tokens=tokens, seed=self.seed, window=WINDOW, **(arm.plan | changes))
            mixture = Mixture(self.data.stream, self.data.lines, self.seed)
            self.say(f"{arm_name}: {plan}")
            facts["plan"] = dataclasses.asdict(plan)
            facts["distillation"] = distil(self.base, gates, mixture, plan, self.say, minutes)
        size = gates.save(self.out / f"gates_{arm_name}.safetensors", facts)
        facts["bytes"] = size
        (self.out / f"facts_{arm_name}.json").write_text(json.dumps(facts))
        self.say(f"{arm_name}: saved, {size:,} bytes")
        return gates

    def _fit(self, gates: Gates, count: int) -> scores.Fit:
        prompt = torch.from_numpy(self.data.prompt.astype("int64"))
        length = (min(4096, self.data.recall.rows.shape[1]) - len(prompt)) // 2
        plain = Mixture(self.data.stream, self.data.lines, self.seed + 1, passages=0.0, keyed=0.0)
        return scores.fit(self.base, gates, list(plain.rows(count, length)), prompt, say=self.say)

    def measure(
        self, arm_name: str, gates: Gates, ratios: list[float], with_controls: list[float], tokens: int
    ) -> None:
        """Appends a row for each ratio, and for the controls at those of `with_controls`."""
        if self.known is None:
            self.known = evaluate.dense(self.base, self.data)
            self.say("dense measured")
        T = self.data.recall.rows.shape[1]
        kept = None
        for ratio in ratios:
            threshold = evaluate.set_threshold(self.base, gates, self.data, ratio, WINDOW)
            found = evaluate.measure(self.base, gates, self.data, self.known, WINDOW)
            kept = found["keep_by_gate"]
            self._write(arm_name, gates, ratio, tokens, {**found, "threshold": threshold})
            if ratio not in with_controls:
                continue
            torch.manual_seed(self.seed)
            for name, window, rule in controls(kept, ratio, T, WINDOW, gates.form.first):
                found = evaluate.measure(self.base, gates, self.data, self.known, window, rule)
                self._write(f"{arm_name}: {name}", gates, ratio, 0, found)

    def _write(self, arm: str, gates: Gates, ratio: float, tokens: int, found: dict[str, Any]) -> None:
        row = {
            "model": self.name, "arm": arm, "granularity": "head" if gates.form.per_head else "layer",
            "tokens": tokens, "seed": self.seed, "ratio_asked": ratio, **found, "tasks": {},
        }  # fmt: skip
        with (self.out / "rows.jsonl").open("a") as file:
            file.write(json.dumps(rounded(row)) + "\n")
        gap = " ".join(f"{value:+.3f}" for value in found["recall_gap"].values())
        right = " ".join(f"{value:.3f}" for value in found["retrieval_of_dense"].values())
        by_text = " ".join(f"{value:.4f}" for value in found["kl_far_by_text"].values())
        self.say(
            f"RESULT {arm} {ratio:g}x got {found['ratio']:.2f}x KL {found['kl_far']:.4f} ({by_text}) "
            f"recall {gap} retrieval {right}"
        )


def rounded(value: Any) -> Any:
    """Floats with five figures, so that files stay readable."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [rounded(item) for item in value]
    return value


def known_arm(name: str) -> Arm:
    """The arm of that name.

    Raises:
        ModlabError: there is none.
    """
    from modlab.errors import ModlabError

    if name not in ARMS:
        raise ModlabError(f"no arm is called {name!r}; there are {', '.join(ARMS)}.")
    return ARMS[name]
