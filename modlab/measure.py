"""What a threshold costs and buys: loss, keep ratio, allocated KV bytes and time, and thresholds for a wanted
keep ratio.

    evaluate(model, batches)                     one pass: loss, keep ratio, KV bytes (dense models too)
    sweep(model, tokenizer, texts, thresholds)   one row a threshold
    calibrate(model, batches, keep_ratio=0.25)   finds and sets the thresholds that keep this share of tokens

Keep ratios count real tokens in routed layers: kept / (tokens x routed layers), the first tokens that are
always kept included. Times are taken around `model.generate`, as a user calls it, and wait for the device.

Shape letters: B rows, T tokens in, V vocab.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import statistics
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.generation.streamers import BaseStreamer

from modlab.errors import ModlabError
from modlab.kv import KVTracker
from modlab.routing import is_converted, record_routing, routing_of, routing_override, set_threshold

if TYPE_CHECKING:
    import pandas as pd
    from transformers import PreTrainedModel

DEFAULT_THRESHOLDS = (0.0, 0.1, 0.3, 0.5, 0.7, 0.9)
TEXT_PIECE = 2048  # tokens a text is cut at by default
LOSS_CHUNK = 512  # tokens whose logits are widened to fp32 at once

Batch = dict[str, torch.Tensor]


# ---------------------------------------------------------------------------- batches


def as_batches(data: Any, tokenizer: Any = None, seq_len: int | None = None) -> list[Batch]:
    """Token batches from what people have at hand.

    Args:
        data: a text or texts (need `tokenizer`); LongTensors [B, T] or [T]; dicts with `input_ids` (and
            `attention_mask`), as tensors or lists; a `datasets.Dataset` with a column `input_ids`.
        tokenizer: a transformers tokenizer; only for texts.
        seq_len: cut longer inputs into consecutive pieces of at most this many tokens. A piece of a single
            token predicts nothing and is dropped.

    Returns:
        list of dicts with `input_ids` long [B, T] and, where given, `attention_mask` long [B, T].

    Raises:
        ModlabError: an empty text, texts without a tokenizer, or nothing to measure on.
    """
    if isinstance(data, (str, torch.Tensor, dict)):
        data = [data]
    batches: list[Batch] = []
    for number, item in enumerate(data):
        if isinstance(item, str):
            if tokenizer is None:
                raise ModlabError(
                    "texts need a tokenizer; pass the tokenizer, or token batches instead of texts."
                )
            # verbose=False: a text longer than the context is no mistake here, it is cut into pieces
            ids = torch.as_tensor(tokenizer(item, verbose=False)["input_ids"], dtype=torch.long)
            if ids.numel() < 2:
                raise ModlabError(
                    f"text {number} ({item[:40]!r}) has {ids.numel()} token(s); at least 2 are needed."
                )
            item = ids
        if not isinstance(item, dict):
            item = {"input_ids": item}
        batch = {
            name: torch.as_tensor(item[name], dtype=torch.long)
            for name in ("input_ids", "attention_mask")
            if item.get(name) is not None
        }
        if "input_ids" not in batch:
            raise ModlabError(f"batch {number} has no input_ids; its keys are {sorted(item)}.")
        batch = {name: value[None] if value.ndim == 1 else value for name, value in batch.items()}
        length = batch["input_ids"].shape[1]
        for start in range(0, length, seq_len or max(length, 1)):
            piece = {name: value[:, start : start + (seq_len or length)] for name, value in batch.items()}
            if piece["input_ids"].shape[1] >= 2:
                batches.append(piece)
    if not batches:
        raise ModlabError(
            "nothing to measure on: give at least one text or token batch of two tokens or more."
        )
    return batches


def context_length(model: PreTrainedModel) -> int:
    """Tokens the model's positions allow (`max_position_embeddings`), or 2,048 if its config does not say."""
    config: Any = model.config
    return getattr(config.get_text_config(), "max_position_embeddings", None) or 2048


