"""Batches in an order that depends on the seed and the position alone, so that a run can resume.

Three kinds of input become one stream of dicts of [B, T] tensors on the CPU:

- rows: a `datasets.Dataset` or torch data set of single rows, shuffled again for each epoch; the last batch
  of an epoch goes on with the next one's rows, so that none is left out. Packed rows are held in memory as
  one int32 tensor, other data sets go through a torch DataLoader;
- blocks: a list of ready batches, in their order, again from the start at its end;
- a stream: any other iterable of ready batches; an iterator that can be run through only once ends the
  training.

With several processes, consecutive pieces of the same global order go to rank 0, 1, ...: two processes with
batches of 4 rows see the rows that one process with batches of 8 sees. Every process has to be given all of
the data; what is left of a one-time stream when it fills no global batch any more is not trained on.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from modlab.data.batches import Batch, batch_of, predicts
from modlab.data.texts import is_chat, unwrapped
from modlab.errors import ModlabError

PRELOAD_BYTES = 8 * 2**30
SAMPLED = 32  # rows that stand for data which is not in memory


@dataclass
class Batches:
    """A checked source of batches; `first` is its first batch or row as [B, T] tensors (for shape checks)."""

    kind: str
    data: Any
    first: Batch

    @property
    def rows(self) -> int | None:
        """Number of rows (rows), of batches (blocks), or None (stream)."""
        return None if self.kind == "stream" else len(self.data)

    @property
    def preloaded(self) -> bool:
        """Whether all rows are one tensor in memory."""
        return self.kind == "rows" and isinstance(self.data, Tensor)

    @property
    def predicts_nothing(self) -> bool:
        """Whether no token of the data is to be predicted. Of a stream only the first batch is known, which
        may be one of prompts alone."""
        if self.kind == "stream" or predicts(self.first):
            return False
        return not any(predicts(_as_batch(self.data[i])) for i in range(len(self.data)))

    @property
    def fingerprint(self) -> dict[str, Any]:
        """What other data does not share: kind, number of rows or batches, length of a row, and a digest.

        The digest is of all rows that are in memory, else of some, evenly spread; of a stream, of its first
        batch. It is None for rows that are never twice the same.
        """
        digest = hashlib.sha256()
        if self.preloaded:
            for part in self.data.split(2**16):
                digest.update(part.contiguous().numpy().data)
        for item, again in self._sampled():
            if not _same(item, again):
                return self._shape | {"digest": None}
            for name, value in sorted(item.items()):
                digest.update(f"{name} {tuple(value.shape)}".encode())
                digest.update(value.contiguous().numpy().data)
        return self._shape | {"digest": digest.hexdigest()}

    @property
    def outline(self) -> str:
        """What processes that were given the same data agree on; rows that are made when they are asked for
        need not be the same in all of them."""
        if self.kind == "rows" and not self.preloaded:
            return str(self._shape)
        return str(self._shape | {name: value.tolist() for name, value in sorted(self.first.items())})

    @property
    def _shape(self) -> dict[str, Any]:
        return {"kind": self.kind, "rows": self.rows, "row_length": self.first["input_ids"].shape[1]}

    def _sampled(self) -> Iterator[tuple[Batch, Batch]]:
        """Items that stand for data which is not in memory, each asked for twice."""
        if self.kind == "stream":
            yield self.first, self.first
        elif not self.preloaded:
            last = len(self.data) - 1
            for i in sorted({round(k * last / (SAMPLED - 1)) for k in range(SAMPLED)}):
                yield _as_batch(self.data[i]), _as_batch(self.data[i])

    def iterate(
        self,
        batch_size: int = 1,
        seed: int | None = 0,
        start: int = 0,
        rank: int = 0,
        world: int = 1,
        num_workers: int = 0,
        epochs: int | None = None,
    ) -> Iterator[Batch]:
        """Batches of this rank from position `start` (counted in batches per rank) on.

        Args:
            batch_size: rows a batch (rows only).
            seed: of the shuffling (rows only); None keeps the order.
            start: batches to skip.
            rank, world: which share of every global batch.
            num_workers: processes of the DataLoader where one is used.
            epochs: stop after so many passes, the last batch of each being shorter where rows do not fill it;
                None never stops (but a one-time stream does at its end).
        """
        if self.kind == "rows":
            picks = _picks(len(self.data), batch_size, seed, start, rank, world, epochs)
            if isinstance(self.data, Tensor):
                return ({"input_ids": self.data[pick].long()} for pick in picks)
            return iter(
                torch.utils.data.DataLoader(
                    self.data, batch_sampler=picks, collate_fn=_collate, num_workers=num_workers
                )
            )
        return self._ready_batches(start, rank, world, epochs)

    def _ready_batches(self, start: int, rank: int, world: int, epochs: int | None) -> Iterator[Batch]:
        def endless() -> Iterator[Any]:
            passes = 0
            while epochs is None or passes < epochs:
                count = 0
                for batch in self.data:
                    count += 1
                    yield batch
                if isinstance(self.data, Iterator) or count == 0:
                    return
                passes += 1

        stream = itertools.islice(endless(), start * world, None)
        while len(group := list(itertools.islice(stream, world))) == world:  # ranks stop together
            yield _as_batch(group[rank])


def open_batches(data: Any, what: str = "batches") -> Batches:
    """Find out what `data` is and look at its first batch.

    Raises:
        ModlabError: nothing in it, or nothing that a causal language model can be trained on.
    """
    if isinstance(data, Batches):
        return data
    if isinstance(data, (str, bytes)):
        raise ModlabError(
            f"{what} is the text {str(data)[:40]!r}: give modlab.data.packed(source, tokenizer)."
        )
    if isinstance(data, Mapping) or (isinstance(data, Tensor) and data.dim() == 1):
        data = [data]
    if hasattr(data, "__len__") and hasattr(data, "__getitem__"):
        if len(data) == 0:
            raise ModlabError(f"{what} is empty.")
        first = _as_batch(data[0])
        if isinstance(data, Tensor) or _is_row(data[0]):
            return Batches("rows", _preloaded(data), first)
        return Batches("blocks", data, first)
    if not isinstance(data, Iterable):
        raise ModlabError(
            f"{what} is a {type(data).__name__}; give a datasets.Dataset or an iterable of batches."
        )
    iterator = iter(data)
    try:
        item = next(iterator)
    except StopIteration:
        raise ModlabError(f"{what} is empty (or was used up before).") from None
    if _is_row(item):
        raise ModlabError(
            f"{what} yields single rows. Give batches of shape [B, T], or a data set with len() and indexing."
        )
    # an iterator gives its items once: put the one that was looked at back in front
    again = itertools.chain([item], iterator) if iterator is data else data
    return Batches("stream", again, _as_batch(item))


def _picks(
    n: int, batch_size: int, seed: int | None, start: int, rank: int, world: int, epochs: int | None
) -> Iterator[list[int]]:
    """Row indices of this rank's batches. Without an end they are one line of rows, epoch after epoch: which
    rows a step sees depends on how many all processes take in it, not on how these are shared."""
    per_step = batch_size * world
    if epochs is None and n < per_step:
        raise ModlabError(
            f"{n} rows are fewer than a batch of {per_step} ({batch_size} in each of {world} process(es)): "
            "give more data or a smaller batch_size."
        )

    @functools.lru_cache(maxsize=2)
    def order(epoch: int) -> Any:
        return np.arange(n) if seed is None else np.random.default_rng([seed, epoch]).permutation(n)

    each = -(-n // per_step) * per_step if epochs is not None else n  # places an epoch, some of them empty
    for step in itertools.count(start):
        first = step * per_step + rank * batch_size
        if epochs is not None and step * per_step >= epochs * each:
            return
        places = (divmod(place, each) for place in range(first, first + batch_size))
        if rows := [int(order(epoch)[row]) for epoch, row in places if row < n]:
            yield rows


def _is_row(item: Any) -> bool:
    value = item.get("input_ids") if isinstance(item, Mapping) else item
    return (value.dim() if isinstance(value, Tensor) else np.asarray(value).ndim) == 1


def _as_batch(item: Any) -> Batch:
    """A batch as `modlab.data.batches` reads it, of token ids; texts are to be packed first."""
    item = unwrapped(item)
    if isinstance(item, str) or is_chat(item):
        raise ModlabError(
            f"The data holds texts ({str(item)[:40]!r}): give modlab.data.packed(texts, tokenizer)."
        )
    return batch_of(item, "the data")


def _same(a: Batch, b: Batch) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def _collate(rows: Sequence[Any]) -> Batch:
    batches = [_as_batch(row) for row in rows]
    if len({b["input_ids"].shape for b in batches}) != 1:
        lengths = sorted({b["input_ids"].shape[1] for b in batches})
        raise ModlabError(
            f"Rows differ in length ({lengths[:5]}): pack them with modlab.data.packed, or pad them."
        )
    return {name: torch.cat([b[name] for b in batches]) for name in batches[0]}


def _preloaded(data: Any) -> Any:
    """A packed `datasets.Dataset` as one int32 tensor [rows, T] where it fits; anything else as it is.

    Reading rows one by one from Arrow gives some 10^5 tokens a second and core; the tensor gives 10^8.
    """
    if isinstance(data, Tensor):
        return data.to(torch.int32)
    import pyarrow.compute as pc

    if getattr(data, "column_names", None) != ["input_ids"]:
        return data
    table = data.select_columns(["input_ids"]).with_format("arrow")
    length = len(data[0]["input_ids"])
    if len(data) * length * 4 > PRELOAD_BYTES:
        return data
    rows = torch.empty(len(data), length, dtype=torch.int32)
    done = 0
    for part in table.iter(batch_size=10_000):
        ids, count = part["input_ids"].combine_chunks(), len(part)
        extent = pc.min_max(pc.list_value_length(ids)).as_py()
        if extent["min"] != length or extent["max"] != length:
            raise ModlabError("Rows differ in length: pack them with modlab.data.packed, or pad them.")
        values = ids.flatten().to_numpy(zero_copy_only=False)
        rows[done : done + count] = torch.from_numpy(values.reshape(count, length).astype(np.int32))
        done += count
    return rows
