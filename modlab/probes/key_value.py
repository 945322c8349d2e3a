"""Key-value retrieval: values assigned to names among real text, and one of them asked for at the end.

    [ lead | \\nname_17 = 4823\\n | filler, other assignments among it ... | \\nname_17 = ] 4823
           |<--------------------- distance --------------------------->|

The lines are Python assignments, which models of code know and models of prose read as well. Names and values
are drawn afresh for each row, so nothing but the row itself tells the answer.
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from modlab.errors import ModlabError, check_count
from modlab.hf.ranks import is_quiet
from modlab.probes.distances import DISTANCES, fitting, note_left_out
from modlab.probes.material import token_stream, windows
from modlab.probes.scoring import mean_keep_ratio, score

if TYPE_CHECKING:
    import pandas as pd
    from transformers import PreTrainedModel

NAMES = range(10, 100)  # name_10 ... name_99
VALUES = range(1000, 10000)
APART = 64  # tokens from one row's place in the text to the next one's


def retrieval(
    model: PreTrainedModel,
    data: Any,
    tokenizer: Any,
    *,
    distances: Iterable[int] = DISTANCES,
    pairs: int = 8,
    lead: int = 32,
    rows: int = 64,
    seed: int = 0,
    batch_size: int = 8,
    by_row: bool = False,
    progress: bool = True,
    accelerator: Any = None,
) -> pd.DataFrame:
    """How often greedy search gives the value that was assigned so many tokens before.

    A row is right if every token of the value is the likeliest one given those before it, which is when
    greedy search writes the value exactly. A blind guess has a chance of 1 in 9,000, one among the values in
    the row 1 in `pairs`.

    Args:
        model: causal LM, dense or converted, at its present thresholds.
        data: text to put the lines in: texts or token batches, as `modlab.data.batches` takes them.
        tokenizer: the model's; any that tells digits apart.
        distances: tokens from the start of the asked assignment to the start of the question.
        pairs: assignments in a row. The asked one is the first, the others lie between it and the question.
        lead: tokens of text before the asked assignment.
        rows: questions a distance; names, values and order are the same at every distance.
        seed: of text, names, values and places.
        batch_size: rows a forward.
        by_row: one line a distance and row instead of means, for paired comparisons.
        progress: show a progress bar.
        accelerator: an `accelerate.Accelerator`: its processes share the rows, and each gets the result of
            all of them. All have to pass the same arguments.

    Returns:
        DataFrame, one line a distance: `distance`, `rows`, `accuracy` (share of rows that are right),
        `token_accuracy` (share of the values' tokens that are the likeliest given the true ones before, for
        models too small for whole values), `loss` (nats a token of the value), `tokens` (how many these two
        are the means of), `keep_ratio` (share of the asked assignment's tokens that routed layers kept, mean
        over them; 1.0 for a dense model). With `by_row`: `row` and `right` instead of `rows` and `accuracy`.
        `frame.attrs["left_out"]` as in `recall`.

    Raises:
        ModlabError: no distance fits, the assignments do not fit into one, a tokenizer to which these numbers
            look alike, or too little data.
    """
    import pandas as pd
    from tqdm.auto import tqdm

    if not check_count("pairs", pairs) <= len(NAMES):
        raise ModlabError(f"pairs={pairs}: a row holds 1 to {len(NAMES)} assignments.")
    check_count("rows", rows)
    check_count("lead", lead, 0)
    check_count("batch_size", batch_size)
    questions = [_Question.draw(tokenizer, pairs, random.Random(f"{seed}/{row}")) for row in range(rows)]
    longest = max(len(question.line) for question in questions)
    fits, left_out = fitting(
        model,
        distances,
        max(question.least_distance for question in questions),
        lead + longest,
        f"lead {lead} + distance with {pairs} assignments + question {longest}",
    )
    text_NT = windows(token_stream(data, tokenizer, model), rows, lead + fits[-1], APART, seed)
    quiet = is_quiet(progress, accelerator)
    lines: list[dict[str, Any]] = []
    with tqdm(total=rows * len(fits), desc="retrieval", unit="row", disable=quiet) as bar:
        shared = {"bar": bar, "accelerator": accelerator}
        for distance in fits:
            row_NT = [
                question.row(text_T, lead, distance)
                for question, text_T in zip(questions, text_NT, strict=True)
            ]
            asked = lead + distance  # column where the question begins, the same in all rows
            start = asked + min(question.known for question in questions)
            scores = score(model, row_NT, range(start, asked + longest), batch_size=batch_size, **shared)
            for row, question in enumerate(questions):
                value = slice(asked + question.known - start, asked + len(question.line) - start)
                line = slice(lead, lead + len(question.line))
                lines.append(
                    {
                        "distance": distance,
                        "row": row,
                        "right": bool(scores.correct[row, value].all()),
                        "token_accuracy": float(scores.correct[row, value].double().mean()),
                        "loss": float(scores.loss[row, value].double().mean()),
                        "tokens": value.stop - value.start,
                        "keep_ratio": mean_keep_ratio(scores.keep_ratio_by_layer(row, line)),
                    }
                )
    table = pd.DataFrame(lines)
    return note_left_out("retrieval", table if by_row else _means(table), left_out)


def _means(table: pd.DataFrame) -> pd.DataFrame:
    """One line a distance. What is by token is a mean over tokens, of which values may differ in number."""
    by_token, by_row = ["token_accuracy", "loss"], ["right", "keep_ratio"]
    weighted = table.assign(**{name: table[name] * table["tokens"] for name in by_token})
    means = weighted.groupby("distance").sum()
    rows = table.groupby("distance")["row"].count()
    means[by_token] = means[by_token].div(means["tokens"], axis=0)
    means[by_row] = means[by_row].div(rows, axis=0)
    means.insert(0, "rows", rows)
    return means.drop(columns="row").rename(columns={"right": "accuracy"}).reset_index()


@dataclass
class _Question:
    """The assignments of one row in token ids.

    Attributes:
        line: the asked assignment, which is also the question with its answer.
        known: how many tokens of `line` are given; the rest is the value.
        others: the other assignments.
        newline: what ends a line.
        places: where the others go, as shares of the filler, ascending.
    """

    line: list[int]
    known: int
    others: list[list[int]]
    newline: list[int]
    places: list[float]

    @classmethod
    def draw(cls, tokenizer: Any, pairs: int, rng: random.Random) -> _Question:
        def ids(text: str) -> list[int]:
            return list(tokenizer(text, add_special_tokens=False)["input_ids"])

        names, values = rng.sample(NAMES, pairs), rng.sample(VALUES, pairs)
        named = [ids(f"\nname_{name}") for name in names]
        lines = [ids(f"\nname_{name} = {value}") for name, value in zip(names, values, strict=True)]
        known = [_common(ids(f"\nname_{name} = "), line) for name, line in zip(names, lines, strict=True)]
        answers = {tuple(line[start:]) for line, start in zip(lines, known, strict=True)}
        joined = any(_common(name, line) < len(name) for name, line in zip(named, lines, strict=True))
        if joined or () in answers or min(len(answers), len(set(map(tuple, named)))) < pairs:
            does = "joins names and values" if joined else "gives different numbers the same tokens"
            raise ModlabError(
                f"this tokenizer ({type(tokenizer).__name__}) {does}, so that values cannot be asked for: "
                "retrieval needs one that keeps numbers apart."
            )
        places = sorted(rng.random() for _ in lines[1:])
        return cls(lines[0], known[0], lines[1:], ids("\n"), places)

    @property
    def least_distance(self) -> int:
        """Tokens of all assignments: a distance has room for them and for whatever filler is left."""
        return sum(len(line) + len(self.newline) for line in (self.line, *self.others))

    def row(self, text_T: Tensor, lead: int, distance: int) -> Tensor:
        """Text with the assignments in it, the question at column `lead + distance`, and the answer."""
        filler = text_T[lead : lead + distance - self.least_distance].tolist()
        made = [*text_T[:lead].tolist(), *self.line, *self.newline]
        done = 0
        for line, place in zip(self.others, self.places, strict=True):
            cut = int(place * len(filler))
            made += [*filler[done:cut], *line, *self.newline]
            done = cut
        return torch.tensor([*made, *filler[done:], *self.line])


def _common(first: list[int], second: list[int]) -> int:
    """Length of the common beginning: the value begins where a line parts from the one that ends before it.

    (Tokenizers differ in whether the blank before a number is a token of its own or part of it.)
    """
    pairs = zip(first, second, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(first), len(second)))
