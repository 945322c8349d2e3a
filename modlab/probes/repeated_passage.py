"""Recall over a distance: a passage of real text comes twice, and the model may look back at the first copy.

    [ prefix | passage | filler ... | passage ]
             |<------- distance --->|

Everything up to the second copy is one piece of running text. A token that skipped a layer has no keys and
values there, so what later tokens can copy from it is what the other layers kept: a mean loss, made mostly
of short-range prediction, hardly shows it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch

from modlab.errors import check_count
from modlab.hf.ranks import is_quiet
from modlab.probes.distances import DISTANCES, fitting, note_left_out
from modlab.probes.material import token_stream, windows
from modlab.probes.scoring import mean_keep_ratio, score

if TYPE_CHECKING:
    import pandas as pd
    from transformers import PreTrainedModel


def recall(
    model: PreTrainedModel,
    data: Any,
    tokenizer: Any = None,
    *,
    distances: Iterable[int] = DISTANCES,
    passage: int = 64,
    prefix: int = 32,
    rows: int = 64,
    seed: int = 0,
    batch_size: int = 8,
    by_row: bool = False,
    progress: bool = True,
    accelerator: Any = None,
) -> pd.DataFrame:
    """Loss on both copies of a repeated passage, for each distance between them.

    The passages and what precedes them are the same at every distance. The first token of a copy is not
    scored: nothing before the second copy says that it begins here. So `passage - 1` tokens of each copy
    count, each predicted from the token before it in the same copy.

    What conversion costs in recall is the difference of `second_loss` between the converted model and the
    dense one, next to that of `first_loss`, which holds for text that is not repeated. A second copy also
    has more text before it than a first one, so `first_loss - second_loss` of one model is not recall alone.

    Args:
        model: causal LM, dense or converted, at its present thresholds.
        data: texts or token batches, as `modlab.data.batches` takes them; joined in order.
        tokenizer: for texts.
        distances: tokens from the start of one copy to the start of the other.
        passage: tokens of a copy.
        prefix: tokens before the first copy; routed layers always keep the very first tokens of a row.
        rows: passages, none of which overlap.
        seed: which passages.
        batch_size: rows a forward.
        by_row: one line a distance and passage instead of the mean over passages, for paired comparisons.
        progress: show a progress bar.
        accelerator: an `accelerate.Accelerator`: its processes share the rows, and each gets the result of
            all of them. All have to pass the same arguments.

    Returns:
        DataFrame, one line a distance: `distance`; `tokens`, how many each loss is the mean of; `first_loss`
        and `second_loss`, nats a token; `second_stderr`, standard error of the latter over passages;
        `first_keep_ratio` and `second_keep_ratio`, share of the copy's tokens that routed layers kept, mean
        over them (1.0 for a dense model). With `by_row`: a column `row`, and no `second_stderr`.
        `frame.attrs["left_out"]` is `{distance: reason}` of distances that the context has no room for; a
        warning names them, too.

    Raises:
        ModlabError: no distance fits the context, a distance shorter than the passage, too little data.
    """
    import pandas as pd
    from tqdm.auto import tqdm

    check_count("passage", passage, 2)  # its first token is not scored
    check_count("prefix", prefix, 0)
    check_count("batch_size", batch_size)
    fits, left_out = fitting(
        model, distances, passage, prefix + passage, f"prefix {prefix} + distance + passage {passage}"
    )
    text_NT = windows(token_stream(data, tokenizer, model), rows, prefix + fits[-1], passage, seed)
    copy_NP = text_NT[:, prefix : prefix + passage]
    quiet = is_quiet(progress, accelerator)
    lines: list[dict[str, float]] = []
    with tqdm(total=rows * len(fits), desc="recall", unit="row", disable=quiet) as bar:
        shared = {"bar": bar, "accelerator": accelerator}
        for distance in fits:
            first, second = prefix, prefix + distance
            row_NT = torch.cat([text_NT[:, :second], copy_NP], dim=1)
            scored = [*range(first + 1, first + passage), *range(second + 1, second + passage)]
            scores = score(model, list(row_NT), scored, batch_size=batch_size, **shared)
            first_M, second_M = scores.loss.double().view(rows, 2, passage - 1).mean(2).unbind(1)
            for row in range(rows):
                kept = [
                    mean_keep_ratio(scores.keep_ratio_by_layer(row, slice(start, start + passage)))
                    for start in (first, second)
                ]
                lines.append(
                    {
                        "distance": distance,
                        "row": row,
                        "tokens": passage - 1,
                        "first_loss": float(first_M[row]),
                        "second_loss": float(second_M[row]),
                        "first_keep_ratio": kept[0],
                        "second_keep_ratio": kept[1],
                    }
                )
    table = pd.DataFrame(lines)
    if not by_row:
        table = _means(table)
    return note_left_out("recall", table, left_out)


def _means(table: pd.DataFrame) -> pd.DataFrame:
    """One line a distance. Every passage has as many tokens: a mean over passages is one over tokens."""
    groups = table.groupby("distance")
    means = groups.mean().drop(columns="row")
    means["tokens"] = groups["tokens"].sum()
    stderr = groups["second_loss"].std() / groups["second_loss"].count().map(math.sqrt)
    means.insert(means.columns.get_loc("second_loss") + 1, "second_stderr", stderr)
    return means.reset_index()
