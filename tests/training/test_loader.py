"""Batches: kinds of input, order, ranks, skipping."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from modlab.errors import ModlabError
from modlab.training.loader import open_batches

ROWS = torch.arange(40).reshape(10, 4)


class RowDataset(torch.utils.data.Dataset):
    """Map-style, with labels."""

    def __len__(self) -> int:
        return len(ROWS)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return {"input_ids": ROWS[i], "labels": ROWS[i] + 100}


def take(data: Any, count: int, **arguments: Any) -> list[Tensor]:
    return [b["input_ids"] for b in itertools.islice(open_batches(data).iterate(**arguments), count)]


def sources() -> dict[str, Any]:
    from datasets import Dataset

    return {
        "tensor": ROWS,
        "list of rows": ROWS.tolist(),
        "data set": RowDataset(),
        "datasets": Dataset.from_dict({"input_ids": ROWS.tolist()}).with_format("torch"),
    }


@pytest.mark.parametrize("kind", ["tensor", "list of rows", "data set", "datasets"])
def test_each_epoch_shows_every_row_once(kind: str) -> None:
    batches = take(sources()[kind], 10, batch_size=2)
    for epoch in (batches[:5], batches[5:]):
        assert sorted(torch.cat(epoch)[:, 0].tolist()) == ROWS[:, 0].tolist()
    assert not torch.equal(torch.cat(batches[:5]), torch.cat(batches[5:]))
    assert all(b.dtype == torch.int64 for b in batches)


@pytest.mark.parametrize("kind", ["tensor", "data set", "datasets"])
def test_starting_late_is_skipping(kind: str) -> None:
    everything = take(sources()[kind], 12, batch_size=3, seed=5)
    for start in (1, 3, 7):
        late = take(sources()[kind], 12 - start, batch_size=3, seed=5, start=start)
        assert all(torch.equal(a, b) for a, b in zip(everything[start:], late, strict=True))


def test_kinds_of_rows_share_one_order() -> None:
    orders = [torch.cat(take(s, 8, batch_size=2, seed=9)) for s in sources().values()]
    assert all(torch.equal(orders[0], other) for other in orders[1:])


def test_ranks_divide_the_batch_of_one_process() -> None:
    alone = take(ROWS, 6, batch_size=4, seed=2)
    ranks = [take(ROWS, 6, batch_size=2, seed=2, rank=r, world=2) for r in (0, 1)]
    for whole, first, second in zip(alone, *ranks, strict=True):
        assert torch.equal(whole, torch.cat([first, second]))


def test_no_row_is_left_out_or_seen_twice_however_the_rows_are_shared() -> None:
    """Ten rows in batches of four: the third batch has the last two and the first two of the next epoch."""
    alone = torch.cat(take(ROWS, 5, batch_size=4, seed=3))
    for epoch in (alone[:10], alone[10:]):
        assert sorted(epoch[:, 0].tolist()) == ROWS[:, 0].tolist()
    for world, size in ((2, 2), (4, 1), (1, 2)):
        ranks = [
            take(ROWS, 20 // (world * size), batch_size=size, seed=3, rank=r, world=world)
            for r in range(world)
        ]
        assert torch.equal(torch.cat([part for step in zip(*ranks, strict=True) for part in step]), alone)


def test_an_evaluation_sees_every_row_once() -> None:
    kept = take(ROWS, 99, batch_size=4, seed=None, epochs=1)
    assert torch.equal(torch.cat(kept), ROWS) and [len(b) for b in kept] == [4, 4, 2]
    assert [len(b) for b in take(ROWS, 99, batch_size=4, epochs=2)] == [4, 4, 2, 4, 4, 2]
    per_rank = [take(ROWS, 99, batch_size=4, seed=None, epochs=1, rank=r, world=2) for r in (0, 1)]
    assert sorted(torch.cat(per_rank[0] + per_rank[1])[:, 0].tolist()) == ROWS[:, 0].tolist()


def test_ready_batches_keep_their_order_and_start_again() -> None:
    blocks = [ROWS[:2], {"input_ids": ROWS[2:5]}, ROWS[5:]]
    shapes = [len(b) for b in take(blocks, 5)]
    assert shapes == [2, 3, 5, 2, 3]
    assert [len(b) for b in take(blocks, 5, start=1)] == [3, 5, 2, 3, 5]
    assert [len(b) for b in take(blocks, 5, epochs=1)] == [2, 3, 5]
    assert [len(b) for b in take([*blocks, ROWS[:1]], 9, epochs=1, rank=1, world=2)] == [3, 1]


def test_streams() -> None:
    def once() -> Any:
        yield from (ROWS[i : i + 2] for i in range(0, 10, 2))

    assert len(take(once(), 99)) == 5, "the batch that was looked at is not lost, the end is an end"
    assert torch.equal(take(once(), 99, start=3)[0], ROWS[6:8])
    assert len(take(once(), 99, rank=1, world=2)) == 2, (
        "an incomplete group of batches is left out on every rank"
    )

    class Again:
        def __iter__(self) -> Any:
            return once()

    assert len(take(Again(), 12)) == 12


def test_labels_and_masks_travel() -> None:
    batch = next(open_batches(RowDataset()).iterate(batch_size=2))
    assert torch.equal(batch["labels"], batch["input_ids"] + 100)
    masked = {"input_ids": ROWS[:2], "attention_mask": torch.ones(2, 4), "labels": None}
    with pytest.raises(ModlabError, match="attention_mask holds torch.float32"):
        open_batches([masked])
    masked["attention_mask"] = torch.ones(2, 4, dtype=torch.bool)
    assert set(next(open_batches([masked]).iterate())) == {"input_ids", "attention_mask"}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "empty"),
        (iter([]), "empty"),
        (torch.empty(0, 4, dtype=torch.long), "empty"),
        ("some text", "is the text"),
        (7, "is a int"),
        ([{"ids": [1, 2]}], "no input_ids"),
        ([torch.randn(2, 4)], "whole numbers are needed"),
        ([{"input_ids": torch.ones(2, 4).long(), "labels": torch.ones(2, 3).long()}], "one shape"),
        (iter([torch.arange(4)]), "single rows"),
    ],
)
def test_refusals(data: Any, message: str) -> None:
    with pytest.raises(ModlabError, match=message):
        open_batches(data)


def test_refuses_ragged_rows() -> None:
    from datasets import Dataset

    ragged = [[1, 2, 3], [4, 5], [6, 7, 8, 9]]
    with pytest.raises(ModlabError, match="differ in length"):
        open_batches(Dataset.from_dict({"input_ids": ragged}))
    with pytest.raises(ModlabError, match="differ in length"):
        take(ragged, 1, batch_size=3)


def test_packed_rows_are_read_once() -> None:
    """Read from Arrow row by row they would not keep up with a GPU: they are one tensor, and batches are cut
    from it."""
    from datasets import Dataset, Features, List, Value

    rows = Dataset.from_dict(
        {"input_ids": torch.randint(0, 4096, (256, 64)).numpy()},
        features=Features({"input_ids": List(Value("int32"), length=64)}),
    ).with_format("torch")
    source = open_batches(rows)
    assert source.preloaded and source.data.dtype == torch.int32
    with pytest.MonkeyPatch.context() as patch:
        for name in ("__getitem__", "__getitems__", "__iter__"):
            patch.setattr(Dataset, name, lambda *args: pytest.fail("a row was read again"))
        batches = [batch["input_ids"] for batch in source.iterate(batch_size=64, epochs=1)]
    assert [len(batch) for batch in batches] == [64] * 4


def test_every_key_is_used_or_refused() -> None:
    positions = torch.arange(4).repeat(2, 1)
    batch = next(open_batches([{"input_ids": ROWS[:2], "position_ids": positions}]).iterate())
    assert torch.equal(batch["position_ids"], positions)
    for item in ({"text": "a"}, {"token_type_ids": ROWS[:2]}, {"image": None, "length": [4, 4]}):
        unused = [name for name, value in item.items() if value is not None]
        with pytest.raises(ModlabError, match=f"has {unused[0]}, which nothing here would use: leave it out"):
            open_batches([{"input_ids": ROWS[:2], **item}])
    with pytest.raises(ModlabError, match="holds texts.*modlab.data.packed"):
        open_batches(["one text", "another text"])


@pytest.mark.parametrize("kind", ["tensor", "list of rows", "data set", "datasets"])
def test_a_fingerprint_tells_data_apart(kind: str) -> None:
    found = open_batches(sources()[kind]).fingerprint
    assert found == open_batches(sources()[kind]).fingerprint
    assert (found["kind"], found["rows"], found["row_length"]) == ("rows", 10, 4)
    assert found["digest"]


def test_a_fingerprint_sees_what_a_batch_holds() -> None:
    """Order, one token, a mask, where rows are cut; of a stream what comes first."""
    other = ROWS.clone()
    other[7, 2] += 1
    blocks = [{"input_ids": ROWS[:5]}, {"input_ids": ROWS[5:]}]
    masked = [{"input_ids": b["input_ids"], "attention_mask": torch.ones(5, 4).long()} for b in blocks]
    kinds = [ROWS, ROWS.flip(0), other, ROWS[:, :3], blocks, blocks[::-1], masked, iter(blocks)]
    digests = [str(open_batches(data).fingerprint) for data in kinds]
    assert len(set(digests)) == len(digests)
    assert open_batches(iter(blocks)).fingerprint == open_batches(iter(blocks)).fingerprint


def test_rows_that_are_never_twice_the_same_have_no_digest() -> None:
    class Random(RowDataset):
        def __getitem__(self, i: int) -> dict[str, Tensor]:
            return {"input_ids": torch.randint(0, 2**40, (4,))}

    assert open_batches(Random()).fingerprint["digest"] is None
