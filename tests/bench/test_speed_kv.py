"""The case `speed_kv` at a tiny size: what it keeps, what its rows say. Never a claim about time."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import modlab
from modlab import bench
from modlab.bench import ideal, limits, registry, speed_kv
from modlab.bench.fast import Variant
from modlab.engine.guesses import Guesses
from modlab.errors import ModlabError

SIZES = speed_kv.Sizes(short=40, long=300, unequal=(30, 60, 200), new=6)


@pytest.mark.parametrize("ratio", [0.125, 0.25, 0.5])
def test_heads_keep_what_trained_gates_keep(ratio: float) -> None:
    shares = speed_kv.head_shares(32, 8, ratio, seed=0)
    assert shares.shape == (32, 8) and float(shares.mean()) == pytest.approx(ratio, abs=1e-6)
    some = shares[shares < 1]
    assert float(some.max()) <= 0.65 * ratio and float(some.min()) >= 0.18 * ratio
    if ratio == 0.25:  # the distribution that the figures are asked for
        assert 1 / 10 <= float((shares == 1).double().mean()) <= 1 / 5.9
        assert float(some.min()) >= 0.045 and float(some.max()) <= 0.16


def test_open_gates_are_open_in_all_heads() -> None:
    assert bool((speed_kv.head_shares(4, 2, 1.0, seed=0) == 1).all())


@pytest.fixture(scope="module")
def models() -> Iterator[tuple[registry.Settings, Any, dict[str, Any]]]:
    settings = registry.Settings(shape="tiny", repeats=1, skip="kv")
    with speed_kv.kept_models(settings, 400) as (dense, twins):
        yield settings, dense, twins


def test_rows_say_who_decides_and_count_bytes(models: Any) -> None:
    settings, dense, twins = models
    engine = twins[speed_kv.GUESSED].__dict__["mod_engine"]
    engine.guesses = Guesses(least=8, multiple=4)
    rows = list(speed_kv.generate_rows(settings, dense, twins, SIZES))
    wanted = (
        "case",
        "context",
        "batch",
        "granularity",
        "keep_ratio",
        "dense_ms",
        "mod_ms",
        "speedup",
        "ideal",
    )
    assert all(set(wanted) | {"kv_bytes", "dense_kv_bytes"} <= set(row) for row in rows)
    assert [row["granularity"] for row in rows if row["case"] == "prefill"][:6] == ["layer", "kv_head"] * 3
    quarter = {row["granularity"]: row for row in rows if row["context"] == 300 and row["keep_ratio"] == 0.25}
    assert quarter["layer"]["ideal"] == quarter["kv_head"]["ideal"] > 1
    for row in quarter.values():
        # 128 recent tokens and a quarter of the others, as far as chance has it
        assert row["kept_kv_bytes"] == pytest.approx(row["dense_kv_bytes"] * (128 + 44) / 305, rel=0.15)
        assert row["kept_kv_bytes"] <= row["kv_bytes"]
    skipped = [row for row in rows if row["skip"] == "layer"]
    assert [row["routed"] for row in skipped] == ["alternate"] * 4
    assert [row.get("guessed", False) for row in skipped] == [False, False, True, True]
    assert engine.guesses.right > 0 == engine.guesses.wrong, "no prompt ran on guesses"
    assert all(row["routed"] == "all" for row in rows if row["skip"] == "kv")


def test_stored_lengths_are_those_of_a_prefill(models: Any) -> None:
    """What decoding is timed with is what a prompt of that length leaves, by head."""
    settings, dense, twins = models
    mod, batch = twins["kv_head"].mod, 2
    shares = torch.tensor([[1.0, 0.0]] * 4)
    workload = speed_kv.KeptWorkload(settings, dense, twins, [300] * batch, 1)
    table = speed_kv.table_of(mod.layers, shares, 301, settings)
    from modlab.routing.state import routing_override

    with routing_override(twins["kv_head"], table):
        workload.timed(twins["kv_head"], workload.ids_BT, workload.mask_BT)
    last = twins["kv_head"].__dict__["mod_engine"].last
    lengths = speed_kv.stored_lengths(shares, batch, 300, mod.config.keep_recent)
    assert lengths == [[300, 128] * batch] * 4
    assert last["kept_tokens"] == [[214] * batch] * 4
    caches = limits.synthetic_caches(twins["kv_head"].__dict__["mod_engine"], lengths, 0.5)
    assert all(cache.lengths == [300, 128, 300, 128] and cache.heads == 2 for cache in caches)


def test_a_workload_of_skipped_layers_is_judged_as_one(models: Any) -> None:
    settings, dense, twins = models
    workload = speed_kv.KeptWorkload(settings, dense, twins, [40], 3)
    variant = Variant(speed_kv.SKIP_LAYERS, 0.25)
    workload.times([variant], 1)
    fields = workload.fields(variant, "prefill")
    assert (fields["skip"], fields["routed"], fields["granularity"]) == ("layer", "alternate", "layer")
    assert dataclasses.replace(settings, skip="layer") != workload.settings == settings


def last_line(models: Any) -> speed_kv.LastLine:
    settings, _, twins = models
    twin = twins["kv_head"]
    shares = torch.tensor([[1.0, 0.0]] * 4)
    table = speed_kv.table_of(twin.mod.layers, shares, 300 + SIZES.steps, settings)
    lengths = speed_kv.stored_lengths(shares, 1, 300, twin.mod.config.keep_recent)
    return speed_kv.LastLine(twin, lengths, table, settings, SIZES)


def test_the_last_line_of_a_batch_joins_those_before_it(models: Any) -> None:
    found = last_line(models).tried(6)
    token = 2 * 16 * 4  # bytes of a key and a value of one head
    kept = 6 * 4 * (300 + 128) * token
    assert found.rows == 6 and kept <= found.bytes <= 1.15 * kept  # room for 16 tokens more
    assert found.step_ms > 0 and found.line_ms > 0


def test_a_batch_that_does_not_fit_is_tried_smaller(models: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (
        ("empty_cache", None), ("reset_peak_memory_stats", None), ("memory_allocated", 0),
        ("max_memory_allocated", 0), ("mem_get_info", (speed_kv.SPARE + 40_000_000, 0)),
    ):  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    tried = []

    def run(line: speed_kv.LastLine, rows: int) -> speed_kv.Found:
        tried.append(rows)
        if rows > 60:
            raise torch.OutOfMemoryError
        return speed_kv.Found(rows, 1.0, 1.0, 1)

    monkeypatch.setattr(speed_kv.LastLine, "tried", run)
    line = last_line(models)
    assert speed_kv.largest_batch(line).rows == tried[-1] <= 60 < tried[-2]
    assert tried == sorted(tried, reverse=True) and all(rows % 2 == 0 for rows in tried)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (0, 0))
    assert speed_kv.largest_batch(line).rows == 2


def test_eight_bits_are_counted_and_said() -> None:
    """Of the same tokens, next to a model that skips layers and stores as ever."""
    settings = registry.Settings(shape="tiny", repeats=1, skip="kv", kv_cache_dtype="int8")
    config = modlab.MoDConfig(skip="kv", kv_cache_dtype="int8")
    with speed_kv.kept_models(settings, 400) as (dense, twins):
        rows = list(speed_kv.generate_rows(settings, dense, twins, SIZES, ["long", "short"]))
        rows += speed_kv.decode_rows(settings, dense, twins, 300, 2, 0.25, 2)
    token, codes = 2 * 2 * 16 * 4, 2 * 2 * 16 + 2 * 2 * 2
    assert ideal.kv_token_bytes(dense.config, 4) == token
    assert ideal.kv_token_bytes(dense.config, 4, config) == codes
    for row in rows:
        rounded = row["skip"] == "kv"
        assert row["kv_cache_dtype"] == ("int8" if rounded else "auto")
        if rounded and row["keep_ratio"] == 1.0:
            assert row["kept_kv_bytes"] / row["dense_kv_bytes"] == pytest.approx(codes / token)
            assert row["ideal"] > 1 if row["case"] == "decode" else row["ideal"] == 1
        if rounded and row["context"] == 300:
            assert row["kept_kv_bytes"] <= row["kv_bytes"] < row["dense_kv_bytes"] / 3
    decode = [row for row in rows if row.get("prompt") == "synthetic keys and values"]
    assert [row["granularity"] for row in decode] == ["layer", "kv_head"]


def test_cases_that_do_not_take_fewer_bits_refuse_them() -> None:
    with pytest.raises(ModlabError, match="speed is not measured so; generate, speed_kv can be"):
        bench.main(["speed", "--kv-cache-dtype", "int8", "--no-save"])
    with pytest.raises(ModlabError, match="speed_kv is not measured so; nothing yet can be"):
        bench.main(["speed_kv", "--kv-cache-dtype", "k6v4", "--no-save"])
