"""How much a later copy of a text reads each key of the first: what keys are worth, without training.

A row is [text, "repeat it", text]. The score of a key of the first copy, for a query head: the largest share
of attention that it gets from a token of the second copy, times the size of its value behind the output
projection, over the size of the state that reads it. Its logarithm is what routers regress (published as
KVzap, arXiv 2601.07891).

One mechanism serves every architecture: while an attention runs, the functions by which it weighs its keys
(scaled dot products, softmax) are watched. Forward passes only, so that quantized bases can be scored too.

Shape letters: B rows, T tokens of a row, C tokens of its first copy, R tokens that read, K keys, N query
heads, G kv heads, H head dim, D model dim, A gates of a layer.
"""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from modlab.errors import ModlabError
from modlab.execution.routed import CALL
from modlab.hf.arguments import LayerArguments

LEAST = -20.0
"""Log scores below are all alike: keys that nobody reads."""

CHUNK = 2**24
"""Attention scores that are in memory at once: 64 MiB."""

SOFTMAX = (F.softmax, torch.softmax, Tensor.softmax)
PRODUCTS = (torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.bmm, Tensor.bmm)


@dataclass
class Readers:
    """Who reads the first copy.

    Attributes:
        first: place of the first token that reads; all after it do.
        least_age: a key is read by tokens at least so many places behind it.
    """

    first: int
    least_age: int = 0


@dataclass
class Attended:
    """What one attention did, as it was seen.

    Attributes:
        best_BNC: largest log share of attention, over the size of the reading state.
        value: [B, N or G, T, H]; None where it was not found.
    """

    best_BNC: Tensor
    value: Tensor | None


