"""The routing state of one converted model: who is kept, decided in one place, observable and steerable.

`model.mod` is a `Routing`. It holds the config and the live thresholds; hooks on the base decoder
(`routing/forward.py`) tell it about each forward (padding, positions, cache) and routed layers ask it which
tokens to keep.

What belongs to a forward (the call in progress, an override, open recordings) is the thread's that runs it:
two threads may compute on one model at once.

Shape letters: B rows, T tokens in, D model dim, G gates of a layer.
"""

from __future__ import annotations

import contextlib
import dataclasses
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from modlab import skips
from modlab.errors import ModlabError, check_count
from modlab.hf.attention_names import attention_name
from modlab.routing import rule
from modlab.routing.record import Decision, ForwardCall, OverrideFn, Recording
from modlab.routing.threshold import check_threshold
from modlab.routing.trained import Trained

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle
    from transformers import PreTrainedConfig, PreTrainedModel

    from modlab.cache.range import KVRange
    from modlab.config import KVCacheDtype, MoDConfig
    from modlab.routing.noise import Noise

eager = torch.compiler.disable(
    reason="modlab: routes change the shapes in a routed layer with every token, so it runs as it is."
)
"""`torch.compile` leaves these functions alone and compiles the model around them. Traced, a routed layer is
compiled again for every number of kept tokens (measured: 72 s instead of 11 s for the first forward of two
layers).
"""


