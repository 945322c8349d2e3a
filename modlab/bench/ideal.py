"""What the skipped work alone would give: floating-point operations in prefill, bytes in decoding.

The yardstick for a measured speed-up. Prefill is bound by arithmetic: linear maps and causal attention are
counted. Decoding waits for memory: the weights of the layers that run, and the keys and values they read.
Routers, norms, launches and whatever else a real machine spends are left out on purpose.

Shape letters: B rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from modlab.cache.dtypes import token_bytes
from modlab.cache.stored import recent_share
from modlab.config import MoDConfig
from modlab.skips import named

DENSE = MoDConfig(skip="layer")
"""Where all tokens are kept it makes no difference what a token may skip."""


def layer_weights(config: Any) -> tuple[int, int]:
    """Weights of one decoder layer's linear maps: (attention, gated MLP)."""
    size = head_size(config)
    attention = 2 * config.hidden_size * size * (config.num_attention_heads + config.num_key_value_heads)
    return attention, 3 * config.hidden_size * config.intermediate_size


def stored_tokens(length: float, keep_ratio: float, mod: MoDConfig) -> float:
    """Tokens of `length` whose keys and values are stored where routers keep the share `keep_ratio`."""
    return length * named(mod.skip).stored_share(keep_ratio, recent_share(mod, length))


def head_size(config: Any) -> int:
    """Size of one attention head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def kv_token_bytes(config: Any, bytes_each: int, mod: MoDConfig = DENSE) -> int:
    """Bytes of K and V of one token in one layer, `mod` being its conversion if it is routed."""
    heads, size = config.num_key_value_heads, head_size(config)
    return token_bytes(mod.kv_cache_dtype, heads, size, size, bytes_each)


def prefill_flops(config: Any, lengths: Sequence[int], share: float, mod: MoDConfig = DENSE) -> float:
    """Operations of one layer whose routers keep `share` of the tokens of rows of these lengths; `mod` says
    what the others skip."""
    width = config.num_attention_heads * head_size(config)
    attention, mlp = layer_weights(config)
    attended, mapped = named(mod.skip).runs(share)
    linear = 2 * sum(lengths) * (attended * attention + mapped * mlp)
    return linear + sum(4 * named(mod.skip).pairs(n, share, mod) * width for n in lengths)  # QK^T and AV


def left_flops(config: Any, lengths: Sequence[int]) -> float:
    """Operations of one layer that prompt tokens leave out: keys and values of all of them. What each row's
    last one runs there is left out: it is one token."""
    width = config.num_key_value_heads * head_size(config)
    return 4.0 * sum(lengths) * config.hidden_size * width


def ideal_prefill(
    config: Any, lengths: Sequence[int], kept: dict[int, float], mod: MoDConfig = DENSE
) -> float:
    """Dense / remaining operations of a prefill when layer i keeps the share `kept[i]` of the tokens."""
    total = config.num_hidden_layers
    dense = total * prefill_flops(config, lengths, 1.0)
    first_left = named(mod.skip).first_left(mod, total)
    run = total if first_left is None else first_left
    left = (total - run) * left_flops(config, lengths)
    return dense / (left + sum(prefill_flops(config, lengths, kept.get(i, 1.0), mod) for i in range(run)))


def decode_bytes(
    config: Any, lengths: Sequence[int], share: float, bytes_each: int, mod: MoDConfig = DENSE
) -> float:
    """Bytes that one layer reads for one token of each row at these lengths, each kept with chance `share`.

    The weights of what is skipped are read when any row keeps its token (rows taken as independent); a row
    that runs reads the keys and values that it has stored.
    """
    parts = zip(layer_weights(config), named(mod.skip).runs(share), strict=True)
    weights = sum(part * (1 - (1 - chance) ** len(lengths)) for part, chance in parts) * bytes_each
    attended, _ = named(mod.skip).runs(share)
    read = sum(attended * stored_tokens(n, share, mod) for n in lengths)
    return weights + read * kv_token_bytes(config, bytes_each, mod)


def step_bytes(
    config: Any, lengths: Sequence[int], kept: dict[int, float], bytes_each: int, mod: MoDConfig = DENSE
) -> float:
    """Bytes that one decoding step of the whole model reads, output head included."""
    head = config.vocab_size * config.hidden_size * bytes_each
    dense = (config.num_hidden_layers - len(kept)) * decode_bytes(config, lengths, 1.0, bytes_each)
    routed = (decode_bytes(config, lengths, share, bytes_each, mod) for share in kept.values())
    return head + dense + sum(routed)


def ideal_decode(
    config: Any, lengths: Sequence[int], kept: dict[int, float], bytes_each: int, mod: MoDConfig = DENSE
) -> float:
    """Dense / remaining bytes of one decoding step."""
    return step_bytes(config, lengths, {}, bytes_each) / step_bytes(config, lengths, kept, bytes_each, mod)