def piece_length(model: PreTrainedModel, tokenizer: Any, seq_len: int | None) -> int:
    """How long the pieces are that inputs are cut into, in tokens: as asked for, within the model's context.

    By default texts are cut at `TEXT_PIECE`, because their logits take tokens x vocabulary; token batches are
    taken as their maker cut them.
    """
    context = context_length(model)
    return min(context, seq_len or (TEXT_PIECE if tokenizer is not None else context))


def _device(model: PreTrainedModel) -> torch.device:
    return next(model.parameters()).device


def synchronize(device: torch.device) -> None:
    """Waits until the device has done all queued work, so that a host clock tells the truth."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


@contextlib.contextmanager
def _eval_mode(model: PreTrainedModel) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)


# ---------------------------------------------------------------------------- loss, keep ratio, bytes


@dataclass
class Evaluation:
    """One pass over batches.

    Attributes:
        loss: nats per predicted token, mean over all of them.
        predicted_tokens: how many tokens that mean is over.
        keep_ratio: share of real tokens kept, mean over routed layers (1.0 for a dense model).
        keep_ratio_by_layer: the same for each routed layer.
        kv_bytes: bytes allocated by the caches of all batches, each measured after its forward.
        dense_kv_bytes: bytes of dense caches for the same tokens.
        source: what a published figure carries, filled in by who knows it: data, command, date, device ...
    """

    loss: float = math.nan
    predicted_tokens: int = 0
    keep_ratio: float = 1.0
    keep_ratio_by_layer: dict[int, float] = field(default_factory=dict)
    kv_bytes: int = 0
    dense_kv_bytes: int = 0
    source: dict[str, Any] = field(default_factory=dict)

    @property
    def perplexity(self) -> float:
        """exp(loss)."""
        return math.exp(self.loss)

    @property
    def kv_saving(self) -> float:
        """How many times smaller the allocated caches are than dense ones."""
        return self.dense_kv_bytes / self.kv_bytes


def _summed_loss(logits_BTV: torch.Tensor, batch: Batch) -> tuple[float, int]:
    """Sum of next-token losses in nats and how many there are; targets that are padding do not count."""
    targets = batch["input_ids"][:, 1:].to(logits_BTV.device)
    mask = batch.get("attention_mask")
    if mask is not None:  # a target counts if it is real and so is the token it is predicted from
        mask = mask.to(logits_BTV.device).bool()
        targets = targets.masked_fill(~(mask[:, 1:] & mask[:, :-1]), -100)
    total = torch.zeros((), dtype=torch.float64, device=logits_BTV.device)
    for logits, target in zip(
        logits_BTV[:, :-1].split(LOSS_CHUNK, 1), targets.split(LOSS_CHUNK, 1), strict=True
    ):
        # cross_entropy ignores the target -100, which padding was set to above
        total += nn.functional.cross_entropy(logits.flatten(0, 1).float(), target.flatten(), reduction="sum")
    return float(total), int((targets != -100).sum())


def _evaluate(model: PreTrainedModel, batches: Iterable[Batch]) -> Evaluation:
    result = Evaluation()
    converted = is_converted(model)
    summed, device = 0.0, _device(model)
    kept: dict[int, int] = {}
    real = 0
    for batch in batches:
        with contextlib.ExitStack() as stack:
            stack.enter_context(_eval_mode(model))
            recording = stack.enter_context(record_routing(model)) if converted else None
            kv = stack.enter_context(KVTracker(model))
            logits = model(**{k: v.to(device) for k, v in batch.items()}, use_cache=True).logits
            total, count = _summed_loss(logits, batch)
        summed += total
        result.predicted_tokens += count
        result.kv_bytes += sum(row["kv_bytes"] for row in kv.rows)
        result.dense_kv_bytes += sum(row["dense_kv_bytes"] for row in kv.rows)
        for step in recording.steps if recording else []:
            real += int(step.real.sum())
            for layer, keep in step.keep.items():
                kept[layer] = kept.get(layer, 0) + int(keep.sum())
    if not result.predicted_tokens:
        raise ModlabError("nothing to measure on: no batch has two real tokens in a row.")
    result.loss = summed / result.predicted_tokens
    if kept:
        result.keep_ratio_by_layer = {layer: n / real for layer, n in sorted(kept.items())}
        result.keep_ratio = statistics.fmean(result.keep_ratio_by_layer.values())
    return result


def evaluate(
    model: PreTrainedModel, data: Any, tokenizer: Any = None, seq_len: int | None = None
) -> Evaluation:
    """Loss, keep ratio and cache bytes of a model, dense or converted, at its present thresholds.

    Args:
        model: causal LM; evaluated in eval mode, its mode is restored.
        data: texts or token batches, as `as_batches` takes them.
        tokenizer: for texts.
        seq_len: cut inputs into pieces of this many tokens; by default as `piece_length` says.
    """
    return _evaluate(model, as_batches(data, tokenizer, piece_length(model, tokenizer, seq_len)))


def loss(model: PreTrainedModel, tokenizer: Any, texts: Any, seq_len: int | None = None) -> float:
    """Mean next-token loss in nats; `texts` may be token batches, then `tokenizer` may be None."""
    return evaluate(model, texts, tokenizer, seq_len).loss


# ---------------------------------------------------------------------------- time


class _Clock(BaseStreamer):
    """Notes when `generate` hands out each token."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        synchronize(self.device)
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


