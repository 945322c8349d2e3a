"""How many KV heads an attention has, and that its query heads can be kept from single keys of one of them.

Found out by running it on random numbers, as everything else about a part. A gate a KV head means: hidden
from the query heads of KV head g, a key of that head is as good as gone. So another key is put there, and the
output must not change.

Under tensor parallelism a process has some of the heads. Its router says something of all of them, as every
process's does, and the attention follows what is said of those that are here (`Heads.here`).

Shape letters: T tokens, N query heads, G KV heads, H head dim.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from modlab.execution.masks import as_attention_mask, of_keys, packed_mask
from modlab.hf.arguments import LayerArguments
from modlab.hf.ranks import mesh_of
from modlab.skips.plain import ProbeCache, cache_name

TOLERANCE = 1e-3
"""Of outputs in fp32, as a share of the largest; nothing but the order of a sum differs."""
COARSE = 0.05
"""The same in half precision."""


@dataclass(frozen=True)
class Heads:
    """The heads of one attention.

    Attributes:
        kv: G, those of all ranks; 1 where refused.
        query: N, those of this process; 1 where refused.
        here: which of the KV heads this process has; None: all.
        refusal: why its KV heads cannot have gates of their own; "" if they can.
    """

    kv: int = 1
    query: int = 1
    refusal: str = ""
    here: slice | None = None


class _Altered(ProbeCache):
    """Returns what it is given, another key and value in one place.

    Attributes:
        head: whose first key and value are others; None: no head's.
        shape: of the keys that it was given, (1, G, T, H).
    """

    def __init__(self, head: int | None) -> None:
        super().__init__()
        self.head = head
        self.shape: tuple[int, ...] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Keys and values [1, G, T, H] as they came, or altered."""
        self.shape = tuple(key_states.shape)
        if self.head is None:
            return key_states, value_states
        return self._altered(key_states), self._altered(value_states)

    def _altered(self, states: Tensor) -> Tensor:
        states = states.clone()
        states[:, self.head, 0] = 3 * states[:, self.head, 0].roll(1, -1) + 1
        return states


@torch.no_grad()
def heads_of(attention: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Heads:
    """The heads of `attention`, as it was called with a few tokens of one row and no cache.

    Every head has been tried, the first, the last and one between where there are many.
    """
    if hasattr(attention, "indexer"):
        return Heads(refusal="its sparse attention picks keys for all KV heads at once")
    arguments = LayerArguments(type(attention), args, kwargs)
    run = _Run(attention, arguments)
    cache = _Altered(None)
    try:
        run(cache, None)
    except Exception as problem:  # the class's own
        return Heads(refusal=f"it does not run with a cache: {type(problem).__name__}: {problem}")
    if cache.shape is None or len(cache.shape) != 4:
        return Heads(refusal="it hands its cache no keys by head")
    G = cache.shape[1]
    mesh = mesh_of(attention)
    ranks, rank = (mesh.size(), mesh.get_local_rank()) if mesh is not None else (1, 0)
    config = getattr(attention, "config", None)
    if ranks == 1 and G == 1 and getattr(config, "num_key_value_heads", G) != G:
        return Heads(refusal="it caches one latent for all heads (MLA), none of which can be dropped alone")
    claimed = _claimed(config, G)
    shared = ranks > 1 and claimed != G  # else each rank gathers the keys of all heads (OLMo 2)
    if shared and claimed != G * ranks:
        return Heads(refusal=f"which {G} of its {claimed} KV heads each of {ranks} ranks has is not known")
    for N in dict.fromkeys(_query_heads(attention, G, ranks)):
        if all(run.hides(head, G, N) for head in sorted({0, G // 2, G - 1})):
            here = slice(rank * G, (rank + 1) * G) if shared else None
            return Heads(claimed if shared else G, N, here=here)
    return Heads(refusal=f"a mask does not hide keys of one of its {G} KV heads alone")


def _claimed(config: Any, G: int) -> int:
    """KV heads of all ranks, as the config says; `G` where it does not."""
    names = ("num_key_value_heads", "num_kv_heads", "num_attention_heads", "n_head")
    said = (getattr(config, name, None) for name in names)
    return next((value for value in said if isinstance(value, int)), G)


def _query_heads(attention: nn.Module, G: int, ranks: int) -> Iterator[int]:
    """How many query heads there may be in this process, the likeliest first."""
    config = getattr(attention, "config", None)
    names = ("num_heads", "num_attention_heads", "n_heads", "n_head", "num_q_heads")
    groups = getattr(attention, "num_key_value_groups", None)
    if isinstance(groups, int):
        yield G * groups
    for holder in (attention, config):
        for name in names:
            whole = getattr(holder, name, None)
            for value in (whole, whole // ranks) if isinstance(whole, int) else ():
                if value >= G and value % G == 0:
                    yield value
    yield G


class _Run:
    """Runs of one attention on the same random numbers."""

    def __init__(self, attention: nn.Module, arguments: LayerArguments) -> None:
        self.attention, self.arguments = attention, arguments
        self.mask_name = arguments.mask_name()
        self.exact = arguments.hidden.dtype == torch.float32

    def __call__(self, cache: _Altered, hidden: Tensor | None) -> Tensor:
        """Its output [1, T, D] with this cache; `hidden`, bool [1, N, 1, T], is hidden from later tokens."""
        changes: dict[str, Any] = {cache_name(self.arguments): cache}
        if hidden is not None:
            assert self.mask_name is not None
            changes[self.mask_name] = self._mask(hidden)
        call: Callable[..., Any] = self.attention
        return self.arguments.run(call, changes)[0].float()

    def _mask(self, hidden: Tensor) -> Tensor:
        x = self.arguments.hidden
        columns = torch.arange(x.shape[1], device=x.device)[None]
        itself = torch.eye(x.shape[1], dtype=torch.bool, device=x.device)
        allowed = packed_mask(columns, columns) & (~hidden | itself)
        return as_attention_mask(allowed, "additive", x.dtype)

    def hides(self, head: int, G: int, N: int) -> bool:
        """Whether the first key of one KV head is gone once a mask hides it from that head's queries, and is
        not where it does not."""
        T, device = self.arguments.time, self.arguments.hidden.device
        first = torch.zeros(1, T, G, dtype=torch.bool, device=device)
        nothing = of_keys(first, N)
        first = first.clone()
        first[:, 0, head] = True
        hidden = of_keys(first, N)
        try:
            want, got = self(_Altered(None), hidden)[:, 1:], self(_Altered(head), hidden)[:, 1:]
            seen, other = self(_Altered(None), nothing)[:, 1:], self(_Altered(head), nothing)[:, 1:]
        except Exception:  # whatever it makes of so many heads
            return False
        scale = want.abs().max()
        same = (want - got).abs().max() <= (TOLERANCE if self.exact else COARSE) * scale
        return bool(same) and bool((seen - other).abs().max() > 4 * (want - got).abs().max())
