"""Result rows: times of dense and Mixture-of-Depths side by side, with what is needed to judge them."""

from __future__ import annotations

import operator
import statistics
from typing import Any

from modlab.bench.clock import Times
from modlab.bench.registry import ROW_KEYS, Row
from modlab.cache.bytes import snapshot


def make_row(dense: Times, mod: Times, **fields: Any) -> Row:
    """One flat row from the rounds' times, `fields` holding the rest of `ROW_KEYS`.

    `speedup` is the ratio of the medians, `speedup_paired` the median of the rounds' own ratios,
    `speedup_cpu_time` (cases on the CPU) that of the medians of computing time.
    """
    dense_ms, mod_ms = statistics.median(dense.wall), statistics.median(mod.wall)
    row = fields | {
        "dense_ms": round(dense_ms, 4),
        "mod_ms": round(mod_ms, 4),
        "speedup": round(dense_ms / mod_ms, 3),
        "ideal": round(fields["ideal"], 3),
        "keep_ratio": round(fields["keep_ratio"], 4),
        "kv_saving": round(fields["dense_kv_bytes"] / fields["kv_bytes"], 3) if fields["kv_bytes"] else 1.0,
        "speedup_paired": round(statistics.median(map(operator.truediv, dense.wall, mod.wall)), 3),
        "rounds": len(dense.wall),
        "dense_ms_min": round(min(dense.wall), 4),
        "dense_ms_max": round(max(dense.wall), 4),
        "mod_ms_min": round(min(mod.wall), 4),
        "mod_ms_max": round(max(mod.wall), 4),
    }
    if dense.cpu and mod.cpu:
        dense_cpu, mod_cpu = statistics.median(dense.cpu), statistics.median(mod.cpu)
        row |= {
            "dense_cpu_ms": round(dense_cpu, 4),
            "mod_cpu_ms": round(mod_cpu, 4),
            "speedup_cpu_time": round(dense_cpu / mod_cpu, 3),
        }
    return {key: row[key] for key in ROW_KEYS} | {k: v for k, v in row.items() if k not in ROW_KEYS}


def cache_facts(cache: Any, routed: list[int], batch: int) -> tuple[int, float]:
    """Allocated bytes of a cache, and its keep ratio: tokens stored over tokens seen, in routed layers."""
    layers = snapshot(cache)
    kept = statistics.fmean(layers[i]["kept_tokens"] / (layers[i]["seen_tokens"] * batch) for i in routed)
    return sum(row["kv_bytes"] for row in layers), kept