def time_generate(
    model: PreTrainedModel, input_ids: torch.Tensor, decode_tokens: int = 32
) -> tuple[float, float]:
    """One greedy `model.generate` call, timed as its user sees it.

    Args:
        model: causal LM, dense or converted.
        input_ids: long [B, T], no padding.
        decode_tokens: tokens to generate after the first.

    Returns:
        (prefill_ms, decode_ms): milliseconds from the call to the first token, and mean milliseconds for each
        later token.
    """
    generate: Any = model.generate
    device = _device(model)
    pad = getattr(getattr(model, "generation_config", None), "pad_token_id", None)
    clock = _Clock(device)
    input_ids = input_ids.to(device)
    mask = torch.ones_like(input_ids)
    synchronize(device)
    start = time.perf_counter()
    generate(
        input_ids,
        attention_mask=mask,
        min_new_tokens=decode_tokens + 1,
        max_new_tokens=decode_tokens + 1,
        do_sample=False,
        pad_token_id=0 if pad is None else pad,
        streamer=clock,
    )
    _, first, *rest = clock.times  # the first mark is the prompt's
    return (first - start) * 1e3, (rest[-1] - first) * 1e3 / len(rest) if rest else math.nan


# ---------------------------------------------------------------------------- sweep


@contextlib.contextmanager
def _restored_thresholds(model: PreTrainedModel) -> Iterator[None]:
    """Whatever happens inside, the thresholds are as before afterwards."""
    before = dict(routing_of(model).thresholds)
    try:
        yield
    finally:
        set_threshold(model, before)


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

    routing_of(model)
    wanted = [float(p) for p in thresholds]
    for p in wanted:
        if not 0.0 <= p < 1.0:
            raise ModlabError(
                f"threshold {p} is not in [0, 1); 0.0 means every gate open, 0.5 is the paper's."
            )
    if not wanted:
        raise ModlabError("no thresholds given; give values in [0, 1), for example [0.0, 0.3, 0.5, 0.7].")
    context = context_length(model)
    batches = as_batches(texts, tokenizer, piece_length(model, tokenizer, seq_len))
    prompt = batches[0]["input_ids"][:1]
    prompt_mask = batches[0].get("attention_mask")
    if prompt_mask is not None:
        prompt = prompt[prompt_mask[:1].bool()][None]
    prompt = prompt[:, : max(1, min(prompt_tokens, context - decode_tokens - 1))]

    rows: list[dict[str, float]] = []
    rounds = repeats + 1 if repeats else 0
    with (
        _restored_thresholds(model),
        tqdm(total=len(wanted) * (len(batches) + rounds), desc="sweep", disable=not progress) as bar,
    ):

        def counted(items: list[Batch]) -> Iterator[Batch]:
            for item in items:
                yield item
                bar.update()

        for p in wanted:
            with _at_threshold(model, p):
                result = _evaluate(model, counted(batches))
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
            with _eval_mode(model), _at_threshold(model, p):
                timed = time_generate(model, prompt, decode_tokens)
            if turn:  # the first round warms up
                times[index].append(timed)
            bar.update()
        for row, measured in zip(rows, times, strict=True):
            if measured:
                row["prefill_ms"] = statistics.median(t[0] for t in measured)
                row["decode_ms"] = statistics.median(t[1] for t in measured)
    return pd.DataFrame(rows)


