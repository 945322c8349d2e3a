"""Whether the routers' training came as far as a saving's threshold."""

from __future__ import annotations

from pathlib import Path

import pytest

import modlab
from benchmarks.real_models.measured.product import Product
from benchmarks.real_models.measured.thresholds import CLOSE, _beyond, find
from benchmarks.real_models.texts import Data
from modlab.routing.trained import Trained

RUN = Trained(savings={2.0: 0.1, 8.0: 0.9})
SHIPPED = Trained(savings={2.0: 0.1, 8.0: 0.9, 16.0: 0.99}, reached=8.0)


@pytest.mark.parametrize(
    ("known", "asked", "p", "beyond"),
    [
        (None, 4, 0.99, False),
        (Trained(tokens=5), 4, 0.99, False),
        (RUN, 8, 0.89, False),
        (RUN, 8, 0.92, True),  # these texts ask for more than the training left
        (SHIPPED, 8, 0.92, False),  # the same threshold, set on other rows
        (SHIPPED, 16, 0.98, True),
        (SHIPPED, 12, 0.95, True),
    ],
)
def test_a_threshold_lies_beyond_the_training(
    product: Product, known: Trained | None, asked: float, p: float, beyond: bool
) -> None:
    product.routing.trained = known
    assert _beyond(product, asked, p) is beyond


IN_FP32 = 64 / (16 + 4)
"""What eight bits save of heads of 8 in fp32: 8 + 8 numbers of 4 bytes, as bytes and two steps of 2."""


def test_in_eight_bits_routing_saves_the_rest(converted: Path) -> None:
    """And so many tokens are recent as go with what is left to it."""
    plain, rounded = (Product.load(converted, None, "cpu", False, dtype) for dtype in ("auto", "int8"))
    for product in (plain, rounded):
        product.routing.trained = Trained(savings={2.0: 0.1, 8.0: 0.9}, recent={2.0: 64, 8.0: 16})
    assert plain.of_routing(8.0) == 8 and rounded.of_routing(8.0) == pytest.approx(8 / IN_FP32)
    assert rounded.recent_for(8 * IN_FP32) == plain.recent_for(8.0) == 16
    assert rounded.recent_for(2.0) == plain.recent_for(1.0) == 64, "the most that is known"


def test_thresholds_in_eight_bits_are_of_what_both_save(converted: Path, data: Data) -> None:
    product = Product.load(converted, None, "cpu", False, "int8")
    found = {asked: find(product, data, 1, asked) for asked in (2.0, 4.0, 8.0)}
    for asked in (4.0, 8.0):
        assert abs(found[asked]["ratio_set"] / asked - 1) < 0.1
    assert found[4.0]["threshold"] < found[8.0]["threshold"]
    kept = found[2.0]
    assert kept["ratio_set"] > 2 * (1 + CLOSE) and kept["threshold"] <= 1e-6, "more than asked with all keys"
    assert len(kept["tried"]) == 1, "which is not tried again"
    assert product.routing.config.kv_cache_dtype == "int8"
    modlab.set_kv_cache_dtype(product.model, "auto")
    assert find(product, data, 1, 4.0)["threshold"] > found[4.0]["threshold"]