class Watch(TorchFunctionMode):
    """Sees how an attention weighs its keys, from `begin` to `end`."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Attended | None = None
        self.tracked: Tensor | None = None  # weights on their way to the product with the values
        self.active = False
        self.length = 0
        self.readers = Readers(0)
        self.read_by_BT = torch.empty(0)

    def begin(self, read_by_BT: Tensor, length: int, readers: Readers) -> None:
        """An attention is about to run.

        Args:
            read_by_BT: log size of each token's state, fp32.
            length: C.
        """
        self.seen = self.tracked = None
        self.read_by_BT, self.length, self.readers = read_by_BT, length, readers
        self.active = True

    def end(self) -> Attended | None:
        """It has run; None if nothing was seen."""
        self.active, self.tracked = False, None
        return self.seen

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if not self.active:
            return func(*args, **kwargs)
        if func is F.scaled_dot_product_attention:
            self._of_products(*args, **kwargs)
        if self.tracked is not None and args and args[0] is self.tracked:
            return self._followed(func, args, kwargs)
        out = func(*args, **kwargs)
        if func in SOFTMAX:
            self._of_weights(out)
        return out

    def _of_products(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        **_: Any,
    ) -> None:
        B, T = self.read_by_BT.shape
        if query.dim() != 4 or query.shape[0] != B or query.shape[2] != T:
            return
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        self.active = False  # what follows is ours
        rows = [
            _best(
                query[b], key[b], None if attn_mask is None else attn_mask[b % len(attn_mask)],
                is_causal, scale, self.read_by_BT[b], self.length, self.readers,
            )
            for b in range(B)
        ]  # fmt: skip
        self.active = True
        self.seen = Attended(torch.stack(rows), value)

    def _of_weights(self, weights: Tensor) -> None:
        """Of an attention in plain torch: softmax over keys [B, N, T, K] or [B·N, T, K]."""
        (B, T), first = self.read_by_BT.shape, self.readers.first
        if weights.dim() not in (3, 4) or weights.shape[-2] != T or weights.shape[-1] < T:
            return
        self.active = False
        log_BNRC = weights.reshape(B, -1, *weights.shape[-2:])[:, :, first:, : self.length].float().log()
        log_BNRC = log_BNRC - self.read_by_BT[:, None, first:, None]
        log_BNRC = log_BNRC.masked_fill(
            _too_near(first, T, self.length, self.readers, weights.device), -math.inf
        )
        self.active = True
        self.seen, self.tracked = Attended(log_BNRC.amax(2), None), weights

    def _followed(self, func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
        """Dropout and casts give the weights another body; the product shows the values."""
        out = func(*args, **kwargs)
        if func in PRODUCTS and isinstance(args[1], Tensor) and self.seen is not None:
            B = len(self.read_by_BT)
            self.seen.value = args[1].reshape(B, -1, *args[1].shape[-2:])
            self.tracked = None
        elif isinstance(out, Tensor) and out.numel() == args[0].numel():
            self.tracked = out
        return out


def _too_near(begin: int, end: int, length: int, readers: Readers, device: torch.device) -> Tensor:
    """True where a key [length] is too young for a reader [begin:end] to count."""
    at = torch.arange(begin, end, device=device)[:, None]
    return at - torch.arange(length, device=device) < readers.least_age


def _best(
    q_NTH: Tensor, k_GTH: Tensor, mask: Tensor | None, causal: bool, scale: float,
    read_by_T: Tensor, length: int, readers: Readers,
) -> Tensor:  # fmt: skip
    """Largest log share of attention over the size of the reading state, fp32 [N, length], of one row."""
    (N, T, _), G = q_NTH.shape, k_GTH.shape[0]
    q_NTH = q_NTH * scale
    best_NC = torch.full((N, length), -math.inf, device=q_NTH.device)
    step = max(1, CHUNK // (N * T))
    for a in range(readers.first, T, step):
        z = min(T, a + step)
        K = z if causal else T
        q = q_NTH[:, a:z].reshape(G, -1, q_NTH.shape[-1])
        s_NRK = (q @ k_GTH[:, :K].transpose(-1, -2)).view(N, z - a, K).float()
        if causal:
            s_NRK[:, :, a:].masked_fill_(_later(z - a, q.device), -math.inf)
        if mask is not None:
            seen = mask[:, a:z, :K]
            s_NRK = s_NRK.masked_fill(~seen, -math.inf) if seen.dtype == torch.bool else s_NRK + seen
        over = s_NRK.logsumexp(-1) + read_by_T[a:z]
        share_NRC = s_NRK[:, :, :length] - over[:, :, None]
        if readers.least_age:
            share_NRC.masked_fill_(_too_near(a, z, length, readers, q.device), -math.inf)
        best_NC = torch.maximum(best_NC, share_NRC.amax(1).nan_to_num(nan=-math.inf))
    return best_NC


def _later(count: int, device: torch.device) -> Tensor:
    """True where a key comes after a query, bool [count, count]."""
    return torch.ones(count, count, dtype=torch.bool, device=device).triu(1)


class OutputProjection:
    """What an attention multiplies its heads' results by: found while it runs, as the first module with
    weights that is given all heads of a token side by side.

    Attributes:
        gram_NHH: of each head, o oᵀ with o [H, D]; None while it has not been found.
    """

    def __init__(self) -> None:
        self.gram_NHH: Tensor | None = None
        self.given: list[tuple[nn.Module, Tensor]] = []

    def hooks(self, attention: nn.Module, watch: Watch) -> list[Any]:
        """Watches the modules inside; the handles take the hooks away."""

        def note(module: nn.Module, args: Any) -> None:
            if self.gram_NHH is not None or not watch.active or watch.seen is None or not args:
                return
            if isinstance(args[0], Tensor) and args[0].is_floating_point():
                self.given.append((module, args[0]))

        inner = [
            m
            for m in attention.modules()
            if m is not attention and next(m.parameters(False), None) is not None
        ]
        return [m.register_forward_pre_hook(note) for m in inner]

    def look(self, heads: int, entries: int) -> None:
        """Tries what was noted, for `heads` of `entries` each."""
        width, noted = heads * entries, self.given
        self.given = []
        for module, x in noted:
            if self.gram_NHH is not None or x.shape[-1] != width:
                continue
            eye = torch.eye(width, dtype=x.dtype, device=x.device)
            try:
                o = (module(eye) - module(torch.zeros_like(eye[:1]))).float()
            except RuntimeError:  # wants another shape: no linear map of one token
                continue
            if o.dim() == 2 and len(o) == width:
                o_NHD = o.view(heads, entries, -1)
                self.gram_NHH = o_NHD @ o_NHD.transpose(-1, -2)

    def log_size(self, value: Tensor, heads: int, length: int) -> Tensor:
        """Log size of what each value of the first copy adds to the residual stream, fp32 [B, N, length]."""
        v_BNCH = value[:, :, :length].float()
        if v_BNCH.shape[1] != heads:
            v_BNCH = v_BNCH.repeat_interleave(heads // v_BNCH.shape[1], 1)
        squared = (v_BNCH.square() if self.gram_NHH is None else (v_BNCH @ self.gram_NHH) * v_BNCH).sum(-1)
        return squared.clamp(min=1e-12).sqrt().log()


class LayerScores:
    """Scores of one routed layer, handed over as its attention has run.

    Args:
        layer: the decoder layer.
        attention: the module inside.
        window: the layer's sliding window in tokens, or None.
        recent: tokens that are attended to whatever routers say.
        gates: A.
        take: gets the states that the layer reads [B, T, D] and log scores fp32 [B, C, A].
    """

    def __init__(
        self, layer: nn.Module, attention: nn.Module, window: int | None, recent: int, gates: int,
        take: Callable[[Tensor, Tensor], None],
    ) -> None:  # fmt: skip
        self.layer, self.attention, self.take = layer, attention, take
        self.window, self.recent, self.gates = window, recent, gates
        self.projection = OutputProjection()
        self.state_BTD: Tensor | None = None

    def hooks(self, watch: Watch, length: int) -> list[Any]:
        """Of rows whose first copy has `length` tokens; forwards of other threads pass them by."""
        mine = threading.get_ident()
        B, T = watch.read_by_BT.shape
        shape = (B, T)
        dense_class: Any = getattr(self.layer, "dense_class", type(self.layer))

        def enter(_module: Any, args: Any, kwargs: dict[str, Any]) -> None:
            if threading.get_ident() == mine:
                own = {name: value for name, value in kwargs.items() if name != CALL}
                self.state_BTD = LayerArguments(dense_class, args, own, shape).residual_BTD

        def begin(_module: Any, _args: Any) -> None:
            if threading.get_ident() == mine and self.state_BTD is not None:
                T = self.state_BTD.shape[1]
                read_by = self.state_BTD.float().norm(dim=-1).clamp(min=1e-12).log()
                watch.begin(read_by, length, self._readers(T, length))

        def end(_module: Any, _args: Any, _output: Any) -> None:
            if threading.get_ident() == mine and self.state_BTD is not None:
                self._hand_over(watch.end(), length)

        return [
            self.layer.register_forward_pre_hook(enter, with_kwargs=True),
            self.attention.register_forward_pre_hook(begin),
            self.attention.register_forward_hook(end),
            *self.projection.hooks(self.attention, watch),
        ]

    def _readers(self, T: int, length: int) -> Readers:
        """The second copy; where a sliding window does not reach back to the first, all that come later than
        the recent tokens."""
        if self.window is not None and self.window < T - length:
            return Readers(self.recent, self.recent)
        return Readers(T - length)

    def _hand_over(self, seen: Attended | None, length: int) -> None:
        state, self.state_BTD = self.state_BTD, None
        if seen is None:
            raise ModlabError(
                f"{type(self.attention).__name__} weighs its keys by no function that is known: its routers "
                "cannot be fitted to scores. Train them (modlab.train)."
            )
        best_BNC, N = seen.best_BNC, seen.best_BNC.shape[1]
        if seen.value is not None and N % seen.value.shape[1] == 0:
            self.projection.look(N, seen.value.shape[-1])
            best_BNC = best_BNC + self.projection.log_size(seen.value, N, length)
        if N % self.gates:
            raise ModlabError(
                f"{type(self.attention).__name__} has {N} query heads, which {self.gates} gates cannot share "
                "evenly: convert with gates='layer'."
            )
        y_BAC = best_BNC.view(len(best_BNC), self.gates, -1, length).amax(2).clamp(min=LEAST)
        assert state is not None
        self.take(state, y_BAC.transpose(1, 2))


@contextlib.contextmanager
def watched(layers: list[LayerScores], shape: tuple[int, int], length: int) -> Iterator[None]:
    """Inside this block forwards of this thread on [B, T] tokens hand scores over.

    Args:
        shape: (B, T).
        length: tokens of the first copy, with which a row begins, and of the second, with which it ends.
    """
    watch = Watch()
    watch.read_by_BT = torch.empty(shape, device="meta")
    handles: list[Any] = []
    try:
        for layer in layers:
            handles += layer.hooks(watch, length)
        with watch:
            yield
    finally:
        for handle in handles:
            handle.remove()