# ---------------------------------------------------------------------------- calibrate


class Calibration(dict[int, float]):
    """Thresholds by layer that `calibrate` found and set, with the keep ratios it then measured.

    Attributes:
        keep_ratio: mean over routed layers, on the batches given.
        keep_ratio_by_layer: each routed layer's.
    """

    keep_ratio: float
    keep_ratio_by_layer: dict[int, float]

    def __repr__(self) -> str:
        return f"Calibration({dict(self)}, keep_ratio={self.keep_ratio:.4f})"


@dataclass
class _Gates:
    """Gates of one pass over the batches: what could be kept or not by moving p.

    Attributes:
        free: by layer, sorted descending, fp32: gates of real tokens that are not always kept.
        real: real tokens.
        forced: real tokens that are kept whatever p is (the first ones of each row).
        kept: by layer, tokens kept.
    """

    free: dict[int, torch.Tensor]
    real: int
    forced: int
    kept: dict[int, int]

    @property
    def by_layer(self) -> dict[int, float]:
        return {layer: n / self.real for layer, n in self.kept.items()}

    @property
    def ratio(self) -> float:
        return statistics.fmean(self.by_layer.values())


def _read_gates(model: Any, batches: Sequence[Batch]) -> _Gates:
    routing = routing_of(model)
    decoder, device = model.get_decoder(), _device(model)  # the head's logits are not needed
    free: dict[int, list[torch.Tensor]] = {layer: [] for layer in routing.layers}
    kept = dict.fromkeys(routing.layers, 0)
    real = forced = 0
    for batch in batches:
        with _eval_mode(model), record_routing(model) as recording:
            decoder(**{k: v.to(device) for k, v in batch.items()}, use_cache=False)
        for step in recording.steps:
            always = step.real & (step.position_ids < routing.config.keep_first)
            real += int(step.real.sum())
            forced += int(always.sum())
            for layer in routing.layers:
                kept[layer] += int(step.keep[layer].sum())
                free[layer].append(step.gate[layer][step.real & ~always])
    return _Gates(
        {layer: torch.cat(gates).sort(descending=True).values for layer, gates in free.items()},
        real,
        forced,
        kept,
    )


def _threshold_keeping(gates: torch.Tensor, count: int) -> float:
    """A p that keeps the `count` highest of `gates` (descending; ties are kept or skipped together)."""
    count = min(max(count, 0), gates.numel())
    above = 1.0 if count == 0 else float(gates[count - 1])
    below = 0.0 if count == gates.numel() else float(gates[count])
    return min(max((above + below) / 2, 1e-6), 1 - 1e-6)


def calibrate(
    model: PreTrainedModel,
    batches: Any,
    *,
    keep_ratio: float,
    per_layer: bool = False,
    tolerance: float = 0.01,
    tokenizer: Any = None,
    max_passes: int = 40,
) -> Calibration:
    """Finds the thresholds that keep a wanted share of tokens on `batches`, sets them, and returns them.

    Every candidate is checked by real forwards, because what one layer skips changes the gates of the layers
    after it.

    Args:
        model: a converted model.
        batches: token batches (or texts with `tokenizer`), as `as_batches` takes them: text like that of
        later use.
        keep_ratio: wanted share in (0, 1): mean over routed layers of kept / real tokens, first tokens
        included.
        per_layer: False: one p for all layers, layers may differ in what they keep. True: each layer keeps
            this share, set from the first routed layer to the last.
        tolerance: how far the share may be off, mean (one p) or of each layer (`per_layer`).
        tokenizer: for texts.
        max_passes: passes over the batches before giving up (one p only).

    Returns:
        `{layer: p}` for all routed layers; attributes `keep_ratio` and `keep_ratio_by_layer` are as measured.

    Raises:
        ModlabError: `keep_ratio` outside (0, 1), or not reachable on these batches; the thresholds are then
            as before.
    """
    routing = routing_of(model)
    if not 0.0 < keep_ratio < 1.0:
        raise ModlabError(
            f"keep_ratio={keep_ratio} is not in (0, 1); for example 0.25 keeps a quarter of the tokens."
        )
    pieces = as_batches(batches, tokenizer, piece_length(model, tokenizer, None))
    before = dict(routing.thresholds)
    try:
        search = _calibrate_layers if per_layer else _calibrate_global
        gates = search(model, pieces, keep_ratio, tolerance, max_passes)
    except BaseException:
        set_threshold(model, before)
        raise
    result = Calibration(routing.thresholds)
    result.keep_ratio, result.keep_ratio_by_layer = gates.ratio, gates.by_layer
    return result


