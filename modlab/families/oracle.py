"""What a routed model must compute, from the dense model and the decisions alone.

The dense model runs once, as it is. Where a token must not see another's key, the key is hidden inside
torch's own functions while the attention of a routed layer calls them; what a token skips is passed by with a
forward hook. Where keys and values come from the state with which tokens leave, the dense layer runs on that
state first, to hear what its projections are given there. Nothing of `modlab.execution` takes part, neither
masks nor packing, so that a mistake there, which the masked reference and packed execution may share, shows
here.

Hidden are keys only: whatever else the model says about who may see whom (a sliding window, another document,
padding) stays as the dense model has it.

Shape letters: B rows, T tokens, K keys, N query heads, G gates of a layer, D model dim, P parallel streams.
Other letters: I features in, O features out.
"""

from __future__ import annotations

import contextlib
import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import DynamicCache

from modlab.hf.anatomy import attention_name, decoder_layers, mlp_name
from modlab.routing.state import routing_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from modlab.routing.record import RoutingStep

SOFTMAX = {F.softmax, torch.softmax, Tensor.softmax, torch.logsumexp, Tensor.logsumexp}
CACHES = ("cache", "past_key_values", "layer_past", "past_key_value")
"""Names under which attentions take their cache."""
TOPK = {torch.topk, Tensor.topk}

HIDES = ("layer", "attention", "kv", "kv+prompt")
"""Skips that hide keys; with the others every key stays."""
ALL_ATTEND = ("kv", "kv+prompt")
"""Skips with which every real token runs every part; the latest keys are seen whether kept or not."""
PASSES_LAYER = ("layer", "prompt")
"""Skips with which a token passes whole layers by."""


class NotHidden(Exception):
    """The oracle met no attention scores in which to hide keys, or scores of a form that it does not know."""


@dataclass
class Decisions:
    """What was decided in one forward, and what a decision means.

    Attributes:
        real: True where a token is no padding, [B, T].
        keep: True where a layer keeps the token, by layer index, [B, T] each; [B, T, G] where each KV head
            has a gate, or where one is for the attention and one for the MLP.
        gate: its gate, of the same shape.
        skip, form: of the MoDConfig: what a token skips, and how its gate enters.
        recent: where every token attends, the number of latest tokens that are seen whether or not they are
            kept.
        ends: with gate="paper" on whole layers, by layer index the submodules whose output the gate scales.
        ranges: by layer index, where keys and values are stored in fewer bits: the middle and the step of
            each channel of keys, and the step of each of values, [G, H].
        stored: then in which way (`MoDConfig.kv_cache_dtype`).
        copies: by layer index, for layers whose keys and values come from the state with which tokens entered
            the first of them: the parameters of the trained copies of each projection, by name.
    """

    real: Tensor
    keep: Mapping[int, Tensor]
    gate: Mapping[int, Tensor]
    skip: str
    form: str
    recent: int
    ends: Mapping[int, Sequence[str]] = field(default_factory=dict)
    copies: Mapping[int, Mapping[str, Mapping[str, Tensor]]] = field(default_factory=dict)
    ranges: Mapping[int, tuple[Tensor, Tensor, Tensor]] = field(default_factory=dict)
    stored: str = "auto"

    @classmethod
    def recorded(cls, model: PreTrainedModel, step: RoutingStep) -> Decisions:
        """Those of one forward of a converted model, as `record_routing` saw them."""
        config, layers = routing_of(model).config, list[Any](decoder_layers(model))
        ends = {index: layers[index].mod_plan.branch_ends for index in step.keep}
        copies = {
            index: {name: dict(copy.named_parameters()) for name, copy in found.named_children()}
            for index in step.keep
            if (found := getattr(layers[index], "mod_projections", None)) is not None
        }
        ranges = {
            index: (found.key_shift, found.key_step, found.value_step)
            for index in step.keep
            if (found := getattr(layers[index], "mod_int8_range", None)) is not None
        }
        said = config.skip, config.gate, config.keep_recent
        return cls(step.real, step.keep, step.gate, *said, ends, copies, ranges, config.kv_cache_dtype)

    def hidden(self, layer: int) -> Tensor:
        """True where a query must not see a key: bool [B, T, T], or [B, G, T, T] where it is another in each
        KV head. Every token sees itself."""
        keep = self.keep[layer]
        if keep.dim() == 3:
            return torch.stack([self._hidden(head_BT) for head_BT in keep.unbind(2)], dim=1)
        return self._hidden(keep)

    def _hidden(self, keep: Tensor) -> Tensor:
        T = self.real.shape[1]
        seen_BTT = keep[:, None, :] | torch.eye(T, dtype=torch.bool, device=keep.device)
        if self.skip in ALL_ATTEND:
            place_BT = self.real.cumsum(1)
            is_recent_BTT = place_BT[:, :, None] - place_BT[:, None, :] < self.recent
            seen_BTT = seen_BTT | (is_recent_BTT & self.real[:, None, :])
        return ~seen_BTT


