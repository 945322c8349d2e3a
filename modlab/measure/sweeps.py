"""What thresholds cost and buy: one row a threshold."""

from __future__ import annotations

import itertools
import math
import statistics
import sys
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch

from modlab.data.batches import Batch
from modlab.errors import ModlabError, check_count
from modlab.hf.model import check_model, context_length, eval_mode
from modlab.hf.ranks import is_quiet
from modlab.measure.evaluation import evaluate_batches
from modlab.measure.pieces import batches_for
from modlab.measure.timing import time_generate
from modlab.probes.material import token_stream
from modlab.probes.repeated_passage import recall
from modlab.routing.state import (
    gated_routing_of,
    set_threshold,
    thresholds_restored,
)
from modlab.routing.threshold import check_threshold
from modlab.warn import warn

if TYPE_CHECKING:
    import pandas as pd
    from transformers import PreTrainedModel

COLUMNS = (
    "threshold",
    "keep_ratio",
    "kv_bytes",
    "dense_kv_bytes",
    "kv_saving",
    "loss",
    "perplexity",
    "recall_loss",
    "prefill_ms",
    "decode_ms",
)
RECALL_PASSAGE, RECALL_PREFIX = 64, 32
RECALL_DISTANCES = (1024, 512, 256)
"""Of the far recall, in tokens: the first that context and texts have room for."""
DEFAULT_THRESHOLDS = (0.0, 0.1, 0.3, 0.5, 0.7, 0.9)


def sweep(
    model: PreTrainedModel,
    tokenizer: Any,
    texts: Any,
    thresholds: Iterable[float] = DEFAULT_THRESHOLDS,
    *,
    seq_len: int | None = None,
    repeats: int = 5,
    prompt_tokens: int = 1024,
    decode_tokens: int = 32,
    recall_rows: int = 8,
    per_layer: bool = False,
    progress: bool = True,
    accelerator: Any = None,
) -> pd.DataFrame:
    """One row a threshold: what it costs in loss, and what it buys in memory and time.

    With skip="kv" that is nothing in texts that are not longer than `MoDConfig.keep_recent`: a warning says
    so where all of them are that short.

    The timed calls of all thresholds alternate, round after round, so that a machine that slows down slows
    all of them; the model's own thresholds are back in place afterwards, also after an error.

    Args:
        model: a converted model.
        tokenizer: for texts; may be None for token batches.
        texts: texts or token batches, as `as_batches` takes them.
        thresholds: values in [0, 1); 0 keeps every token.
        seq_len: cut inputs into pieces of this many tokens; by default as `piece_length` says.
        repeats: timed calls a threshold, after one untimed; 0 leaves the two time columns NaN.
        prompt_tokens: the timed prompt is the first row of the first batch, at most this long.
        decode_tokens: tokens generated in each timed call, after the first.
        recall_rows: passages of the texts that are repeated far on; 0 leaves the column NaN.
        per_layer: add columns `keep_ratio_<layer>`.
        progress: show a progress bar.
        accelerator: an `accelerate.Accelerator`: its processes share the batches, and each gets the table of
            all of them; times are means over the processes. All have to pass the same arguments.

    Returns:
        DataFrame with columns threshold, keep_ratio (mean over routed layers), kv_bytes (allocated for all
        texts), dense_kv_bytes, kv_saving, loss (nats a token), perplexity, recall_loss (on the second copy of
        a passage, see `modlab.recall`: what the mean loss hides; NaN where the texts are too short),
        prefill_ms (from the call of `generate` to the first token) and decode_ms (mean of the later tokens),
        medians over the repeats. `frame.attrs["recall_distance"]`: tokens between the copies, or None.

    Raises:
        ModlabError: a dense model, a threshold outside [0, 1), an empty text.
    """
    import pandas as pd
    from tqdm.auto import tqdm

    check_model(model)
    routing = gated_routing_of(model)
    if isinstance(thresholds, str) or not isinstance(thresholds, Iterable):
        raise ModlabError(f"thresholds={thresholds!r}: give several, for example [0.0, 0.3, 0.5, 0.7].")
    check_count("repeats", repeats, 0)
    check_count("prompt_tokens", prompt_tokens)
    check_count("decode_tokens", decode_tokens)
    check_count("recall_rows", recall_rows, 0)
    wanted = [check_threshold(p) for p in thresholds]
    if not wanted:
        raise ModlabError("no thresholds given; give values in [0, 1), for example [0.0, 0.3, 0.5, 0.7].")
    batches = batches_for(model, texts, tokenizer, seq_len)
    prompt = batches[0]["input_ids"][:1]
    prompt_mask = batches[0].get("attention_mask")
    if prompt_mask is not None:
        prompt = prompt[prompt_mask[:1].bool()][None]
    room = (context_length(model) or sys.maxsize) - decode_tokens - 1
    prompt = prompt[:, : max(1, min(prompt_tokens, room))]

    longest = max(batch["input_ids"].shape[1] for batch in batches)
    recent = routing.recent
    if recent is not None and longest <= recent:
        warn(
            f"texts of at most {longest} tokens are not longer than keep_recent={recent}: all of their keys "
            "and values stay, whatever the threshold is. Give longer texts."
        )

    rounds = repeats + 1 if repeats else 0  # the first warms up
    quiet = is_quiet(progress, accelerator)
    with (
        thresholds_restored(model),
        tqdm(total=len(wanted) * (len(batches) + rounds), desc="sweep", disable=quiet) as bar,
    ):
        far = _recall_distance(model, batches, recall_rows)
        rows = [
            _costs(model, p, batches, per_layer, accelerator, bar)
            | {"recall_loss": _recall_loss(model, batches, far, recall_rows, accelerator)}
            for p in wanted
        ]
        times = _times(model, wanted, prompt, decode_tokens, rounds, bar)
    if rounds and accelerator is not None and accelerator.num_processes > 1:
        times = accelerator.reduce(torch.tensor(times).to(accelerator.device), "mean").tolist()
    for row, (prefill_ms, decode_ms) in zip(rows, times, strict=True):
        row |= {"prefill_ms": prefill_ms, "decode_ms": decode_ms}
    table = pd.DataFrame(rows, columns=[*COLUMNS, *(name for name in rows[0] if name not in COLUMNS)])
    table.attrs["recall_distance"] = far
    return table