_ALIKE = (
    "Gates that are all alike, as right after conversion, cannot be split: train the routers first "
    "(modlab.train), use more tokens, or allow a larger tolerance."
)


def _check_reachable(gates: _Gates, keep_ratio: float, tolerance: float, keep_first: int) -> None:
    least = gates.forced / gates.real
    if keep_ratio + tolerance < least:
        raise ModlabError(
            f"keep ratio {keep_ratio} is not reachable on these batches: the first {keep_first} tokens of a "
            f"row are always kept, which is {least:.3f} of all tokens.\nUse longer rows, a higher "
            "keep_ratio, or convert with a smaller keep_first."
        )


def _calibrate_global(
    model: Any, batches: Sequence[Batch], keep_ratio: float, tolerance: float, max_passes: int
) -> _Gates:
    """One p for all layers: bisection on p, each step aimed by the gates of the pass before."""
    gates = _read_gates(model, batches)
    _check_reachable(gates, keep_ratio, tolerance, routing_of(model).config.keep_first)
    low, high = (0.0, 1.0), (1.0, gates.forced / gates.real)  # (p, ratio there): keeps too much, too little
    for turn in range(max_passes):
        pooled = torch.cat(list(gates.free.values())).sort(descending=True).values
        count = round((keep_ratio * gates.real - gates.forced) * len(gates.free))
        p = _threshold_keeping(pooled, count)
        if turn % 3 == 2 or not low[0] < p < high[0]:  # an aimed step may creep; halving the bracket cannot
            p = (low[0] + high[0]) / 2
        if not low[0] < p < high[0]:
            break
        set_threshold(model, p)
        gates = _read_gates(model, batches)
        if abs(gates.ratio - keep_ratio) <= tolerance:
            return gates
        if gates.ratio > keep_ratio:
            low = (p, gates.ratio)
        else:
            high = (p, gates.ratio)
    raise ModlabError(
        f"keep ratio {keep_ratio} is not reachable within {tolerance} on these batches with one threshold: "
        f"p={low[0]:.6g} keeps {low[1]:.3f} and p={high[0]:.6g} keeps {high[1]:.3f}.\n" + _ALIKE
    )


def _calibrate_layers(
    model: Any, batches: Sequence[Batch], keep_ratio: float, tolerance: float, max_passes: int
) -> _Gates:
    """Each layer its own p: the quantile of its gates, given the thresholds already set before it."""
    routing = routing_of(model)
    gates = _read_gates(model, batches)
    _check_reachable(gates, keep_ratio, tolerance, routing.config.keep_first)
    for index, layer in enumerate(routing.layers):
        if index:
            gates = _read_gates(model, batches)
        count = round(keep_ratio * gates.real) - gates.forced
        set_threshold(model, _threshold_keeping(gates.free[layer], count), layers=[layer])
    gates = _read_gates(model, batches)
    for layer, got in gates.by_layer.items():
        if abs(got - keep_ratio) > tolerance:
            raise ModlabError(
                f"keep ratio {keep_ratio} is not reachable within {tolerance} in layer {layer}: its best "
                f"threshold p={routing.thresholds[layer]:.6g} keeps {got:.3f}.\n" + _ALIKE
            )
    return gates
