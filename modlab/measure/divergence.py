"""How far routing takes a model from its dense self, by position in a text, and the bytes that it saves.

One load serves both sides (`modlab.routing_off`). Each row goes through both in pieces, with a cache for each
side, as a long prompt does: keys that routing drops are gone for good, and the bytes are those that the
product's cache has allocated at the row's end. With one piece a row the same comes of the masked path.

A mean loss hides what routing costs: gates that are trained on it adapt the model to the text. The distance
to the dense model's distribution cannot be adapted away.

Shape letters: B rows, T tokens of a row, P tokens of a piece, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from modlab.cache.bytes import snapshot
from modlab.errors import ModlabError, check_count
from modlab.hf.logits import LOSS_CHUNK
from modlab.hf.model import check_model, context_length, device_of, eval_mode
from modlab.hf.names import cache_argument, given_cache
from modlab.probes.material import token_stream, windows
from modlab.routing.record import kept_share
from modlab.routing.state import record_routing, routing_of, routing_off

if TYPE_CHECKING:
    import pandas as pd
    from transformers import PreTrainedModel

FAR = 1024
"""Positions from here on are far: most of what they may attend to is no longer recent."""
ROW = 2048
"""Tokens of a row by default, within the model's context."""
PIECE, GPU_PIECE = 512, 1024
"""Tokens that go through at once by default: on a GPU launching takes longer than what fewer compute."""
BIN = 128
"""Positions that a line of the table by position is a mean over."""
ITEMS = frozenset({"input_ids", "messages"})
"""Keys of one item of data: a mapping with any of them is data, not texts by name."""


def named_texts(texts: Any) -> dict[str, Any]:
    """Texts by name; data without a name is called "text"."""
    if isinstance(texts, Mapping) and not ITEMS & set(texts):
        if not texts:
            raise ModlabError("no texts given: give texts by name, such as {'novels': [...]}.")
        return {str(name): data for name, data in texts.items()}
    return {"text": texts}


def divergence(
    model: PreTrainedModel,
    texts: Any,
    tokenizer: Any = None,
    *,
    seq_len: int | None = None,
    rows: int = 8,
    seed: int = 0,
    far: int = FAR,
    piece: int | None = None,
    batch_size: int = 1,
    progress: bool = True,
) -> pd.DataFrame:
    """KL to the dense model, agreement on the next token, losses, keep ratio and K/V bytes, a line a text.

    In half precision rounding alone makes a KL of about 0.001: load the model in float32 to see less.

    Args:
        model: a converted model, at its present thresholds; the dense side is the same weights with routing
            off.
        texts: texts or token batches, as `as_batches` takes them, or several of them by name:
            ``{"novels": ..., "code": ...}``. A keep ratio is a property of a text; so is what routing costs.
        tokenizer: for texts.
        seq_len: tokens of a row; by default 2,048, within the context.
        rows: rows of each text, which do not overlap.
        seed: of their places.
        far: positions from here on are far.
        piece: tokens that go through the model at once, with the cache of those before; 512 by default, 1,024
            on a GPU. No smaller than `seq_len`, rows go through whole.
        batch_size: rows at once.
        progress: show a progress bar.

    Returns:
        DataFrame: `text`; `rows`; `tokens`, how many are read; `kl_near`, `kl_far`, nats a token below and
        from `far`, and `kl_far_stderr` over rows; `top1_near`, `top1_far`, share of positions where both
        models' likeliest next token is the same; `dense_loss` and `loss`, nats a token; `keep_ratio`, mean
        over routed layers; `dense_kv_bytes` and `kv_bytes`, at the rows' ends; `kv_saving`, the first over
        the second. What there are no positions for is NaN. `frame.attrs["by_position"]` is a DataFrame with
        `text`, `position` (the first of 128), `kl` and `top1`.

    Raises:
        ModlabError: a dense model, rows beyond the context, too little text.
    """
    import pandas as pd
    from tqdm.auto import tqdm

    check_model(model)
    routing_of(model)
    length = _row_length(model, seq_len)
    if piece is None:
        piece = GPU_PIECE if device_of(model).type == "cuda" else PIECE
    for name, value in (("rows", rows), ("piece", piece), ("batch_size", batch_size), ("far", far)):
        check_count(name, value)
    named = named_texts(texts)
    material = {
        name: windows(token_stream(data, tokenizer, model), rows, length, length, seed)
        for name, data in named.items()
    }
    lines, profiles = [], []
    pieces = math.ceil(rows / batch_size) * math.ceil(length / piece)
    with tqdm(total=len(material) * pieces, desc="divergence", unit="piece", disable=not progress) as bar:
        for name, text_BT in material.items():
            found = _Side()
            for ids_BT in text_BT.split(batch_size):
                _compare(model, ids_BT, piece, found, bar)
            lines.append({"text": name, "rows": rows, "tokens": rows * length, **found.line(far)})
            profiles.append(found.profile().assign(text=name))
    table = pd.DataFrame(lines)
    table.attrs["by_position"] = pd.concat(profiles, ignore_index=True)[["text", "position", "kl", "top1"]]
    return table


