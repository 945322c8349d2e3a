"""Many shots: the likelihood of choices behind examples, routed as they are.

ARC-Challenge with 25 shots, HellaSwag with 10, MMLU with 5 of the question's subject. Choices run by one of
two paths, which give the same up to rounding, and the record says which:

- `CACHE`: the examples run once, and their cache is copied for the questions behind them, so what it has
  dropped is gone for all of them. The least work; but each head of each copy of a routed cache is moved by
  itself, which takes a GPU far longer than the work (197 s of 300 questions of ARC, where dense takes 10).
- `ROWS`: examples, question and choice as one row without a cache, hidden keys masked: on a GPU in 16 bit
  one kernel a layer. Dense rows go the same way there, so that both sides round alike.

MMLU's examples, which are different for each subject, are rows with their questions anyway.
Our own scorer, not lm-evaluation-harness: neither routed caches nor their settings are known to it.

Where no examples are at hand apart from the questions (of ARC 20 of 25, of HellaSwag 5 of 10), they are
questions that are not asked. ARC and HellaSwag by likelihood over length in characters, MMLU by the letter.

Shape letters: B rows, T tokens of a question with a choice, D model dim.
"""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.real_models.divergence import logits
from benchmarks.real_models.measured.halving import halving
from benchmarks.real_models.measured.product import Product, stored
from modlab.errors import ModlabError
from modlab.hf.names import cache_argument, given_cache

LETTERS = "ABCD"
BATCH = 64
CACHE, ROWS = "cache", "whole rows"
"""Paths; see above."""
SUBJECTS = 20
"""Of MMLU's 57, evenly spaced: each costs a prompt of its own."""
SHOTS = {"arc_challenge": 25, "hellaswag": 10, "mmlu": 5}
FILES = {"arc_challenge": "arc_challenge", "hellaswag": "hellaswag_1000"}


@dataclass
class Asked:
    """One question: what stands in front of its choices, the choices, which is right, by what they are
    divided (their characters, or 1)."""

    query: str
    choices: list[str]
    gold: int
    lengths: list[int]


@dataclass
class Sheet:
    """Examples, and the questions that are asked behind them."""

    shots: str
    questions: list[Asked]


def sheets(task: str, folder: Path, items: int) -> list[Sheet]:
    """The examples and questions of a task, `items` questions in all.

    Raises:
        ModlabError: no such task, or its files are not there.
    """
    if task not in SHOTS:
        raise ModlabError(f"there is no task {task!r}: choose some of {', '.join(SHOTS)}.")
    return _mmlu(folder, items) if task == "mmlu" else [_plain(task, folder, items)]


def _plain(task: str, folder: Path, items: int) -> Sheet:
    rows = _lines(folder, FILES[task])
    given = json.loads(_file(folder, "fewshot_prefixes.json").read_text(encoding="utf-8"))[FILES[task]]
    more = max(0, SHOTS[task] - 5)
    told = [row["query"] + row["choices"][int(row["gold"])] for row in rows[:more]]
    shots = "\n\n".join([given.strip("\n"), *told]) + "\n\n"
    asked = [
        Asked(row["query"], row["choices"], int(row["gold"]), [len(choice) for choice in row["choices"]])
        for row in rows[more : more + items]
    ]
    return Sheet(shots, asked)


