"""Bytes that autograd keeps of a forward, found out on the meta device: nothing is computed.

Attention counts as its kernels keep it (queries, keys, values, result, log-sum-exps); the meta device has
none, and torch would keep products in fp32 there. Of frozen weights the inputs are not kept. The meta device
has no autocast either: what it does to weights in fp32 is done here.

Shape letters: B rows, T tokens, N query heads, G kv heads, H head dim.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from transformers import AttentionInterface, AttentionMaskInterface

from modlab.hf.attention_names import attention_named

NAME = "modlab_planned"
"""Under which transformers knows `planned_attention`."""

SHORT = 32  # tokens of the shortest of the three forwards from which bytes a token are extrapolated


MAPS = frozenset({F.linear, torch.matmul, torch.bmm, torch.addmm, torch.baddbmm, Tensor.matmul, Tensor.bmm})
"""What `torch.autocast` has read in 16 bit, of that which models do with wide tensors."""

NAMES = ("grouped_mm", "_grouped_mm")
GROUPED = frozenset({getattr(place, name) for place in (F, torch) for name in NAMES if hasattr(place, name)})
"""Fused experts, by the names that torch has for them: `torch.autocast` leaves them as they are."""


def kept_bytes(model: Any, frozen: bool, autocast: torch.dtype | None = None) -> float:
    """Bytes a token that the layers' forward keeps for the backward pass, all layers together, but for what
    grows with the square of the length and for what does not grow (copies of weights that were transposed).

    Args:
        model: a causal LM on the meta device.
        frozen: whether its weights get no gradient; the states that they read do all the same.
        autocast: the dtype of `torch.autocast`, inside which it runs; its weights are in fp32 then.
    """
    model.train().requires_grad_(not frozen)
    with attention_named([model.get_decoder().config], NAME), _states_learn(model):
        one, two, three = (_saved_bytes(model, times * SHORT, autocast) for times in (1, 2, 3))
    return (8 * two - 5 * one - 3 * three) / (2 * SHORT)  # of a + b n + c n² through all three, b


def planned_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
) -> tuple[Tensor, None]:
    """Keeps what an attention kernel does and computes nothing. Arguments and result as of transformers'
    attention functions; queries [B, N, T, H], keys and values [B, G, T, H]. Under autocast the first two come
    in fp32, for they were turned by sines in fp32, and are cast."""
    out: Tensor = _Planned.apply(query.to(value.dtype), key.to(value.dtype), value)
    return out, None


class _Planned(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:  # type: ignore[override]
        B, N, T, _ = query.shape
        out_BTNH = query.new_empty(B, T, N, value.shape[-1])
        sums_BNT = query.new_empty(B, N, T, dtype=torch.float32)
        ctx.save_for_backward(query, key, value, out_BTNH, sums_BNT)
        return out_BTNH

    @staticmethod
    def backward(ctx: Any, *by_out: Tensor) -> Any:  # type: ignore[override]
        raise NotImplementedError("a forward is planned, nothing is computed")


class _Grouped(torch.autograd.Function):
    """Keeps what `grouped_mm` does of states [rows, in] and weights [experts, in, out], of any dtype: torch
    has it on the meta device in 16 bit alone."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, weight: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(states, weight)
        return states.new_empty(len(states), weight.shape[-1])

    @staticmethod
    def backward(ctx: Any, *by_out: Tensor) -> Any:  # type: ignore[override]
        raise NotImplementedError("a forward is planned, nothing is computed")


# Additions under a new name.
AttentionInterface.register(NAME, planned_attention)
AttentionMaskInterface.register(NAME, AttentionMaskInterface()["sdpa"])


@contextlib.contextmanager
def _states_learn(model: Any) -> Iterator[None]:
    """Inside this block the layers' input takes part in the backward pass, as behind a router that learns."""

    def learn(_module: nn.Module, _args: Any, states: Tensor) -> Tensor:
        return states if states.requires_grad else states.requires_grad_()

    handle = model.get_input_embeddings().register_forward_hook(learn)
    try:
        yield
    finally:
        handle.remove()


class _Autocast(TorchFunctionMode):
    """Maps read copies in 16 bit, as under `torch.autocast`: one of each weight, others of states each time.

    Args:
        copies: of the weights.
    """

    def __init__(self, copies: dict[Tensor, Tensor], dtype: torch.dtype) -> None:
        super().__init__()
        self.copies, self.dtype = copies, dtype

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in GROUPED:
            return _Grouped.apply(*args[:2])
        if func not in MAPS:
            return func(*args, **(kwargs or {}))
        cast = {name: self._cast(value) for name, value in (kwargs or {}).items()}
        return func(*map(self._cast, args), **cast)

    def _cast(self, value: Any) -> Any:
        if not isinstance(value, Tensor) or value.dtype != torch.float32:
            return value
        return self.copies[value] if value in self.copies else value.to(self.dtype)


def _saved_bytes(model: Any, length: int, autocast: torch.dtype | None) -> int:
    weights = list(model.parameters())
    copies = {p: p.to(autocast) for p in weights} if autocast is not None else {}
    own = {tensor.untyped_storage()._cdata for tensor in (*weights, *copies.values())}
    inside = contextlib.nullcontext() if autocast is None else _Autocast(copies, autocast)
    seen: dict[int, tuple[torch.UntypedStorage, int]] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            seen[storage._cdata] = (storage, storage.nbytes())  # held, so that its address stays its own
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor), inside:
        ids = torch.zeros(1, length, dtype=torch.long, device="meta")
        mask = torch.zeros(1, 1, length, length, dtype=model.dtype, device="meta")  # given: none is looked at
        model.get_decoder()(ids, attention_mask=mask, use_cache=False)
    return sum(size for _, size in seen.values())
