"""Executed share of the layers' operations in a prefill: an analytic count, for all skips and for removal.

Counted for each token of each layer: queries with the output projection, keys and values, the MLP, and scores
against half of the row; two operations a multiply-add. Routers, norms and the head are left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from modlab.bench.ideal import head_size, layer_weights, left_flops


def parts(config: Any, length: int) -> dict[str, float]:
    """Operations a token of one layer by part, in rows of `length` tokens."""
    attention, mlp = layer_weights(config)
    keys = left_flops(config, [1])
    pairs = 2 * length * config.num_attention_heads * head_size(config)  # QK^T and AV over half of the row
    return {"queries": 2 * attention - keys + pairs, "keys": keys, "mlp": 2 * mlp}


def leaving(config: Any, length: int, layers: int) -> float:
    """Where prompt tokens run `layers` layers, and leave keys and values in the others."""
    each, L = parts(config, length), config.num_hidden_layers
    return (layers + (L - layers) * each["keys"] / sum(each.values())) / L


def routed(config: Any, length: int, skip: str, kept: Mapping[int, Sequence[float]]) -> float:
    """Of a model whose routed layers keep these shares of the tokens: one share a layer, or one for attention
    and one for MLP."""
    each, L = parts(config, length), config.num_hidden_layers
    done = (L - len(kept)) * sum(each.values())
    for shares in kept.values():
        attention, mlp = shares[0], shares[-1]
        queries, keys = {
            "layer": (attention, attention),
            "mlp": (1.0, 1.0),
            "written": (attention, 1.0),
            "sublayers": (attention, 1.0),
        }[skip]
        done += queries * each["queries"] + keys * each["keys"] + mlp * each["mlp"]
    return done / (L * sum(each.values()))


def removed(config: Any, length: int, layers: int = 0, attentions: int = 0) -> float:
    """With so many whole layers out, or attentions."""
    each = parts(config, length)
    whole = sum(each.values())
    return 1 - (layers * whole + attentions * (whole - each["mlp"])) / (config.num_hidden_layers * whole)


def keep_for(config: Any, length: int, skip: str, routed_layers: int, compute: float) -> float:
    """The keep ratio of that many routed layers at which `compute` of the operations are left."""
    kept = dict.fromkeys(range(routed_layers), (0.0,))
    none = routed(config, length, skip, kept)
    return min(max((compute - none) / (1 - none), 0.0), 1.0)
