"""What thresholds cost and buy: one row a threshold."""

from __future__ import annotations

import contextlib
import itertools
import math
import statistics
import sys
import warnings
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch

from modlab.data.batches import Batch
from modlab.errors import ModlabError, check_count, check_number
from modlab.hf.model import check_model, context_length, eval_mode
from modlab.measure.evaluation import evaluate_batches
from modlab.measure.pieces import batches_for
from modlab.measure.timing import time_generate
from modlab.routing.state import (
    routing_of,
    routing_override,
    set_threshold,
    thresholds_restored,
)

if TYPE_CHECKING:
    import pandas as pd
    from transformers import PreTrainedModel

DEFAULT_THRESHOLDS = (0.0, 0.1, 0.3, 0.5, 0.7, 0.9)


def _all_open(layer_idx: int, gate: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
    return torch.ones_like(gate, dtype=torch.bool)


@contextlib.contextmanager
def _at_threshold(model: Any, p: float) -> Iterator[None]:
    """p for all routed layers; 0 stands for every gate open, which no p in (0, 1) can promise."""
    if p == 0.0:
        with routing_override(model, _all_open):
            yield
    else:
        set_threshold(model, p)
        yield


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
    per_layer: bool = False,
    progress: bool = True,
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
        thresholds: values in (0, 1), and 0.0 for "every gate open" (what the dense layers would do).
        seq_len: cut inputs into pieces of this many tokens; by default as `piece_length` says.
        repeats: timed calls a threshold, after one untimed; 0 leaves the two time columns NaN.
        prompt_tokens: the timed prompt is the first row of the first batch, at most this long.
        decode_tokens: tokens generated in each timed call, after the first.
        per_layer: add columns `keep_ratio_<layer>`.
        progress: show a progress bar.

    Returns:
        DataFrame with columns threshold, keep_ratio (mean over routed layers), kv_bytes (allocated for all
        texts), dense_kv_bytes, kv_saving, loss (nats a token), perplexity, prefill_ms (from the call of
        `generate` to the first token) and decode_ms (mean of the later tokens), medians over the repeats.

    Raises:
        ModlabError: a dense model, a threshold outside [0, 1), an empty text.
    """
    import pandas as pd
    from tqdm.auto import tqdm

    check_model(model)
    routing = routing_of(model)
    if isinstance(thresholds, str) or not isinstance(thresholds, Iterable):
        raise ModlabError(f"thresholds={thresholds!r}: give several, for example [0.0, 0.3, 0.5, 0.7].")
    check_count("repeats", repeats, 0)
    check_count("prompt_tokens", prompt_tokens)
    check_count("decode_tokens", decode_tokens)
    wanted = [check_number("threshold", p) for p in thresholds]
    for p in wanted:
        if not 0.0 <= p < 1.0:
            raise ModlabError(
                f"threshold {p} is not in [0, 1); 0.0 means every gate open, 0.5 is the paper's."
            )
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
    recent = routing.skip.recent(routing.config)
    if recent is not None and longest <= recent:
        warnings.warn(
            f"texts of at most {longest} tokens are not longer than keep_recent={recent}: all of their keys "
            "and values stay, whatever the threshold is. Give longer texts.",
            stacklevel=2,
        )

    rows: list[dict[str, float]] = []
    rounds = repeats + 1 if repeats else 0
    with (
        thresholds_restored(model),
        tqdm(total=len(wanted) * (len(batches) + rounds), desc="sweep", disable=not progress) as bar,
    ):

        def counted(items: list[Batch]) -> Iterator[Batch]:
            for item in items:
                yield item
                bar.update()

        for p in wanted:
            with _at_threshold(model, p):
                result = evaluate_batches(model, counted(batches))
            rows.append(
                {
                    "threshold": p,
                    "keep_ratio": result.keep_ratio,
                    "kv_bytes": result.kv_bytes,
                    "dense_kv_bytes": result.dense_kv_bytes,
                    "kv_saving": result.kv_saving,
                    "loss": result.loss,
                    "perplexity": result.perplexity,
                    "prefill_ms": math.nan,
                    "decode_ms": math.nan,
                }
            )
            if per_layer:
                rows[-1] |= {f"keep_ratio_{layer}": r for layer, r in result.keep_ratio_by_layer.items()}
        times: list[list[tuple[float, float]]] = [[] for _ in wanted]
        for turn, (index, p) in itertools.product(range(rounds), enumerate(wanted)):
            with eval_mode(model), torch.no_grad(), _at_threshold(model, p):
                timed = time_generate(model, prompt, decode_tokens)
            if turn:  # the first round warms up
                times[index].append(timed)
            bar.update()
        for row, measured in zip(rows, times, strict=True):
            if measured:
                row["prefill_ms"] = statistics.median(t[0] for t in measured)
                row["decode_ms"] = statistics.median(t[1] for t in measured)
    return pd.DataFrame(rows)