class _OfThread(threading.local):
    """What a forward carries, by thread."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """As in a thread that has run nothing."""
        self.call: ForwardCall | None = None
        self.caller_mask: tuple[Any] | None = None
        self.logits_to_keep: Any = 0  # of the model's forward in progress; 0: all
        self.override: OverrideFn | None = None
        self.recordings: tuple[Recording, ...] = ()
        self.thresholds: dict[int, float] | None = None  # its own, in a block that takes them back
        self.config: MoDConfig | None = None  # the same
        self.masked = False  # everything runs through the masked reference, see execution/reference.py
        self.off = False  # routed modules run as dense ones, see `routing_off`
        self.generates = False  # inside `generate`: decides as in eval mode, whatever the mode is
        self.begun_with: MoDConfig | None = None  # inside `generate`: the settings that its cache is made for
        self.ranges: Mapping[int, Any] | None = None  # likewise, and while ranges are measured
        self.bypass = False  # the fast engine is at work: it makes its own `call` (see engine/)


class Routing:
    """Routing state of a converted model, reachable as `model.mod`.

    Attributes:
        config: the settings of the conversion; of the thread in `thresholds_restored`, where it set others
            (`modlab.set_keep_recent`), and in `generate`, which ends with those that it began with.
        skip: what a token may skip, `skips.named(config.skip)`.
        layers: indices of the routed layers, ascending.
        num_layers: number of decoder layers, routed or not.
        windows: sliding window by routed layer, in tokens; None where the layer attends to everything.
        gates: how many gates each routed layer has.
        gates_here: how many of them are about keys that this process holds; ranks may share the heads of a
            layer (tensor parallelism).
        common_ranges: by routed layer, what keys and values in fewer bits are measured against (`KVRange`,
            a module of the layer); empty where they are stored in the model's type. Replaced as a whole, by
            `modlab.set_kv_cache_dtype`; read `ranges`.
        thresholds: current p by routed layer; write through `modlab.set_threshold`. The same in all threads
            (`common_thresholds`), but for one in `thresholds_restored`: what it sets there is its own.
        what_if: training only. True: routed layers run on all tokens (the masked reference path), so that
            skipped tokens too tell the router what they would have gained. False: only kept tokens run
            (packed). With skip="kv" all run either way: True weighs keys, False hides those that are dropped.
        noise: training only: what the noise of the next forward's what-if pass follows from; None draws it
            from torch's generator.
        row_shift: training only: what is added to each row's threshold in the next forward, as a logit, [B];
            None adds nothing.
        row_recent: training only: the latest tokens that the next forward's rows see whether kept or not;
            None as configured.
        supports_flex: whether what-if passes may use transformers' flex attention on a GPU: by default where
            the model's class says that it can. Set to False to keep them on sdpa.
        source: the folder or hub id that the routers were loaded from, "" if they were not or
            have learned since.
        trained: what is known of the routers: data, and thresholds by KV saving; None if nothing is. Training
            clears it when routers first change, and writes it again where thresholds by saving were found; a
            loop of somebody else's clears it, too (`learning.py`).
        base_trained: whether other weights than the routers have been trained since the model was dense, or
            may have been: then routers alone are not the whole of it (`save_routers`).
    """

    def __init__(
        self,
        config: MoDConfig,
        layers: list[int],
        num_layers: int,
        windows: dict[int, int | None],
        gates: dict[int, int],
        model_config: PreTrainedConfig,
        supports_flex: bool = False,
        gates_here: dict[int, int] | None = None,
    ) -> None:
        self.common_config = config
        self.skip = skips.named(config.skip)
        self.supports_flex = supports_flex
        self.model_config = model_config
        self.layers = layers
        self.num_layers = num_layers
        self.windows = windows
        self.gates = gates
        self.gates_here = gates if gates_here is None else gates_here
        default = config.p if not isinstance(config.p, dict) else 0.5
        self.common_thresholds = dict.fromkeys(layers, default)
        if isinstance(config.p, dict):
            unrouted = sorted(set(config.p) - set(layers))
            if unrouted:
                raise ModlabError(
                    f"p names layer {unrouted[0]}, which is not routed; routed layers are {layers}."
                )
            self.common_thresholds.update(config.p)
        self.common_ranges: Mapping[int, KVRange] = {}
        self.base_trained = False
        self.source = ""
        self.trained: Trained | None = None
        self.what_if = True
        self.noise: Noise | None = None
        self.row_shift: Tensor | None = None
        self.row_recent: int | None = None
        self.compile_layers = False  # set while training asks for it
        self.hooks: list[RemovableHandle] = []
        self.of_thread = _OfThread()

    def set_config(self, config: MoDConfig) -> None:
        """Other settings from here on; in `thresholds_restored` this thread's alone. How keys and values are
        stored is not among them: `set_ranges`."""
        config.kv_cache_dtype = dtype_of(self.common_ranges)
        if self.of_thread.config is None:
            self.common_config = config
        else:
            self.of_thread.config = config

    def set_ranges(self, ranges: Mapping[int, KVRange]) -> None:
        """What keys and values in fewer bits are measured against from here on; none: they are stored in the
        model's type."""
        dtype = dtype_of(ranges)
        own, self.common_ranges = self.of_thread, ranges
        self.common_config = dataclasses.replace(self.common_config, kv_cache_dtype=dtype)
        if own.config is not None:
            own.config = dataclasses.replace(own.config, kv_cache_dtype=dtype)

    def forget_origin(self) -> None:
        """The routers are about to be others: nothing that is known of those before holds for them."""
        self.source, self.trained = "", None

    def __getstate__(self) -> dict[str, Any]:
        """A copy begins without a forward of its own: that state is its thread's."""
        return {name: value for name, value in self.__dict__.items() if name != "of_thread"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.of_thread = _OfThread()

    def __repr__(self) -> str:
        if self.skip.decides_itself:
            return f"Routing({self.skip.words.routed}, {self._where})"
        p = sorted({float(f"{value:.4g}") for value in self.thresholds.values()})
        said = f"p = {p[0]:g}" if len(p) == 1 else f"p from {p[0]:g} to {p[-1]:g}"
        return f"Routing({self.skip.words.routed} of {self._where}, {said})"

    @property
    def _where(self) -> str:
        every = len(self.layers) == self.num_layers
        return f"all {self.num_layers} layers" if every else f"layers {self.layers} of {self.num_layers}"

    @property
    def config(self) -> MoDConfig:
        own = self.of_thread
        return own.begun_with or own.config or self.common_config

    @property
    def recent(self) -> int | None:
        """Latest tokens that a token may attend to, kept or not; None where the skip knows no such."""
        return self.skip.recent(self.config)

    @property
    def most_recent(self) -> int | None:
        """The most that `keep_recent` may be: less than every routed layer's sliding window; None without
        any."""
        sliding = [window for window in self.windows.values() if window is not None]
        return min(sliding) - 1 if sliding else None

    @property
    def thresholds(self) -> dict[int, float]:
        """Current p by routed layer, in this thread."""
        own = self.of_thread.thresholds
        return self.common_thresholds if own is None else own

    @property
    def ranges(self) -> Mapping[int, KVRange]:
        """By routed layer what keys and values in fewer bits are measured against; empty where they are not
        stored so. In `generate` those that it began with."""
        own = self.of_thread.ranges
        return self.common_ranges if own is None else own

    @property
    def first_left(self) -> int:
        """Index of the first layer that prompt tokens leave out; the number of layers where they do not."""
        first = self.skip.first_left(self.config, self.num_layers)
        return self.num_layers if first is None else first

    @property
    def call(self) -> ForwardCall | None:
        """The forward in progress in this thread (or its latest one)."""
        return self.of_thread.call

    @property
    def masked(self) -> bool:
        """Whether this thread runs everything through the masked reference."""
        return self.of_thread.masked

    @property
    def is_off(self) -> bool:
        """Whether this thread runs the model as a dense one (`routing_off`)."""
        return self.of_thread.off

    @property
    def override(self) -> OverrideFn | None:
        """What decides in this thread instead of the thresholds, or None."""
        return self.of_thread.override

    @property
    def attention(self) -> str:
        """Name of the attention implementation in use; it may change after conversion."""
        return attention_name(self.model_config)

    def decide(
        self, layer_idx: int, router: Callable[[Tensor], Tensor], x_BTD: Tensor, training: bool
    ) -> Decision:
        """Which tokens of `x_BTD` layer `layer_idx` keeps in the current forward; training, prefill and
        decoding all come through here (docs/design.md, contract 2). Padding is never kept.

        Args:
            router: the layer's router, or what computes its logits fp32 [B, T] (or [B, T, G]) in another way.

        Raises:
            ModlabError: no forward of the model is in progress.
        """
        call, config = self.require_call(), self.config
        logit = router(x_BTD)
        gate = torch.sigmoid(logit)
        if call.override is not None:
            keep = _overridden(call.override, layer_idx, gate.detach(), call.position_ids)
        elif self.skip.decides_itself:
            keep = self.skip.decide(gate.detach(), logit.detach(), call, layer_idx)
        elif config.operator == "topk" and training and call.cache is None and not call.generates:
            first = rule.protected(call.position_ids, config.keep_first)
            keep = rule.top_k(logit.detach(), call.real, config.capacity) | rule.over(first, gate)
        else:
            p = call.threshold(layer_idx, gate)
            keep = rule.kept(gate.detach(), p, call.position_ids, config.keep_first)
        if not call.unpadded:
            keep = keep & rule.over(call.real, gate)
        decision = Decision(logit, gate, keep)
        call.decisions[layer_idx] = decision
        for recording, step in call.steps:
            here = step.real.device  # layers may be spread over devices, a recording is in one place
            step.gate[layer_idx] = (gate.detach() if recording.detach else gate).to(here)
            step.logit[layer_idx] = (logit.detach() if recording.detach else logit).to(here)
            step.keep[layer_idx] = decision.keep.to(here)
        return decision

    def require_call(self) -> ForwardCall:
        """The forward in progress; routed layers only make sense inside one."""
        if self.call is None:
            raise ModlabError(
                "a routed layer was called on its own: call the model (or its base decoder) instead."
            )
        return self.call

    @contextlib.contextmanager
    def apart(self, ranges: Mapping[int, Any], override: OverrideFn) -> Iterator[None]:
        """Inside this block a forward of this thread is nobody else's: no recording sees it, and blocks
        around it decide nothing about it.

        Args:
            ranges: what stands for `ranges`.
            override: decides what is kept.
        """
        here, before = self.of_thread, vars(self.of_thread).copy()
        here.reset()
        here.ranges, here.override = ranges, override
        try:
            yield
        finally:
            vars(here).update(before)

    @contextlib.contextmanager
    def turned(self, off: bool) -> Iterator[None]:
        """Inside this block this thread runs the model without its routing, or with it."""
        before = self.of_thread.off
        self.of_thread.off = off
        try:
            yield
        finally:
            self.of_thread.off = before

    @contextlib.contextmanager
    def within(self, call: ForwardCall | None) -> Iterator[None]:
        """Inside this block `call` is the forward in progress (None: the latest one that began)."""
        before = self.of_thread.call
        self.of_thread.call = call or before
        try:
            yield
        finally:
            self.of_thread.call = before


def _overridden(override: OverrideFn, layer_idx: int, gate: Tensor, position_ids: Tensor) -> Tensor:
    keep = override(layer_idx, gate, position_ids)
    if isinstance(keep, Tensor) and keep.shape == gate.shape[:2] and gate.dim() == 3:
        keep = keep[..., None].expand_as(gate)  # one answer for all gates of a layer
    if not isinstance(keep, Tensor) or keep.dtype != torch.bool or keep.shape != gate.shape:
        got = f"{keep.dtype} {tuple(keep.shape)}" if isinstance(keep, Tensor) else type(keep).__name__
        raise ModlabError(
            f"routing_override's function must return a bool tensor of shape {tuple(gate.shape)} for layer "
            f"{layer_idx}; it returned {got}."
        )
    return keep.to(gate.device)


def dtype_of(ranges: Mapping[int, KVRange]) -> KVCacheDtype:
    """The `kv_cache_dtype` of layers that store by these ranges."""
    return next((found.kv_cache_dtype for found in ranges.values()), "auto")


def is_converted(model: nn.Module) -> bool:
    """True if `modlab.convert` has routed this model (and `modlab.revert` has not undone it)."""
    return isinstance(getattr(model, "mod", None), Routing)


def routing_of(model: nn.Module) -> Routing:
    """`model.mod`, or an error that says to convert the model first."""
    if not is_converted(model):
        raise ModlabError(f"this {type(model).__name__} is dense: call modlab.convert(model) first.")
    routing: Routing = model.mod  # type: ignore[assignment]
    return routing


def gated_routing_of(model: nn.Module) -> Routing:
    """The same of a model in which gates decide, so that its thresholds mean something."""
    routing = routing_of(model)
    if routing.skip.decides_itself:
        raise ModlabError(
            f"with skip={routing.skip.name!r} no gate decides: thresholds and keep ratios mean nothing there."
        )
    return routing


def set_threshold(
    model: PreTrainedModel, p: float | dict[int, float], layers: Iterable[int] | None = None
) -> None:
    """Sets the threshold of all routed layers, of some, or each its own; the next forward uses it.

    Args:
        model: a converted model.
        p: one value in [0, 1), or ``{layer: value}``. Lower keeps more tokens.
        layers: routed layers that get the one value; all of them by default.

    Raises:
        ModlabError: p outside [0, 1), a layer that is not routed, a dict together with `layers`, or a skip to
            which thresholds mean nothing. Nothing is changed then.
    """
    routing = gated_routing_of(model)
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


def set_keep_recent(model: PreTrainedModel, tokens: int) -> None:
    """Sets how many of the latest tokens every token may attend to, kept or not (`MoDConfig.keep_recent`).
    The next prompt uses it; a `generate` under way ends with the number that it began with, and a cache from
    before is refused.

    At equal bytes more recent tokens and fewer earlier ones bring the model closer to its dense self on
    ordinary text and cost recall of what lies further back (docs/quality.md). In texts not much longer than
    so many tokens nothing is saved.

    Args:
        model: a converted model whose cache routing decides about (``skip="kv"``, ``"kv+prompt"``).
        tokens: at least 1, each token sees itself; less than a routed layer's sliding window.

    Raises:
        ModlabError: another skip, or tokens out of range. Nothing is changed then.
    """
    routing = routing_of(model)
    if routing.recent is None:
        raise ModlabError(
            f"with skip={routing.skip.name!r} no token is seen for being recent: keep_recent means nothing "
            "there."
        )
    check_count("keep_recent", tokens)
    for layer, window in sorted(routing.windows.items()):
        if window is not None and window <= tokens:
            raise ModlabError(
                f"keep_recent={tokens}: the sliding window of layer {layer} has {window} tokens, all of "
                "which would be recent. Give fewer, or leave that layer out of MoDConfig.layers."
            )
    config = dataclasses.replace(routing.config, keep_recent=tokens)
    if routing.skip.layers(config, routing.num_layers) != routing.layers:
        # Some were left out: those whose windows are short for so many tokens, which may be others now.
        config.layers = list(routing.layers)
    routing.set_config(config)


@contextlib.contextmanager
def thresholds_restored(model: PreTrainedModel) -> Iterator[None]:
    """Whatever happens inside, thresholds and `keep_recent` are as before afterwards. Other threads,
    which may generate meanwhile, do not see what this one sets."""
    routing = routing_of(model)
    own = routing.of_thread
    before = own.thresholds, own.config, own.begun_with
    own.thresholds, own.config, own.begun_with = dict(routing.thresholds), routing.config, None
    try:
        yield
    finally:
        own.thresholds, own.config, own.begun_with = before


@contextlib.contextmanager
def thresholds_restored_on_error(model: PreTrainedModel) -> Iterator[None]:
    """A block that fails or is stopped leaves thresholds and `keep_recent` as they were; other threads
    see its new ones once it has succeeded."""
    routing = routing_of(model)
    with thresholds_restored(model):
        before, config_before = dict(routing.thresholds), routing.config
        yield
        found, config = dict(routing.thresholds), routing.config
    # what the block left alone may have been set by another thread meanwhile
    if moved := {layer: p for layer, p in found.items() if p != before[layer]}:
        set_threshold(model, moved)
    if config is not config_before:
        routing.set_config(config)


@contextlib.contextmanager
def routing_override(model: PreTrainedModel, fn: OverrideFn) -> Iterator[None]:
    """Inside this block `fn` decides which tokens are kept, not the thresholds, in forwards of this thread.

    Args:
        model: a converted model.
        fn: ``fn(layer_idx, gate, position_ids) -> keep`` with gate fp32 [B, T], position_ids long [B, T]
            (index among the row's real tokens) and keep bool [B, T]; of a layer with several gates [B, T, G],
            or [B, T] for all of them. First tokens are not kept unless `fn` keeps them; padding is never kept
            whatever it says.

    Raises:
        ModlabError: the model is dense; in a forward, `fn` returns anything else.
    """
    of_thread = routing_of(model).of_thread
    before = of_thread.override
    of_thread.override = fn
    try:
        yield
    finally:
        of_thread.override = before


@contextlib.contextmanager
def routing_off(model: PreTrainedModel) -> Iterator[None]:
    """Inside this block the model computes, in this thread, what it would if it were dense: no router is
    asked, no gate enters an output, caches are the dense model's. The same weights, no second model.

    A base whose weights have been trained is dense with those weights.

    Raises:
        ModlabError: the model is dense already.
    """
    with routing_of(model).turned(off=True):
        yield


@contextlib.contextmanager
def record_routing(model: PreTrainedModel, detach: bool = True) -> Iterator[Recording]:
    """Records gates and keep masks of every forward of this thread inside this block.

    Args:
        model: a converted model.
        detach: False keeps the gates' autograd graph, for objectives on them.

    Yields:
        a `Recording`; ``recording.steps[i].gate[layer]`` is fp32 [B, T], or [B, T, G] where a layer has
        several gates.

    Raises:
        ModlabError: the model is dense.
    """
    of_thread = routing_of(model).of_thread
    recording = Recording(detach=detach)
    of_thread.recordings = (*of_thread.recordings, recording)
    try:
        yield recording
    finally:
        of_thread.recordings = tuple(r for r in of_thread.recordings if r is not recording)


@contextlib.contextmanager
def generating(model: PreTrainedModel) -> Iterator[None]:
    """Inside this block the model decides in this thread as in eval mode, also in train mode and without a
    cache: no what-if pass, no noise, no rule that looks ahead. What `set_keep_recent` and
    `set_kv_cache_dtype` say meanwhile, here or in another thread, is for the next block: the cache of this
    one was made for what was said before."""
    routing = routing_of(model)
    own = routing.of_thread
    before = own.generates, own.begun_with, own.ranges
    own.generates, own.begun_with, own.ranges = True, routing.config, routing.ranges
    try:
        yield
    finally:
        own.generates, own.begun_with, own.ranges = before


@contextlib.contextmanager
def masked_execution(model: PreTrainedModel) -> Iterator[None]:
    """Inside this block a converted model runs in this thread as the masked reference, without a cache."""
    of_thread = routing_of(model).of_thread
    before = of_thread.masked
    of_thread.masked = True
    try:
        yield
    finally:
        of_thread.masked = before
