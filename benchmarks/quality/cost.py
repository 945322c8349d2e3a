"""Share of a dense model's operations that a routed one executes, from what its routers kept.

Counted: linear maps of attention and MLP, causal attention over kept keys, the output head; two operations
for each multiply-add. Routers and norms are left out.

Shape letters: T tokens of a row.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from modlab.bench.ideal import head_size
from modlab.skips import named


def layer_operations(config: Any, length: int, attention: float, mlp: float, keys: float) -> float:
    """Operations a token of one layer, T = `length`.

    Args:
        config: of a Llama.
        length: tokens of a row.
        attention, mlp: share of tokens for which they run.
        keys: share of earlier tokens that a query meets.
    """
    size, width = head_size(config), config.num_attention_heads * head_size(config)
    maps = 2 * config.hidden_size * size * (config.num_attention_heads + config.num_key_value_heads)
    scores = 2 * keys * (length / 2) * width  # QK^T and AV over half the row on average
    return 2 * (attention * (maps + scores) + mlp * 3 * config.hidden_size * config.intermediate_size)


def flops_share(
    config: Any,
    length: int,
    skip: str | None,
    kept: Mapping[int, float],
    mlp_kept: Mapping[int, float] | None = None,
    all_keys: bool = False,
) -> float:
    """Executed over dense operations of a prefill of T = `length` tokens.

    Args:
        config: of a Llama.
        length: tokens of a row.
        skip: what a skipped token leaves out, as `MoDConfig.skip`; None for a dense model.
        kept: share of tokens kept, by routed layer.
        mlp_kept: the MLPs' own share, where they have routers of their own.
        all_keys: skipped tokens are attended to all the same (shared K/V).
    """
    head = 2 * config.hidden_size * config.vocab_size
    dense = head + config.num_hidden_layers * layer_operations(config, length, 1.0, 1.0, 1.0)
    done: float = head
    for index in range(config.num_hidden_layers):
        r = kept.get(index, 1.0)
        attention, mlp = (1.0, 1.0) if skip is None else named(skip).runs(r)
        if mlp_kept:
            mlp = mlp_kept.get(index, 1.0)
        done += layer_operations(config, length, attention, mlp, 1.0 if all_keys else attention)
    return done / dense
