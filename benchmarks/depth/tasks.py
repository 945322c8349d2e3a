"""Zero-shot tasks by likelihood: what each item gets right, so that arms can be compared item by item.

Files: jsonl with `query`, `choices` and `gold`; LAMBADA's with `text`, whose last word is asked for.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.depth.model import head, states
from benchmarks.real_models.divergence import logits
from benchmarks.real_models.measured import humaneval

TASKS = {
    "lambada": "lambada_test.jsonl",
    "hellaswag": "hellaswag_1000.jsonl",
    "piqa": "piqa.jsonl",
    "arc_easy": "arc_easy.jsonl",
}
BATCH = 64
BEHIND = 1000

Pair = tuple[list[int], list[int]]


def right(model: Any, tokenizer: Any, folder: Path, items: int) -> dict[str, np.ndarray]:
    """Whether each of the first `items` of every task that `folder` has is answered, int [items]."""
    found = {}
    for name, file in TASKS.items():
        if not (folder / file).exists():
            continue
        with (folder / file).open(encoding="utf-8") as lines:
            rows = [json.loads(line) for _, line in zip(range(items), lines, strict=False)]
        score = _last_words if name == "lambada" else _choices
        found[name] = score(model, tokenizer, rows)
    return found


def written(model: Any, tokenizer: Any, folder: Path, problems: int) -> dict[str, np.ndarray]:
    """Whether what `generate` writes for each of so many problems of HumanEval passes, int [problems];
    `BEHIND` tokens of other code are in front. All are one batch: each step of so small ones waits for its
    launches."""
    found = humaneval.measure(model, tokenizer, folder, behind=BEHIND, limit=problems, batch=problems)
    scores = found["scores"]
    return {"humaneval": np.array(next(iter(scores.values()))).astype(int)}


def paired(mine: dict[str, np.ndarray], dense: dict[str, np.ndarray]) -> dict[str, Any]:
    """Accuracy of both and their difference with its standard error, a task; and of the mean of the tasks."""
    tasks: dict[str, Any] = {}
    for name, own in mine.items():
        gap = own.astype(float) - dense[name].astype(float)
        tasks[name] = {
            "score": float(own.mean()), "dense": float(dense[name].mean()), "items": len(own),
            "gap": float(gap.mean()), "gap_stderr": float(gap.std(ddof=1) / len(gap) ** 0.5),
        }  # fmt: skip
    if tasks:
        rows = list(tasks.values())
        tasks["mean"] = {
            "score": float(np.mean([row["score"] for row in rows])),
            "dense": float(np.mean([row["dense"] for row in rows])),
            "gap_stderr": float(np.sqrt(sum(row["gap_stderr"] ** 2 for row in rows)) / len(rows)),
        }
    return tasks


def _last_words(model: Any, tokenizer: Any, rows: Sequence[dict[str, Any]]) -> np.ndarray:
    pairs = []
    for row in rows:
        context, word = row["text"].rsplit(" ", 1)
        pairs.append((_ids(tokenizer, context), _ids(tokenizer, " " + word)))
    return np.array([int(greedy) for _, greedy in _scored(model, pairs)])


def _choices(model: Any, tokenizer: Any, rows: Sequence[dict[str, Any]]) -> np.ndarray:
    """By likelihood over length in characters."""
    pairs, owner = [], []
    for number, row in enumerate(rows):
        for place, choice in enumerate(row["choices"]):
            said = choice if choice.startswith(" ") else " " + choice
            pairs.append((_ids(tokenizer, row["query"]), _ids(tokenizer, said)))
            owner.append((number, place, len(choice)))
    best: dict[int, tuple[float, int]] = {}
    for (number, place, length), (total, _) in zip(owner, _scored(model, pairs), strict=True):
        best[number] = max(best.get(number, (-np.inf, -1)), (total / length, place))
    return np.array([int(best[number][1] == int(row["gold"])) for number, row in enumerate(rows)])


def _ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer.encode(text, add_special_tokens=False))


@torch.no_grad()
def _scored(model: Any, pairs: list[Pair]) -> list[tuple[float, bool]]:
    """Log-likelihood of each continuation, and whether it is what the model would say; padded on the right,
    where causal attention does not see it."""
    device = next(model.parameters()).device
    found: list[tuple[float, bool]] = [(0.0, False)] * len(pairs)
    order = sorted(range(len(pairs)), key=lambda i: len(pairs[i][0]) + len(pairs[i][1]))
    for start in range(0, len(order), BATCH):
        chosen = order[start : start + BATCH]
        rows = [pairs[i][0] + pairs[i][1] for i in chosen]
        ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
        for at, row in enumerate(rows):
            ids[at, : len(row)] = torch.tensor(row)
        state = states(model, ids.to(device))
        for at, i in enumerate(chosen):
            context, told = pairs[i][0], torch.tensor(pairs[i][1], device=device)
            where = slice(len(context) - 1, len(context) + len(told) - 1)
            said = logits(state[at, where], head(model)).log_softmax(-1)
            total = said.gather(1, told[:, None]).sum().item()
            found[i] = (total, bool((said.argmax(-1) == told).all()))
    return found
