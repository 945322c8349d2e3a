"""Latencies of the lab: the cells that it opens can be run at every size."""

from typing import Any

import pytest

from benchmarks.lab_latency import CELL, SIZES


@pytest.mark.parametrize("tokens, layers, gates", SIZES)
def test_the_synthetic_trace_of_each_size_can_be_made(tokens: int, layers: int, gates: int) -> None:
    source = CELL.format(view="RoutingHeatmap", tokens=min(tokens, 300), layers=layers, gates=gates)
    found: dict[str, Any] = {}
    exec(source, found)
    assert found["trace"].num_layers == layers
    assert len(found["trace"].layers) == (layers * gates if gates > 1 else layers // 2)
