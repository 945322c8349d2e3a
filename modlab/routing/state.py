"""The routing state of one converted model: who is kept, decided in one place, observable and steerable.

`model.mod` is a `Routing`. It holds the config and the live thresholds; hooks on the base decoder tell it
about each forward (padding, positions, cache) and routed layers ask it which tokens to keep.

Shape letters: B batch rows, T tokens in, K tokens seen including cached ones, D model dim.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from modlab.cache.ragged import RaggedCache
from modlab.config import MoDConfig
from modlab.errors import ModlabError
from modlab.hf.arguments import forward_signature
from modlab.hf.cache_argument import CACHE_ARGUMENTS, cache_argument, given_cache
from modlab.hf.model import beyond_context, context_length
from modlab.routing.threshold import check_threshold

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle
    from transformers import PreTrainedConfig, PreTrainedModel

OverrideFn = Callable[[int, Tensor, Tensor], Tensor]

eager = torch.compiler.disable(
    reason="modlab: routes change the shapes in a routed layer with every token, so it runs as it is."
)
"""`torch.compile` leaves these functions alone and compiles the model around them. Traced, a routed layer is
compiled anew for every number of kept tokens (measured: 72 s instead of 11 s for the first forward of two
layers).
"""


@dataclass
class Decision:
    """What one router said about one forward: logit and gate fp32 [B, T], keep bool [B, T]."""

    logit: Tensor
    gate: Tensor
    keep: Tensor


@dataclass
class RoutingStep:
    """One forward of the model, as the recorder saw it; dicts are keyed by layer index, tensors are [B, T].

    Attributes:
        gate: sigmoid of the router logit, fp32.
        logit: router logit, fp32.
        keep: True where the layer ran for the token (with skip="kv", where its keys and values stay).
        real: True where the token is not padding.
        position_ids: index of the token among the real tokens of its row, -1 for leading padding.
    """

    real: Tensor
    position_ids: Tensor
    gate: dict[int, Tensor] = field(default_factory=dict)
    logit: dict[int, Tensor] = field(default_factory=dict)
    keep: dict[int, Tensor] = field(default_factory=dict)


@dataclass
class Recording:
    """Every forward inside a `record_routing` block, oldest first."""

    steps: list[RoutingStep] = field(default_factory=list)
    detach: bool = True


@dataclass
class ForwardCall:
    """What the routed layers need to know about the forward they are part of.

    Attributes:
        real: bool [B, T], False for padding.
        position_ids: long [B, T], index among the real tokens of the row (-1 for leading padding).
        columns: long [T], absolute column of each token in the padded batch, cached columns counted.
        num_columns: columns seen once this forward is done.
        cache: the ragged cache that is written, or None.
        steps: the open recordings, each with its entry for this forward.
        thresholds, what_if, masked, override: the routing's, as they stood when the forward began: a
            gradient-checkpoint recompute decides as the forward did.
        padded: False where the caller gave no mask.
    """

    real: Tensor
    position_ids: Tensor
    columns: Tensor
    num_columns: int
    cache: RaggedCache | None
    steps: list[tuple[Recording, RoutingStep]]
    thresholds: dict[int, float]
    what_if: bool
    masked: bool
    override: OverrideFn | None
    padded: bool = True
    decisions: dict[int, Decision] = field(default_factory=dict)

    @functools.cached_property
    def has_gaps(self) -> bool:
        """Whether padding stands between the tokens of a row (one host sync a forward, where there is a mask
        and somebody asks)."""
        if not self.padded:
            return False
        behind_a_token = (self.real.cumsum(1) > 0) & ~self.real
        return bool(((behind_a_token.cumsum(1) > 0) & self.real).any())


class Routing:
    """Routing state of a converted model, reachable as `model.mod`.

    Attributes:
        config: the settings of the conversion.
        layers: indices of the routed layers, ascending.
        num_layers: number of decoder layers, routed or not.
        windows: sliding window by routed layer, in tokens; None where the layer attends to everything.
        thresholds: current p by routed layer; write through `modlab.set_threshold`.
        what_if: training only. True: routed layers run on all tokens (the masked reference path), so that
            skipped tokens too tell the router what they would have gained. False: only kept tokens run
            (packed). With skip="kv" all run either way: True weighs keys, False hides those that are dropped.
        supports_flex: whether what-if passes may use transformers' flex attention on a GPU: by default where
            the model's class says that it can. Set to False to keep them on sdpa.
        base_trained: whether other weights than the routers have been trained by modlab since the model was
            dense, or may have been: then routers alone are not the whole of it (`save_routers`).
    """

    def __init__(
        self,
        config: MoDConfig,
        layers: list[int],
        num_layers: int,
        windows: dict[int, int | None],
        model_config: PreTrainedConfig,
        supports_flex: bool = False,
    ) -> None:
        self.config = config
        self.supports_flex = supports_flex
        self.model_config = model_config
        self.layers = layers
        self.num_layers = num_layers
        self.windows = windows
        default = config.p if not isinstance(config.p, dict) else 0.5
        self.thresholds = dict.fromkeys(layers, default)
        if isinstance(config.p, dict):
            unrouted = sorted(set(config.p) - set(layers))
            if unrouted:
                raise ModlabError(
                    f"p names layer {unrouted[0]}, which is not routed; routed layers are {layers}."
                )
            self.thresholds.update(config.p)
        self.base_trained = False
        self.what_if = True
        self.masked = False  # run everything through the masked reference, see ops/reference.py
        self.compile_layers = False  # set while training asks for it, see train_compile.py
        self.bypass = False  # the fast engine is at work: it makes its own `call` (see engine/)
        self.override: OverrideFn | None = None
        self.recordings: list[Recording] = []
        self.call: ForwardCall | None = None
        self.hooks: list[RemovableHandle] = []
        self.caller_mask: tuple[Any] | None = None

    @property
    def attention(self) -> str:
        """Name of the attention implementation in use; it may change after conversion."""
        return self.model_config._attn_implementation or "eager"

    # ---- the decision function: training, prefill and decode all come through here (contract 2) ----

    def decide(
        self, layer_idx: int, router: Callable[[Tensor], Tensor], x_BTD: Tensor, training: bool
    ) -> Decision:
        """Which tokens of `x_BTD` layer `layer_idx` keeps in the current forward. Padding is never kept.

        Args:
            router: the layer's router, or what computes its logits fp32 [B, T] in another way.
        """
        call = self.require_call()
        logit = router(x_BTD)
        gate = torch.sigmoid(logit)
        if call.override is not None:
            keep = self._overridden(call.override, layer_idx, gate.detach(), call.position_ids)
        elif self.config.operator == "topk" and training:
            keep = self._top_k(logit.detach(), call.real)
        else:
            keep = gate.detach() >= call.thresholds[layer_idx]
        if call.override is None and self.config.keep_first:
            keep = keep | (call.position_ids < self.config.keep_first)
        decision = Decision(logit, gate, keep & call.real)
        call.decisions[layer_idx] = decision
        for recording, step in call.steps:
            step.gate[layer_idx] = gate.detach() if recording.detach else gate
            step.logit[layer_idx] = logit.detach() if recording.detach else logit
            step.keep[layer_idx] = decision.keep
        return decision

    def _top_k(self, logit: Tensor, real: Tensor) -> Tensor:
        """The `capacity` share of highest logits in each row, counted over that row's real tokens."""
        rank = (
            logit.masked_fill(~real, -torch.inf).argsort(dim=1, descending=True, stable=True).argsort(dim=1)
        )
        return rank < (real.sum(1, keepdim=True) * self.config.capacity).ceil()

    @staticmethod
    def _overridden(override: OverrideFn, layer_idx: int, gate: Tensor, position_ids: Tensor) -> Tensor:
        keep = override(layer_idx, gate, position_ids)
        if not isinstance(keep, Tensor) or keep.dtype != torch.bool or keep.shape != gate.shape:
            got = f"{keep.dtype} {tuple(keep.shape)}" if isinstance(keep, Tensor) else type(keep).__name__
            raise ModlabError(
                f"routing_override's function must return a bool tensor of shape {tuple(gate.shape)} for "
                "layer "
                f"{layer_idx}; it returned {got}."
            )
        return keep.to(gate.device)

    def require_call(self) -> ForwardCall:
        """The forward in progress; routed layers only make sense inside one."""
        if self.call is None:
            raise ModlabError(
                "a routed layer was called on its own: call the model (or its base decoder) instead."
            )
        return self.call

    @contextlib.contextmanager
    def within(self, call: ForwardCall | None) -> Iterator[None]:
        """Inside this block `call` is the forward in progress (None: the latest one that began)."""
        before = self.call
        self.call = call or before
        try:
            yield
        finally:
            self.call = before

    # ---- hooks on the model: a model of several parts makes its decoder's masks itself ----

    def enter_model(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook: notes the caller's attention_mask."""
        module_class: Any = type(module)
        bound = forward_signature(module_class).bind_partial(*args, **kwargs).arguments
        self.caller_mask = (bound.get("attention_mask", bound.get("kwargs", {}).get("attention_mask")),)

    def leave_model(self, module: nn.Module, args: Any, output: Any) -> None:
        """Forward hook: that mask is no other forward's."""
        self.caller_mask = None

    # ---- hooks on the base decoder ----

    @eager
    def enter(
        self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict]:
        """Forward pre-hook: works out padding and positions, and puts a ragged cache where a cache is asked
        for.
        """
        if self.bypass:
            return args, kwargs
        module_class: Any = type(module)
        bound = forward_signature(module_class).bind_partial(*args, **kwargs).arguments
        extra = bound.get("kwargs", {})

        def given(name: str) -> Any:
            return bound.get(name, extra.get(name))

        tokens = given("input_ids") if given("input_ids") is not None else given("inputs_embeds")
        if tokens is None:
            return args, kwargs  # the model's own error says it best
        if tokens.shape[1] == 0:
            raise ModlabError("the input holds no token: give the model at least one.")
        if self.attention == "flex_attention":
            raise ModlabError(
                "flex_attention compiles a kernel for every number of keys, and a routed layer has another "
                "one at each step: use model.set_attn_implementation('sdpa')."
            )
        cache, use_cache = given_cache(extra | bound), given("use_cache")
        if use_cache is None:
            use_cache = getattr(module.config, "use_cache", False)
        if cache is None and use_cache and not module.training:
            cache = RaggedCache(module.config, routing=self)
            kwargs = {name: value for name, value in kwargs.items() if name not in CACHE_ARGUMENTS}
            kwargs[cache_argument(module)] = cache
        elif cache is None and use_cache:
            kwargs = {**kwargs, "use_cache": False}  # a training forward has no use for a cache
        elif cache is not None and not isinstance(cache, RaggedCache):
            raise ModlabError(
                f"the cache is a {type(cache).__name__}, but a routed layer stores only the tokens it "
                "keeps: pass modlab.RaggedCache(model), or nothing and let the model make one."
            )
        if cache is not None:
            cache.check_batch(tokens.shape[0])
        seen = cache.get_seq_length() if cache is not None else 0
        context = context_length(module)
        if seen == 0 and context and tokens.shape[1] > context:
            raise ModlabError(
                f"the input has {tokens.shape[1]} tokens, the model's context is {context}: "
                f"{beyond_context(module)}."
            )
        self.call = self._new_call(tokens, given("attention_mask"), seen, cache)
        return args, kwargs

    def _new_call(self, tokens: Tensor, mask: Any, seen: int, cache: RaggedCache | None) -> ForwardCall:
        B, T = tokens.shape[:2]
        if mask is not None and not _is_padding_mask(mask) and self.caller_mask is not None:
            (mask,) = self.caller_mask
        columns = torch.arange(seen, seen + T, device=tokens.device)
        if mask is None:
            real = torch.ones(B, T, dtype=torch.bool, device=tokens.device)
            position_ids = columns.expand(B, T)
        elif _is_padding_mask(mask):
            if mask.shape[1] != seen + T:
                raise ModlabError(
                    f"attention_mask covers {mask.shape[1]} tokens, but {seen} are cached and {T} are new: "
                    "it must have "
                    f"shape [{B}, {seen + T}]."
                )
            mask = mask.to(tokens.device).bool()
            real = mask[:, seen:]
            position_ids = mask.long().cumsum(1)[:, seen:] - 1
        else:
            raise ModlabError(
                "a converted model takes a two-dimensional attention_mask [B, K] (1 = token, 0 = padding): "
                "routed layers build their own causal masks from it."
            )
        steps = [(recording, RoutingStep(real, position_ids)) for recording in self.recordings]
        for recording, step in steps:
            recording.steps.append(step)
        return ForwardCall(
            *(real, position_ids, columns, seen + T, cache, steps),
            thresholds=dict(self.thresholds),
            what_if=self.what_if,
            masked=self.masked,
            override=self.override,
            padded=mask is not None,
        )

    @eager
    def leave(self, module: nn.Module, args: Any, output: Any) -> None:
        """Forward hook: the forward is over. Its padding and positions stay for a gradient-checkpoint
        recompute.
        """
        if self.call is not None and not self.bypass:
            self.call.cache = None
            self.call.steps = []
            self.call.decisions = {}


def _is_padding_mask(mask: Any) -> bool:
    return isinstance(mask, Tensor) and mask.dim() == 2


def is_converted(model: nn.Module) -> bool:
    """True if `modlab.convert` has routed this model (and `modlab.revert` has not undone it)."""
    return isinstance(getattr(model, "mod", None), Routing)


def routing_of(model: nn.Module) -> Routing:
    """`model.mod`, or an error that says to convert the model first."""
    if not is_converted(model):
        raise ModlabError(f"this {type(model).__name__} is dense: call modlab.convert(model) first.")
    routing: Routing = model.mod  # type: ignore[assignment]
    return routing


def set_threshold(
    model: PreTrainedModel, p: float | dict[int, float], layers: Iterable[int] | None = None
) -> None:
    """Sets the threshold of all routed layers, of some, or each its own; the next forward uses it.

    Args:
        model: a converted model.
        p: one value in (0, 1), or ``{layer: value}``. Lower keeps more tokens.
        layers: routed layers that get the one value; all of them by default.

    Raises:
        ModlabError: p outside (0, 1), or a layer that is not routed. Nothing is changed then.
    """
    routing = routing_of(model)
    if isinstance(p, dict):
        if layers is not None:
            raise ModlabError("give either a dict of thresholds or one value with layers=..., not both.")
        new = {int(layer): check_threshold(value) for layer, value in p.items()}
    else:
        value = check_threshold(p)
        new = {int(layer): value for layer in (routing.layers if layers is None else layers)}
    for layer in new:
        if layer not in routing.thresholds:
            raise ModlabError(f"layer {layer} is not routed; routed layers are {routing.layers}.")
    routing.thresholds.update(new)


@contextlib.contextmanager
def thresholds_restored(model: PreTrainedModel) -> Iterator[None]:
    """Whatever happens inside, the thresholds are as before afterwards."""
    before = dict(routing_of(model).thresholds)
    try:
        yield
    finally:
        set_threshold(model, before)


@contextlib.contextmanager
def thresholds_restored_on_error(model: PreTrainedModel) -> Iterator[None]:
    """A block that fails or is stopped leaves the thresholds as they were."""
    before = dict(routing_of(model).thresholds)
    try:
        yield
    except BaseException:
        set_threshold(model, before)
        raise


@contextlib.contextmanager
def routing_override(model: PreTrainedModel, fn: OverrideFn) -> Iterator[None]:
    """Inside this block `fn` decides which tokens are kept, instead of the thresholds.

    Args:
        model: a converted model.
        fn: ``fn(layer_idx, gate, position_ids) -> keep`` with gate fp32 [B, T], position_ids long [B, T]
            (index among the row's real tokens) and keep bool [B, T]. First tokens are not kept unless `fn`
            keeps them; padding is never kept whatever it says.
    """
    routing = routing_of(model)
    before = routing.override
    routing.override = fn
    try:
        yield
    finally:
        routing.override = before


@contextlib.contextmanager
def record_routing(model: PreTrainedModel, detach: bool = True) -> Iterator[Recording]:
    """Records gates and keep masks of every forward inside this block.

    Args:
        model: a converted model.
        detach: False keeps the gates' autograd graph, for objectives on them.

    Yields:
        a `Recording`; ``recording.steps[i].gate[layer]`` is fp32 [B, T].
    """
    routing = routing_of(model)
    recording = Recording(detach=detach)
    routing.recordings.append(recording)
    try:
        yield recording
    finally:
        routing.recordings = [r for r in routing.recordings if r is not recording]
