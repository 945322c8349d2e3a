"""What the skipped work alone would give: floating-point operations in prefill, bytes in decoding.

The yardstick for a measured speed-up. Prefill is bound by arithmetic: linear maps and causal attention are
counted. Decoding waits for memory: the weights of the layers that run, and the keys and values they read.
Routers, norms, launches and whatever else a real machine spends are left out on purpose.

Shape letters: B rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from modlab.config import MoDConfig

RECENT = MoDConfig().keep_recent
"""Latest tokens that stay whatever a router says, where it decides about the cache alone: the benchmarks'
models are converted with the default `keep_recent`."""


def layer_weights(config: Any) -> tuple[int, int]:
    """Weights of one decoder layer's linear maps: (attention, gated MLP)."""
    size = head_size(config)
    attention = 2 * config.hidden_size * size * (config.num_attention_heads + config.num_key_value_heads)
    return attention, 3 * config.hidden_size * config.intermediate_size


def shares(share: float, skip: str) -> tuple[float, float]:
    """Shares of the tokens that run (attention, MLP) when routers that keep `share` leave out `skip`: a
    layer, an attention or an MLP; or nothing but keys and values ("kv")."""
    return (1.0 if skip in ("mlp", "kv") else share), (1.0 if skip in ("attention", "kv") else share)


def stored_tokens(length: float, share: float, skip: str) -> float:
    """Tokens of `length` whose keys and values are stored where routers keep `share`."""
    if skip == "kv":
        return min(length, RECENT) + share * max(length - RECENT, 0)
    return length if skip == "mlp" else share * length


def head_size(config: Any) -> int:
    """Size of one attention head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def kv_token_bytes(config: Any, bytes_each: int) -> int:
    """Bytes of K and V of one token in one layer."""
    return 2 * config.num_key_value_heads * head_size(config) * bytes_each


def prefill_flops(config: Any, lengths: Sequence[int], share: float, skip: str = "layer") -> float:
    """Operations of one layer that runs, or whose part `skip` runs, on `share` of the tokens of rows of these
    lengths.
    """
    width = config.num_attention_heads * head_size(config)
    attention, mlp = layer_weights(config)
    attended, mapped = shares(share, skip)
    linear = 2 * sum(lengths) * (attended * attention + mapped * mlp)
    return linear + sum(4 * _pairs(n, share, skip) * width for n in lengths)  # QK^T and AV


def _pairs(length: float, share: float, skip: str) -> float:
    """Pairs of a query and a key that it sees, in a row of `length` tokens."""
    if skip != "kv":
        return (shares(share, skip)[0] * length) ** 2 / 2
    older = max(length - RECENT, 0) ** 2 / 2
    return length**2 / 2 - (1 - share) * older


def ideal_prefill(config: Any, lengths: Sequence[int], kept: dict[int, float], skip: str = "layer") -> float:
    """Dense / remaining operations of a prefill when layer i, or its part `skip`, runs on the share `kept[i]`
    of the tokens.
    """
    total = range(config.num_hidden_layers)
    dense = sum(prefill_flops(config, lengths, 1.0) for _ in total)
    return dense / sum(prefill_flops(config, lengths, kept.get(i, 1.0), skip) for i in total)


def decode_bytes(
    config: Any, lengths: Sequence[int], share: float, bytes_each: int, skip: str = "layer"
) -> float:
    """Bytes that one layer reads for one token of each row at these lengths, each kept with chance `share`.

    The weights of what is skipped are read when any row keeps its token (rows taken as independent); a row
    that runs reads the keys and values that it has stored.
    """
    parts = zip(layer_weights(config), shares(share, skip), strict=True)
    weights = sum(part * (1 - (1 - chance) ** len(lengths)) for part, chance in parts) * bytes_each
    attended, _ = shares(share, skip)
    read = sum(attended * stored_tokens(n, share, skip) for n in lengths)
    return weights + read * kv_token_bytes(config, bytes_each)


def step_bytes(
    config: Any, lengths: Sequence[int], kept: dict[int, float], bytes_each: int, skip: str = "layer"
) -> float:
    """Bytes that one decoding step of the whole model reads, output head included."""
    head = config.vocab_size * config.hidden_size * bytes_each
    layers = range(config.num_hidden_layers)
    return head + sum(decode_bytes(config, lengths, kept.get(i, 1.0), bytes_each, skip) for i in layers)


def ideal_decode(
    config: Any, lengths: Sequence[int], kept: dict[int, float], bytes_each: int, skip: str = "layer"
) -> float:
    """Dense / remaining bytes of one decoding step."""
    return step_bytes(config, lengths, {}, bytes_each) / step_bytes(config, lengths, kept, bytes_each, skip)
