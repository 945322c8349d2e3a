"""Whether the routers' training came as far as a saving's threshold."""

from __future__ import annotations

import pytest

from benchmarks.real_models.measured.product import Product
from benchmarks.real_models.measured.thresholds import _beyond
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
