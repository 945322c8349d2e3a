"""Routing traces without a model, for tests of what is drawn."""

import numpy as np

from modlab.traces.routing_trace import RoutingTrace


def make_trace(
    count: int = 60, depth: int = 6, p: float = 0.5, seed: int = 0, **fields: object
) -> RoutingTrace:
    """`count` tokens, every other of `depth` layers routed, random gates, decisions by threshold p.

    fields: what is to be different, by the names of RoutingTrace.
    """
    rng = np.random.default_rng(seed)
    routed = list(range(1, depth, 2))
    gate = rng.uniform(0.02, 0.98, size=(len(routed), count)).astype(np.float32)
    keep = gate >= np.float32(p)
    keep[:, :4] = True
    loss = rng.uniform(0.1, 5, count)
    loss[0] = np.nan
    made: dict[str, object] = {
        "tokens": [f"w{i} " if i % 9 else f"w{i}\n" for i in range(count)],
        "token_ids": np.arange(count),
        "gate": gate,
        "keep": keep,
        "layers": routed,
        "num_layers": depth,
        "thresholds": np.full(len(routed), p),
        "keep_first": 4,
        "loss": loss,
        "kv_bytes_per_token": 512,
        "model": "synthetic",
    }
    return RoutingTrace(**{**made, **fields})  # type: ignore[arg-type]


def head_trace(
    count: int = 60, depth: int = 6, heads: int = 2, p: float = 0.5, seed: int = 3
) -> RoutingTrace:
    """As `make_trace`, with a gate for each of so many KV heads: rows of a layer lie next to each other."""
    layers = [layer for layer in range(1, depth, 2) for _ in range(heads)]
    gate = np.random.default_rng(seed).uniform(0.02, 0.98, (len(layers), count)).astype(np.float32)
    keep = gate >= np.float32(p)
    keep[:, :4] = True
    rows = {"gate": gate, "keep": keep, "layers": layers, "thresholds": np.full(len(layers), p)}
    return make_trace(count, depth, p, skip="kv", **rows)
