"""HumanEval behind other code: each problem stands after so many tokens of functions from Python's library.

All prompts have the same length: the other code in front is cut on its left. Greedy, through `model.generate`
with the model's own cache; a program ends where its next line begins at the margin. pass@1 by running the
problem's own tests (`sandbox.py`). HumanEval: arXiv 2107.03374.

Shape letters: B rows, P tokens of a prompt, T tokens with what was written.
"""

from __future__ import annotations

import ast
import functools
import gzip
import json
import os
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList

from benchmarks.real_models.measured.halving import halving
from benchmarks.real_models.measured.sandbox import all_pass
from modlab.errors import ModlabError
from modlab.probes.writing import end_tokens, plain_generation

FILE = "HumanEval.jsonl.gz"
BEHIND = 3000
"""Tokens of other code in front of a problem, at least."""
NEW = 320
"""Tokens written at most; the problems' own solutions take 250 at most in these tokenizers."""
LOOK = 8
"""Tokens between two looks at whether all programs have ended."""
MARGIN = re.compile(r"\n(?=[^\s)\]}])")
"""A line that begins at the margin: whatever it is, the function is over."""


def problems(folder: Path, limit: int | None = None) -> list[dict[str, str]]:
    """The problems, in the file's order.

    Raises:
        ModlabError: the file is not there.
    """
    path = folder / FILE
    if not path.is_file():
        raise ModlabError(f"{path} is not there: give the folder of the evaluation sets.")
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines][:limit]


@functools.cache
def functions() -> list[str]:
    """Top-level functions and classes of the running interpreter's library, in a fixed order."""
    found = []
    for path in sorted(Path(os.__file__).parent.glob("*.py")):
        text = path.read_text(encoding="utf-8", errors="replace")
        try:
            nodes = ast.parse(text).body
        except SyntaxError:
            continue
        lines = text.splitlines()
        for node in nodes:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                block = "\n".join(lines[node.lineno - 1 : node.end_lineno])
                if 300 <= len(block) <= 4000:
                    found.append(block)
    return found


def prompts(tokenizer: Any, asked: list[dict[str, str]], behind: int, seed: int = 0) -> Tensor:
    """Each problem behind at least `behind` tokens of other code, long [problems, P]."""
    blocks = functions()

    def ids(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    own = [ids(problem["prompt"].rstrip() + "\n") for problem in asked]
    length = behind + max(map(len, own))
    rows = []
    for number, problem_ids in enumerate(own):
        rng = random.Random(f"{seed}/{number}")
        before: list[int] = []
        while len(before) < length - len(problem_ids):
            before = ids(rng.choice(blocks) + "\n\n\n") + before
        rows.append(before[len(before) - (length - len(problem_ids)) :] + problem_ids)
    return torch.tensor(rows)


class Ended(StoppingCriteria):
    """Stops once every row has come to a line at the margin, or to an end token; looks every few tokens."""

    def __init__(self, tokenizer: Any, prompt: int, ends: list[int]) -> None:
        self.tokenizer, self.prompt, self.ends = tokenizer, prompt, set(ends)

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        over = (input_ids.shape[1] - self.prompt) % LOOK == 0 and all(self._ends(input_ids))
        return torch.full((len(input_ids),), over, dtype=torch.bool, device=input_ids.device)

    def _ends(self, ids_BT: Tensor) -> Iterator[bool]:
        for row in ids_BT[:, self.prompt :].tolist():
            yield bool(self.ends & set(row)) or bool(MARGIN.search(self.tokenizer.decode(row)))


@torch.no_grad()
def written(model: Any, tokenizer: Any, prompt_NP: Tensor, new: int, batch: int) -> list[str]:
    """What the model writes behind each prompt, cut where the function ends."""
    ends, texts = end_tokens(model), []
    P = prompt_NP.shape[1]

    def some(rows_BP: Tensor) -> list[str]:
        ids_BP = rows_BP.to(model.device)
        with plain_generation(model):
            ids_BT = model.generate(
                ids_BP, attention_mask=torch.ones_like(ids_BP), max_new_tokens=new,
                stopping_criteria=StoppingCriteriaList([Ended(tokenizer, P, ends)]),
            )  # fmt: skip
        return [function_of(tokenizer.decode(_until(row, ends))) for row in ids_BT[:, P:].tolist()]

    for part in halving(list(prompt_NP), batch, lambda rows: some(torch.stack(list(rows)))):
        texts += part
    return texts


def _until(row: list[int], ends: list[int]) -> list[int]:
    return next((row[:at] for at, token in enumerate(row) if token in ends), row)


def function_of(text: str) -> str:
    """The text up to its first line at the margin."""
    found = MARGIN.search(text)
    return text[: found.start()] if found else text


def programs(asked: list[dict[str, str]], texts: list[str]) -> list[str]:
    """Each problem with its body, its tests, and the call of them."""
    return [
        f"{problem['prompt'].rstrip()}\n{text}\n\n{problem['test']}\n\ncheck({problem['entry_point']})\n"
        for problem, text in zip(asked, texts, strict=True)
    ]


def measure(
    model: Any, tokenizer: Any, folder: Path, *, behind: int = BEHIND, new: int = NEW, batch: int = 41,
    limit: int | None = None,
) -> dict[str, Any]:  # fmt: skip
    """pass@1 problem by problem, at the model's present setting."""
    asked = problems(folder, limit)
    prompt_NP = prompts(tokenizer, asked, behind)
    texts = written(model, tokenizer, prompt_NP, new, batch)
    right = all_pass(programs(asked, texts))
    return {
        "scores": {f"humaneval behind {behind:,}": [float(one) for one in right]},
        "prompt_tokens": prompt_NP.shape[1], "written": texts,
    }  # fmt: skip