@torch.no_grad()
def oracle_logits(dense: PreTrainedModel, decisions: Decisions, **inputs: Any) -> Tensor:
    """Logits [B, T, V] of the routed model, by the dense one.

    Args:
        dense: the model before conversion, in eval mode, with eager attention or sdpa.
        decisions: of one forward of the converted model without a cache, for the same inputs.
        inputs: what the model was called with.

    Raises:
        NotHidden: the attention of a routed layer works in a way that the oracle cannot look into.
    """
    hiding, entered = HidingKeys(), list[Tensor]()
    with contextlib.ExitStack() as stack:
        stack.enter_context(hiding)
        for index in decisions.keep:
            stack.enter_context(_routed(decoder_layers(dense)[index], index, decisions, hiding, entered))
        logits: Tensor = dense(**inputs, use_cache=False).logits
    return logits


class Rounding(DynamicCache):
    """Holds nothing; what an attention gives it comes back as few bits and a step for each head of each token
    can say it."""

    def __init__(self, stored: str, shift_GH: Tensor, key_step_GH: Tensor, value_step_GH: Tensor) -> None:
        super().__init__()
        self.stored = stored
        self.range = [x[:, None].float() for x in (shift_GH, key_step_GH, value_step_GH)]

    def given(self, attention: nn.Module, args: Any, kwargs: Any) -> Any:
        """In front of a call of `attention`: this is its cache."""
        bound = inspect.signature(type(attention).forward).bind(attention, *args, **kwargs)
        names = [name for name in CACHES if name in bound.signature.parameters] or CACHES[:1]
        by_name = {name: value for name, value in bound.arguments.items() if name not in ("self", "kwargs")}
        return (), {**by_name, **bound.arguments.get("kwargs", {}), names[0]: self}

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        shift, key_step, value_step = self.range
        if self.stored == "k6v4":  # of steps that are powers of two the root is one, too
            key_step, value_step = 2 ** torch.round(torch.log2(key_step) / 2), torch.ones_like(value_step)
        keys, values = (key_states.float() - shift) / key_step, value_states.float() / value_step
        if self.stored == "int8":
            keys, values = self._whole(keys), self._whole(values)
        else:
            keys, values = self._turned(keys, 64), self._turned(values, 16)
        return (shift + key_step * keys).to(key_states.dtype), (value_step * values).to(value_states.dtype)

    def update_indexer(self, indexer_key_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """By what sparse attention picks is as it was."""
        return indexer_key_states

    @staticmethod
    def _whole(x: Tensor) -> Tensor:
        """In 255 whole numbers of steps."""
        step = torch.clamp(x.abs().max(-1, keepdim=True).values / 127, min=2**-14).half().float()
        return torch.round(x / step).clamp(-127, 127) * step

    def _turned(self, x: Tensor, count: int) -> Tensor:
        """Turned, said in so many numbers, and turned back."""
        turn = self._turn(x.shape[-1]).to(x)
        return self._between(x @ turn, count) @ turn.T

    @staticmethod
    def _between(x: Tensor, count: int) -> Tensor:
        """In so many numbers of steps that end in a half."""
        most = count / 2 - 0.5
        step = torch.clamp(x.abs().max(-1, keepdim=True).values / most, min=2**-14).half().float()
        return (torch.round(x / step - 0.5) + 0.5).clamp(-most, most) * step

    @staticmethod
    def _turn(size: int) -> Tensor:
        """Entry i, j of a block of 2, 4, 8 ... is negative where i and j have an odd number of ones in
        common."""
        block = math.gcd(size, 2**20)
        signs = [[(-1.0) ** (i & j).bit_count() for j in range(block)] for i in range(block)]
        return torch.block_diag(*[torch.tensor(signs) / math.sqrt(block)] * (size // block))


class HidingKeys(TorchFunctionMode):
    """While `hidden` is set, keys are hidden inside the functions with which attentions weigh and pick them.

    Attributes:
        hidden: bool [B, T, T], [B, G, T, T], or None.
        met: how many times scores were met since it was set.
    """

    hidden: Tensor | None = None
    met = 0

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self.hidden is not None:
            if func is F.scaled_dot_product_attention:
                return self._attend(*args, **kwargs)
            if func in SOFTMAX or func in TOPK:
                scores = args[0] if args else kwargs["input"]
                given = args[1 if func in SOFTMAX else 2 :]
                dim = kwargs.get("dim", given[0] if given else -1)
                if _last(dim, scores) and (hidden := self._as(scores.shape)) is not None:
                    self.met += func in SOFTMAX
                    lowest = torch.finfo(scores.dtype).min
                    args, kwargs = args[1:], {k: v for k, v in kwargs.items() if k != "input"}
                    return func(scores.masked_fill(hidden, lowest), *args, **kwargs)
        return func(*args, **kwargs)

    def _attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        **kwargs: Any,
    ) -> Tensor:
        hidden = self._as((*query.shape[:-1], key.shape[-2]))
        if hidden is None:
            raise NotHidden(f"queries {list(query.shape)} on keys {list(key.shape)}")
        self.met += 1
        lowest = torch.finfo(query.dtype).min
        if attn_mask is None:
            seen = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool, device=query.device)
            attn_mask = seen.tril() if is_causal else seen
        if attn_mask.dtype == torch.bool:
            attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill(~attn_mask, lowest)
        mask = attn_mask.masked_fill(hidden, lowest)
        attended: Tensor = F.scaled_dot_product_attention(query, key, value, mask, dropout_p, **kwargs)
        return attended

    def _as(self, shape: Sequence[int]) -> Tensor | None:
        """`hidden` for scores of this shape, [B or B·N, ..., T, K]; None where they are no scores of keys.

        Columns beyond the T keys, such as an attention sink, stay seen."""
        assert self.hidden is not None
        hidden_BTK, B, T = self.hidden, self.hidden.shape[0], self.hidden.shape[-1]
        if len(shape) < 3 or shape[-2] not in (T, 1) or shape[-1] < T:
            return None
        if hidden_BTK.dim() == 4:
            return _by_head(F.pad(hidden_BTK, (0, shape[-1] - T)), shape)
        hidden_BTK = F.pad(hidden_BTK, (0, shape[-1] - T))
        if len(shape) == 3 and shape[0] != B and shape[0] % B == 0:
            return hidden_BTK.repeat_interleave(shape[0] // B, 0)
        if shape[0] != B:
            return None
        return hidden_BTK.view(B, *[1] * (len(shape) - 3), T, -1)


def _by_head(hidden_BGTK: Tensor, shape: Sequence[int]) -> Tensor | None:
    """For scores [B, N, T, K] or [B·N, T, K], where each N / G of the queries' heads share a KV head."""
    B, G = hidden_BGTK.shape[:2]
    N = shape[1] if len(shape) == 4 and shape[0] == B else shape[0] // B
    if len(shape) not in (3, 4) or N % G or not N:
        return None
    hidden_BNTK = torch.stack([hidden_BGTK[:, n * G // N] for n in range(N)], dim=1)
    return hidden_BNTK if len(shape) == 4 else hidden_BNTK.flatten(0, 1)


def _last(dim: Any, scores: Tensor) -> bool:
    dim = dim[0] if isinstance(dim, (tuple, list)) and len(dim) == 1 else dim
    return dim in (-1, scores.dim() - 1) and scores.is_floating_point()


@contextlib.contextmanager
def _routed(
    layer: nn.Module, index: int, decisions: Decisions, hiding: HidingKeys, entered: list[Tensor]
) -> Iterator[None]:
    """The hooks that make one dense layer a routed one.

    Args:
        entered: of this forward: the state with which tokens leave, once that is known.
    """
    keep, gate = decisions.keep[index], decisions.gate[index]
    skip, form = decisions.skip, decisions.form
    handles: list[Any] = []
    if skip in HIDES:
        attention = layer.get_submodule(_name(attention_name(layer)))
        handles += _hides(attention, index, decisions.hidden(index), hiding)
        if index in decisions.ranges:
            rounding = Rounding(decisions.stored, *decisions.ranges[index])
            handles.append(attention.register_forward_pre_hook(rounding.given, with_kwargs=True))
    if index in decisions.copies:
        handles += KeysFromElsewhere(index, decisions.copies[index], entered).hooks(layer)
    if form == "paper" and skip == "layer":
        for end in decisions.ends[index]:
            handles.append(_changes(layer.get_submodule(end), _scaled(gate)))
    if skip in PASSES_LAYER:
        weighs = form == "fused" and skip == "layer"
        handles += _passed_by(layer, keep, gate if weighs else torch.ones_like(gate))
    elif skip in ALL_ATTEND:
        name = _name(attention_name(layer))
        handles.append(_changes(layer.get_submodule(name), _scaled(decisions.real.float())))
    else:
        for place, name in enumerate(_branches(layer, skip)):
            keep_BT, gate_BT = (v[..., place] if v.dim() == 3 else v for v in (keep, gate))
            weight_BT = gate_BT if form in ("fused", "paper") else torch.ones_like(gate_BT)
            change = _scaled(torch.where(keep_BT, weight_BT, 0.0))
            handles.append(_changes(layer.get_submodule(name), change))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _branches(layer: nn.Module, skip: str) -> list[str]:
    """Names of the modules whose output a skipped token goes without, in the order of their gates."""
    attention, mlp = attention_name(layer), mlp_name(layer)
    one = {"attention": [attention], "mlp": [mlp]}
    return [_name(name) for name in one.get(skip, [attention, mlp])]


def _name(found: str | None) -> str:
    assert found is not None, "convert refuses a layer without"
    return found


def _hides(attention: nn.Module, index: int, hidden_BTT: Tensor, hiding: HidingKeys) -> list[Any]:
    """Keys are hidden while `attention` runs."""

    def begin(*_: Any) -> None:
        hiding.hidden, hiding.met = hidden_BTT, 0

    def end(*_: Any) -> None:
        hiding.hidden = None
        if not hiding.met:
            raise NotHidden(f"the attention of layer {index} weighs its keys by no function that is known")

    return [attention.register_forward_pre_hook(begin), attention.register_forward_hook(end)]


def _changes(module: nn.Module, change: Callable[[Tensor], Tensor]) -> Any:
    """What `module` returns (the first of a tuple) is changed."""

    def hook(_module: nn.Module, _args: Any, output: Any) -> Any:
        return (change(output[0]), *output[1:]) if isinstance(output, tuple) else change(output)

    return module.register_forward_hook(hook)


def _scaled(weight_BT: Tensor) -> Callable[[Tensor], Tensor]:
    def change(y: Tensor) -> Tensor:
        # Not a product alone: what a skipped token's attention saw may be no number.
        weight = _like(weight_BT, y).to(y.dtype)
        return torch.where(weight == 0, torch.zeros_like(y), weight * y)

    return change


class KeysFromElsewhere:
    """Has one dense layer project its keys and values from the state with which tokens entered the first
    layer that they may leave out, all three by trained copies of its projections.

    Args:
        index: of the layer.
        copies: their parameters, by name of the projection.
        entered: that state; the first layer adds it.
    """

    def __init__(self, index: int, copies: Mapping[str, Mapping[str, Tensor]], entered: list[Tensor]) -> None:
        self.index, self.copies, self.entered = index, copies, entered
        self.heard: dict[str, Tensor] = {}
        self.listens = False

    def hooks(self, layer: nn.Module) -> list[Any]:
        attention = layer.get_submodule(_name(attention_name(layer)))
        modules = {name: attention.get_submodule(name) for name in self.copies}
        return [
            layer.register_forward_pre_hook(self.listen, with_kwargs=True),
            *(module.register_forward_hook(self.projecting(name)) for name, module in modules.items()),
        ]

    def listen(self, layer: Any, args: Any, kwargs: Any) -> None:
        """Runs the layer on that state, to hear what its projections are given there."""
        first = _first_argument(layer)
        if not self.entered:
            self.entered.append((args[0] if args else kwargs[first]).clone())
        x = self.entered[0].clone()
        self.heard, self.listens = {}, True
        layer.forward(*((x, *args[1:]) if args else ()), **(kwargs if args else {**kwargs, first: x}))
        self.listens = False
        if not {"k_proj", "v_proj"} <= set(self.heard):
            raise NotHidden(f"layer {self.index} projects no keys and values of its own")

    def projecting(self, name: str) -> Callable[..., Any]:
        def hook(module: Any, args: Any, _output: Any) -> Any:
            if self.listens:
                self.heard[name] = args[0].clone()
                return None
            return _copied(module, self.copies[name], args[0] if name == "q_proj" else self.heard[name])

        return hook


def _copied(base: Any, copy: Mapping[str, Tensor], x_BTI: Tensor) -> Tensor:
    """What a trained copy says [B, T, O]: a map of its own, or a low-rank addition to the base's."""
    if "weight" in copy:
        return F.linear(x_BTI, copy["weight"], copy.get("bias"))
    projected: Tensor = base.forward(x_BTI)
    return projected + x_BTI @ (copy["up"] @ copy["down"]).T


def _passed_by(layer: nn.Module, keep_BT: Tensor, gate_BT: Tensor) -> list[Any]:
    """Skipped tokens leave the layer as they came; kept ones between that and its output, by their gate."""
    before: list[Tensor] = []
    first = _first_argument(layer)

    def note(_module: nn.Module, args: Any, kwargs: Any) -> None:
        before[:] = [(args[0] if args else kwargs[first]).clone()]

    def change(y: Tensor) -> Tensor:
        x = before.pop()
        gate = _like(gate_BT, y).to(y.dtype)
        return torch.where(_like(keep_BT, y), x + gate * (y - x) if (gate != 1).any() else y, x)

    return [layer.register_forward_pre_hook(note, with_kwargs=True), _changes(layer, change)]


def _first_argument(layer: nn.Module) -> str:
    """The name under which a layer takes hidden states."""
    return list(inspect.signature(type(layer).forward).parameters)[1]  # after self


def _like(value_BT: Tensor, y: Tensor) -> Tensor:
    """One value a token, to be multiplied with y: [B, T, ...], [P, B, T, D] or [B·T, D]."""
    B, T = value_BT.shape
    if y.dim() == 2 and y.shape[0] == B * T:
        return value_BT.reshape(B * T, 1)
    if tuple(y.shape[:2]) == (B, T):
        return value_BT.view(B, T, *[1] * (y.dim() - 2))
    if y.dim() == 4 and tuple(y.shape[1:3]) == (B, T):
        return value_BT[None, :, :, None]
    raise NotHidden(f"an output of shape {list(y.shape)} for {B} rows of {T} tokens")