def _row_length(model: Any, seq_len: int | None) -> int:
    context = context_length(model)
    length = min(context or ROW, ROW) if seq_len is None else check_count("seq_len", seq_len, 2)
    if context is not None and length > context:
        raise ModlabError(f"seq_len={length}: the model's context is {context}; give at most that.")
    return length


@dataclass
class _Side:
    """What rows of one text have shown; tensors fp64 [B, T], on the CPU, a list entry a batch."""

    kl: list[Tensor] = field(default_factory=list)
    same: list[Tensor] = field(default_factory=list)
    dense_loss: list[Tensor] = field(default_factory=list)
    loss: list[Tensor] = field(default_factory=list)
    kept: float = 0.0
    decided: int = 0
    kv_bytes: int = 0
    dense_kv_bytes: int = 0

    def line(self, far: int) -> dict[str, float]:
        kl_BT, same_BT = torch.cat(self.kl), torch.cat(self.same)
        far_B = kl_BT[:, far:].mean(1)
        return {
            "kl_near": float(kl_BT[:, :far].mean()),
            "kl_far": float(far_B.mean()),
            "kl_far_stderr": float(far_B.std() / len(far_B) ** 0.5) if len(far_B) > 1 else math.nan,
            "top1_near": float(same_BT[:, :far].mean()),
            "top1_far": float(same_BT[:, far:].mean()),
            "dense_loss": float(torch.cat(self.dense_loss).mean()),
            "loss": float(torch.cat(self.loss).mean()),
            "keep_ratio": self.kept / self.decided,
            "dense_kv_bytes": self.dense_kv_bytes,
            "kv_bytes": self.kv_bytes,
            "kv_saving": self.dense_kv_bytes / self.kv_bytes if self.kv_bytes else math.nan,
        }

    def profile(self) -> pd.DataFrame:
        import pandas as pd

        kl_T, same_T = torch.cat(self.kl).mean(0), torch.cat(self.same).mean(0)
        starts = range(0, len(kl_T), BIN)
        return pd.DataFrame(
            {
                "position": list(starts),
                "kl": [float(kl_T[start : start + BIN].mean()) for start in starts],
                "top1": [float(same_T[start : start + BIN].mean()) for start in starts],
            }
        )


def _compare(model: Any, ids_BT: Tensor, piece: int, found: _Side, bar: Any) -> None:
    """Runs rows through both sides, piece by piece, and notes what comes out."""
    ids_BT = ids_BT.to(device_of(model))
    columns: list[tuple[Tensor, ...]] = []
    dense_cache = cache = None
    with eval_mode(model), torch.no_grad():
        for start in range(0, ids_BT.shape[1], piece):
            ids_BP = ids_BT[:, start : start + piece]
            target_BP = ids_BT[:, start + 1 : start + piece + 1]  # the row's last token predicts none of them
            with routing_off(model):
                dense_BPV, dense_cache = _step(model, ids_BP, dense_cache)
            with record_routing(model) as recording:
                logits_BPV, cache = _step(model, ids_BP, cache)
            for keep in recording.steps[-1].keep.values():
                share_BP = kept_share(keep)
                found.kept += float(share_BP.sum())
                found.decided += share_BP.numel()
            columns.append(tuple(_judged(dense_BPV, logits_BPV, target_BP)))
            bar.update()
    for name, parts in zip(("kl", "same", "dense_loss", "loss"), zip(*columns, strict=True), strict=True):
        getattr(found, name).append(torch.cat(parts, 1))
    for layer in snapshot(cache):
        found.kv_bytes += layer["kv_bytes"]
        found.dense_kv_bytes += layer["dense_kv_bytes"]


def _step(model: Any, ids_BP: Tensor, cache: Any) -> tuple[Tensor, Any]:
    """Logits [B, P, V] of one piece, and the cache that now holds it too."""
    given = {} if cache is None else {cache_argument(model): cache}
    output = model(input_ids=ids_BP, use_cache=True, **given)
    return output.logits, given_cache(output)


def _judged(dense_BPV: Tensor, logits_BPV: Tensor, target_BP: Tensor) -> Iterator[Tensor]:
    """KL(dense || routed) and whether the likeliest tokens agree, [B, P]; losses of both sides, [B, P], or
    [B, P-1] where a row ends."""
    parts: list[tuple[Tensor, ...]] = []
    step = max(1, LOSS_CHUNK // len(target_BP))
    predicts = target_BP.shape[1]
    for start in range(0, dense_BPV.shape[1], step):
        here = slice(start, start + step)
        dense = dense_BPV[:, here].float().log_softmax(-1)
        routed = logits_BPV[:, here].to(dense.device).float().log_softmax(-1)
        told = target_BP[:, here, None].to(dense.device)
        upto = min(dense.shape[1], max(0, predicts - start))
        parts.append(
            (
                nn.functional.kl_div(routed, dense, reduction="none", log_target=True).sum(-1),
                dense.argmax(-1) == routed.argmax(-1),
                -dense[:, :upto].gather(-1, told)[..., 0],
                -routed[:, :upto].gather(-1, told)[..., 0],
            )
        )
    return (torch.cat(one, 1).double().cpu() for one in zip(*parts, strict=True))