def _mmlu(folder: Path, items: int) -> list[Sheet]:
    told, asked = _by_subject(folder, "mmlu_dev"), _by_subject(folder, "mmlu_test")
    names = sorted(set(told) & set(asked))
    chosen = [
        names[place] for place in np.linspace(0, len(names) - 1, min(SUBJECTS, len(names), items)).astype(int)
    ]
    each = -(-items // len(chosen))
    made = []
    for name in chosen:
        shots = [f"{_letters(row)} {LETTERS[int(row['gold'])]}" for row in told[name][: SHOTS["mmlu"]]]
        head = f"The following are multiple choice questions (with answers) about {name.replace('_', ' ')}."
        questions = [
            Asked(_letters(row), [f" {letter}" for letter in LETTERS], int(row["gold"]), [1] * 4)
            for row in asked[name][:each]
        ]
        made.append(Sheet("\n\n".join([head, *shots]) + "\n\n", questions))
    return made


def _letters(row: dict[str, Any]) -> str:
    options = "\n".join(f"{letter}. {choice}" for letter, choice in zip(LETTERS, row["choices"], strict=True))
    return f"{row['query'].strip()}\n{options}\nAnswer:"


def _by_subject(folder: Path, name: str) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {}
    for row in _lines(folder, name):
        found.setdefault(row["subject"], []).append(row)
    return found


def _file(folder: Path, name: str) -> Path:
    if not (folder / name).is_file():
        raise ModlabError(f"{folder / name} is not there: give the folder of the evaluation sets.")
    return folder / name


def _lines(folder: Path, name: str) -> list[dict[str, Any]]:
    text = _file(folder, f"{name}.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def measure(
    product: Product, task: str, folder: Path, items: int, batch: int = BATCH, path: str | None = None
) -> dict[str, Any]:
    """Which questions are answered, at the product's present setting, and what the examples' cache stores.

    Args:
        path: `CACHE` or `ROWS`, of ARC and HellaSwag; by default rows on a GPU, the cache elsewhere.
    """
    made = sheets(task, folder, items)
    path = path or (ROWS if product.device.type == "cuda" or task == "mmlu" else CACHE)
    if task == "mmlu":
        found: dict[str, Any] = {"scores": _by_letter(product, made, batch)}
    else:
        (sheet,) = made
        shots = product.ids(sheet.shots)
        cache = _cache_of(product, shots)
        said = partial(_behind, product, cache) if path == CACHE else partial(_in_rows, product, shots)
        found = {"scores": _answered(product, sheet.questions, said, batch)}
        if not product.routing.is_off:
            held = stored(cache)
            found["kv_saving"] = held.dense_kv_bytes / held.kv_bytes
    tokens = [len(product.ids(sheet.shots)) for sheet in made]
    return {
        **found, "scores": {f"{task} {SHOTS[task]}-shot": found["scores"]},
        "shot_tokens": [min(tokens), max(tokens)], "path": path,
    }  # fmt: skip


@torch.no_grad()
def _by_letter(product: Product, made: Sequence[Sheet], batch: int) -> list[float]:
    """1 where the likeliest letter is right; whole rows, padded on the right."""
    rows: list[list[int]] = []
    golds: list[int] = []
    for sheet in made:
        shots = product.ids(sheet.shots)
        rows += [shots + product.ids(asked.query) for asked in sheet.questions]
        golds += [asked.gold for asked in sheet.questions]
    told = [product.ids(f" {letter}") for letter in LETTERS]
    same = os.path.commonprefix(told)  # a blank, where it is a token of its own
    rows = [[*row, *same] for row in rows]
    letters = torch.tensor([ids[len(same)] for ids in told], device=product.device)
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    right = [0.0] * len(rows)

    def said(some: Sequence[int]) -> list[int]:
        states_BTD = product.states(padded([rows[i] for i in some], product.device))
        ends = torch.tensor([len(rows[i]) - 1 for i in some], device=product.device)
        last = states_BTD[torch.arange(len(some), device=product.device), ends]
        chosen: list[int] = logits(last, product.head_VD)[:, letters].argmax(-1).tolist()
        return chosen

    done = 0
    for chosen in halving(order, batch, said):
        for i, letter in zip(order[done : done + len(chosen)], chosen, strict=True):
            right[i] = float(letter == golds[i])
        done += len(chosen)
    return right


def padded(rows: Sequence[list[int]], device: torch.device) -> Tensor:
    """Token ids, long [B, T], rows filled up behind their end, where no token of theirs looks: so no mask
    says which they are, and attention stays with its fastest kernels."""
    ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
    for place, row in enumerate(rows):
        ids[place, : len(row)] = torch.tensor(row)
    return ids.to(device)


@torch.no_grad()
def _cache_of(product: Product, ids: list[int]) -> Any:
    row = torch.tensor([ids], device=product.device)
    return given_cache(product.decoder(input_ids=row, use_cache=True))


@dataclass(frozen=True)
class Choice:
    """One choice of a question, by their numbers, and the tokens of both."""

    number: int
    place: int
    query: list[int]
    told: list[int]

    @property
    def ids(self) -> list[int]:
        return self.query + self.told


Likelihoods = Callable[[Sequence[Choice]], list[float]]
"""Log-likelihood of each choice behind the examples and its question."""


def _answered(
    product: Product, questions: Sequence[Asked], likelihoods: Likelihoods, batch: int
) -> list[float]:
    """1 where the likeliest choice is the right one."""
    choices = []
    for number, asked in enumerate(questions):
        query = product.ids(asked.query)
        choices += [Choice(number, at, query, product.ids(text)) for at, text in enumerate(asked.choices)]
    total = np.full((len(questions), max(len(asked.choices) for asked in questions)), -np.inf)
    order = sorted(choices, key=lambda one: len(one.ids))
    for part in halving(order, batch, lambda some: list(zip(some, likelihoods(some), strict=True))):
        for one, said in part:
            total[one.number, one.place] = said / questions[one.number].lengths[one.place]
    return [float(line.argmax() == asked.gold) for line, asked in zip(total, questions, strict=True)]


@torch.no_grad()
def _behind(product: Product, cache: Any, some: Sequence[Choice]) -> list[float]:
    """Behind what the cache of the examples holds."""
    own = copy.deepcopy(cache)
    own.batch_repeat_interleave(len(some))
    given = {cache_argument(product.model): own}
    ids_BT = padded([one.ids for one in some], product.device)
    states = product.decoder(input_ids=ids_BT, use_cache=True, **given).last_hidden_state
    return _told(product, some, states, 0)


@torch.no_grad()
def _in_rows(product: Product, shots: list[int], some: Sequence[Choice]) -> list[float]:
    """As rows of their own, examples included."""
    states = product.states(padded([shots + one.ids for one in some], product.device))
    return _told(product, some, states, len(shots))


def _told(product: Product, some: Sequence[Choice], states_BTD: Tensor, before: int) -> list[float]:
    """Of last states of rows in which a choice's question begins behind so many tokens."""
    found = []
    for states_TD, one in zip(states_BTD, some, strict=True):
        start = before + len(one.query) - 1
        said = logits(states_TD[start : start + len(one.told)], product.head_VD).log_softmax(-1)
        told = torch.tensor(one.told, device=said.device)
        found.append(said.gather(1, told[:, None]).sum())
    return torch.stack(found).tolist()
