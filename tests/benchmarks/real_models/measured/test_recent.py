"""Recent tokens against gated ones: on a random model of two layers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks.real_models.__main__ import main
from benchmarks.real_models.measured import recent
from benchmarks.real_models.measured.product import Product
from modlab.errors import ModlabError
from modlab.routing.trained import Trained

LENGTH = 512
TEXT = "".join(chr(97 + i * i % 23) for i in range(2 * LENGTH + 8))


def test_two_settings_of_equal_bytes(product: Product) -> None:
    few, many = recent.run(product, [TEXT], LENGTH, [2.0], [16, 128])
    assert (few["recent"], many["recent"]) == (16, 128) and few["threshold"] < many["threshold"]
    for line in (few, many):
        assert line["ratio"] == pytest.approx(2, rel=0.15) and line["kl"] > 1e-6


def test_without_anything_dropped_it_is_the_dense_model(product: Product) -> None:
    _, ids_T = recent.rows_of(product, [TEXT], LENGTH)
    point = recent.Point(1.0, 0.999, LENGTH)
    found = recent.measure(product, ids_T, recent.dense_states(product, ids_T), point)
    assert abs(found["kl"]) < 1e-6 and found["ratio"] == pytest.approx(1, rel=0.1)


def test_recall_by_distance(product: Product) -> None:
    lines = list(recent.run(product, [TEXT], LENGTH, [2.0], [16], (200,), 3))
    assert lines[1]["passages"] == 3 and list(lines[1]["recall_gap"]) == ["200"]
    nothing = recent.Point(1.0, 0.999, LENGTH)
    row, _ = recent.rows_of(product, [TEXT], LENGTH)
    (whole,) = recent.recall_gaps(product, row, [nothing], (200,), 3)
    assert abs(whole["recall_gap"]["200"]) < 1e-5 < abs(lines[1]["recall_gap"]["200"])


def test_as_shipped(product: Product) -> None:
    product.routing.trained = Trained(savings={2.0: 0.4, 4.0: 0.8}, seq_len=LENGTH, recent={2.0: 64, 4.0: 32})
    points = recent.shipped(product, [2.0, 4.0])
    assert [point.recent for point in points] == [64, 32]
    assert [point.threshold for point in points] == pytest.approx([0.4, 0.8])


def test_settings_are_as_before_afterwards(product: Product) -> None:
    before = dict(product.routing.thresholds), product.window
    list(recent.run(product, [TEXT], LENGTH, [2.0], [64]))
    assert (dict(product.routing.thresholds), product.window) == before


@pytest.mark.parametrize(
    ("texts", "recents", "said"),
    [([TEXT[:600]], [16], "two rows of 512"), ([TEXT], [300], "the latest 300"), ([TEXT], [], "--recent")],
)
def test_what_cannot_be_asked(product: Product, texts: list[str], recents: list[int], said: str) -> None:
    with pytest.raises(ModlabError, match=said):
        list(recent.run(product, texts, LENGTH, [2.0], recents))


def test_the_command(converted: Path, tmp_path: Path) -> None:
    (tmp_path / "text").write_text(TEXT)
    options = ["--length", str(LENGTH), "--savings", "2", "--recent", "16,64", "--out", str(tmp_path / "out")]
    main(["recent", "--model", str(converted), "--text", str(tmp_path / "text"), *options])
    lines = [json.loads(line) for line in (tmp_path / "out").read_text().splitlines()]
    assert [line["recent"] for line in lines] == [16, 64]


def test_rows_follow_each_other(product: Product) -> None:
    first, second = recent.rows_of(product, [TEXT], LENGTH)
    assert torch.equal(torch.cat([first, second]), torch.tensor(product.ids(TEXT))[: 2 * LENGTH])
