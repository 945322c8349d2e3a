"""The case for CPUs: rows of prompts and of decoding, by layer and by head; caches hold what is kept."""

from __future__ import annotations

import pytest

from modlab.bench.registry import Settings
from modlab.bench.speed_kv_cpu import GRANULARITIES, sides, speed_kv_cpu


def test_rows_of_both_granularities() -> None:
    settings = Settings(shape="tiny", contexts=(300,), ratios=(0.25,), repeats=1, decode_tokens=3)
    rows = list(speed_kv_cpu(settings))
    assert [(row["case"], row["granularity"]) for row in rows] == [
        (case, gates) for case in ("prefill", "decode") for gates in GRANULARITIES
    ]
    for row in rows:
        assert row["dense_ms"] > 0 and row["mod_ms"] > 0 and row["ideal"] > 1
        older = row["context"] - 128
        stored = (0.25 * older + 128) / row["context"]
        assert row["kv_bytes"] / row["dense_kv_bytes"] == pytest.approx(stored, rel=0.25)


def test_every_side_reads_the_same_weights() -> None:
    settings = Settings(shape="tiny", ratios=(0.25,), repeats=1, decode_tokens=2)
    models = sides(settings, 0.25, 40)
    weights = {side.model.lm_head.weight.data_ptr() for side in models.values()}
    assert set(models) == {"dense", *GRANULARITIES} and len(weights) == 1