def _recall_distance(model: Any, batches: list[Batch], rows: int) -> int | None:
    """The far distance that there is room for; None where there is none, or nothing is asked for."""
    if not rows or any(batch.keys() - {"input_ids", "attention_mask"} for batch in batches):
        return None
    tokens = len(token_stream(batches, None, model))
    others = RECALL_PREFIX + RECALL_PASSAGE
    context = context_length(model) or sys.maxsize
    for distance in RECALL_DISTANCES:
        places = (tokens - distance - others) // RECALL_PASSAGE + 1
        if distance + others <= context and places >= rows:
            return distance
    return None


def _recall_loss(
    model: Any, batches: list[Batch], distance: int | None, rows: int, accelerator: Any
) -> float:
    if distance is None:
        return math.nan
    asked: dict[str, Any] = {
        "passage": RECALL_PASSAGE,
        "prefix": RECALL_PREFIX,
        "rows": rows,
        "batch_size": 1,
    }
    table = recall(model, batches, distances=[distance], progress=False, accelerator=accelerator, **asked)
    return float(table["second_loss"][0])


def _costs(
    model: Any, p: float, batches: list[Batch], per_layer: bool, accelerator: Any, bar: Any
) -> dict[str, float]:
    """Loss, keep ratio and bytes at one threshold."""

    def counted() -> Iterator[Batch]:
        for batch in batches:
            yield batch
            bar.update()

    set_threshold(model, p)
    result = evaluate_batches(model, counted(), accelerator=accelerator)
    row = {
        "threshold": p,
        "keep_ratio": result.keep_ratio,
        "kv_bytes": result.kv_bytes,
        "dense_kv_bytes": result.dense_kv_bytes,
        "kv_saving": result.kv_saving,
        "loss": result.loss,
        "perplexity": result.perplexity,
    }
    if per_layer:
        row |= {f"keep_ratio_{layer}": ratio for layer, ratio in result.keep_ratio_by_layer.items()}
    return row


def _times(
    model: Any, thresholds: list[float], prompt: torch.Tensor, decode_tokens: int, rounds: int, bar: Any
) -> list[tuple[float, float]]:
    """(prefill_ms, decode_ms) at each threshold: medians over all rounds but the first, NaN without any."""
    times: list[list[tuple[float, float]]] = [[] for _ in thresholds]
    for turn, (index, p) in itertools.product(range(rounds), enumerate(thresholds)):
        set_threshold(model, p)
        with eval_mode(model), torch.no_grad():
            timed = time_generate(model, prompt, decode_tokens)
        if turn:
            times[index].append(timed)
        bar.update()
    if not rounds:
        return [(math.nan, math.nan) for _ in thresholds]
    return [(statistics.median(t[0] for t in each), statistics.median(t[1] for t in each)) for each in times]
