"""RULER-kind tasks at several lengths, dense and routed side by side: answers that a model writes.

    ruler(model, data, tokenizer, lengths=(4096, 8192))

Answers are written greedily by `model.generate` with the model's own cache, as users run it.
"""

from __future__ import annotations

import contextlib
import math
import random
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch

from modlab.errors import ModlabError, check_count
from modlab.hf.model import context_length
from modlab.probes.dense_side import check_dense, digest_of, sign
from modlab.probes.material import token_stream, windows
from modlab.probes.ruler_tasks import TASKS, Page, Question
from modlab.probes.writing import write
from modlab.routing.state import is_converted, routing_of, routing_off

if TYPE_CHECKING:
    import pandas as pd
    from transformers import PreTrainedModel

LENGTHS = (4096, 8192)
KEYS = ["task", "length", "row"]
"""What names a line of the table by row."""

APART = 64  # tokens from one prompt's place in the text to the next one's


def ruler(
    model: PreTrainedModel,
    data: Any,
    tokenizer: Any,
    *,
    lengths: Iterable[int] = LENGTHS,
    tasks: Iterable[str] = tuple(TASKS),
    samples: int = 20,
    seed: int = 0,
    batch_size: int = 1,
    by_row: bool = False,
    dense: pd.DataFrame | None = None,
    progress: bool = True,
) -> pd.DataFrame:
    """Share of the right answers that a model writes, a line a task and length.

    Args:
        model: dense or converted, at its present thresholds; of a converted one the dense side (routing off)
            answers the same questions. Inside `modlab.routing_off` a converted one is dense.
        data: running text to hide things in: texts or token batches, as `modlab.data.batches` takes them.
        tokenizer: the model's.
        lengths: tokens of a prompt with the room for its answer.
        tasks: some of "needle", "needle of keys", "needle of values", "variables", "frequent words".
        samples: questions a task and length.
        seed: of text, places, names and values.
        batch_size: prompts at once.
        by_row: one line a question instead of means.
        dense: a table by row of a call with the same arguments, whose dense side is taken instead of written
            again: it is the same at all thresholds. For a converted model.
        progress: show a progress bar.

    Returns:
        DataFrame: `task`, `length`, `samples`, `score` in [0, 1] and its `stderr`. Of a converted model
        `dense` and `routed` in place of `score`, `difference` (routed less dense) and its `stderr`, which is
        that of paired questions. With `by_row`: `row` in place of `samples`, and no `stderr`.

    Raises:
        ModlabError: no such task, prompts beyond the context or shorter than a question, too little text;
            `dense` is of other text or arguments, or given for a dense model.
    """
    import pandas as pd
    from tqdm.auto import tqdm

    chosen, wanted = checked_tasks(model, tasks, lengths)
    check_count("samples", samples, 1)
    check_count("batch_size", batch_size)
    stream_M = token_stream(data, tokenizer, model)
    routed = is_converted(model) and not routing_of(model).is_off
    sides = ("routed", "dense") if routed else ("score",)
    settings = {"lengths": wanted, "tasks": chosen, "samples": samples, "seed": seed}
    digest = digest_of(stream_M, settings)
    if dense is not None:
        if routing_of(model).is_off:
            raise ModlabError("dense is given while routing is off: there is nothing to hold against it.")
        check_dense(dense, digest, KEYS, "dense", "ruler(..., by_row=True) of a converted model")
        sides = ("routed",)
    lines: list[dict[str, Any]] = []
    total = len(sides) * len(chosen) * len(wanted) * samples
    with tqdm(total=total, desc="ruler", unit="question", disable=not progress) as bar:
        for length in wanted:
            text_NT = windows(stream_M, samples, length, APART, seed)
            for task in chosen:
                questions = [
                    _question(task, tokenizer, text_T.tolist(), length, f"{seed}/{task}/{length}/{row}")
                    for row, text_T in enumerate(text_NT)
                ]
                scores = {side: _scores(model, side, questions, tokenizer, batch_size, bar) for side in sides}
                lines += [
                    {"task": task, "length": length, "row": row}
                    | {side: scores[side][row] for side in sorted(sides)}
                    for row in range(samples)
                ]
    table = pd.DataFrame(lines)
    if dense is not None:
        joined = table.merge(dense[[*KEYS, "dense"]], on=KEYS, validate="one_to_one")
        table = joined[[*KEYS, "dense", "routed"]]
    if not by_row:
        return mean_scores(table)
    sign(table, digest)
    return table


def checked_tasks(model: Any, tasks: Iterable[str], lengths: Iterable[int]) -> tuple[list[str], list[int]]:
    """The tasks and lengths to ask, the latter ascending.

    Raises:
        ModlabError: no such task, no length, or one beyond the context.
    """
    chosen = [tasks] if isinstance(tasks, str) else list(tasks)
    for task in chosen:
        if task not in TASKS:
            raise ModlabError(f"there is no task {task!r}: choose some of {', '.join(map(repr, TASKS))}.")
    wanted = sorted({check_count("length", length) for length in lengths})
    if not wanted or not chosen:
        raise ModlabError("nothing to ask: give at least one task and one length, such as lengths=(4096,).")
    context = context_length(model)
    if context is not None and wanted[-1] > context:
        raise ModlabError(f"length={wanted[-1]}: the model's context is {context}; give at most that.")
    return chosen, wanted


def _question(task: str, tokenizer: Any, text: list[int], length: int, seed: str) -> Question:
    """A question whose prompt and answer take `length` tokens together."""
    longest = TASKS[task](Page(tokenizer, text, length, random.Random(seed))).new_tokens
    return TASKS[task](Page(tokenizer, text, length - longest, random.Random(seed)))


def _scores(
    model: Any, side: str, questions: list[Question], tokenizer: Any, batch_size: int, bar: Any
) -> list[float]:
    prompt_NP = torch.tensor([question.prompt for question in questions])
    off = routing_off(model) if side == "dense" else contextlib.nullcontext()
    with off:
        rows = write(model, prompt_NP, questions[0].new_tokens, None, 0, batch_size, bar)
    written = [tokenizer.decode(row[prompt_NP.shape[1] :], skip_special_tokens=True) for row in rows]
    return [question.score(text) for question, text in zip(questions, written, strict=True)]


def mean_scores(table: pd.DataFrame) -> pd.DataFrame:
    """The table of `ruler` from the one it makes with `by_row`."""
    paired = "dense" in table
    spread = table.assign(spread=table["routed"] - table["dense"] if paired else table["score"])
    groups = spread.groupby(["task", "length"], sort=False)
    columns: dict[str, Any] = {"samples": groups["row"].count()}
    if paired:
        columns |= {"dense": groups["dense"].mean(), "routed": groups["routed"].mean()}
    columns["difference" if paired else "score"] = groups["spread"].mean()
    columns["stderr"] = groups["spread"].std() / groups["row"].count().map(math.sqrt)
    import pandas as pd

    return pd.DataFrame(columns).reset_index()
