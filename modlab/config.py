"""What to route and how: the settings of a conversion, as one dataclass that is saved next to the weights."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from numbers import Real
from typing import Any, Literal, get_args

from modlab import skips
from modlab.errors import ModlabError
from modlab.routing.threshold import check_threshold

Operator = Literal["threshold", "topk"]
Gate = Literal["straight-through", "paper", "fused"]
Gates = Literal["layer", "kv_head"]
KVCacheDtype = Literal["auto", "int8", "k6v4"]
KV_BITS: dict[str, str] = {"int8": "eight bits", "k6v4": "six bits (keys) and four (values)"}
"""In how many bits keys and values are stored, in words; "auto" has no word, as it is what the model has."""

FORMAT_VERSION = 1
LARGEST = 2**31 - 1
"""Of whole numbers: what every device counts to."""
WIDEST = 2**16
"""Of a router's hidden layer and a projection's rank: more is a slip, or a damaged file that asks for all the
memory there is."""


@dataclass
class MoDConfig:
    """Settings of a Mixture-of-Depths conversion.

    The default changes no logit: every gate starts open. What it routes is the cache, which on this project's
    own models costs the least loss for the memory saved (docs/defaults.md has a figure for each field).

    Attributes:
        layers: which decoder layers get a router: ``"inner"`` (all but the first two and the last; all of
            fewer than six), ``"alternate"`` (every other layer, from layer 1; MoDification section 3),
            ``"all"``, or explicit indices (negative ones count from the end). In hybrids where none of the
            layers so named has softmax attention, every layer that has.
        operator: ``"threshold"`` keeps a token where its gate is at least `p`: per token, causal, independent
            of the batch. ``"topk"`` is the Mixture-of-Depths baseline (Raposo et al. 2024): in training each
            row keeps its `capacity` share of highest gates; in evaluation, where ranking would look into the
            future, the gate is compared with `p` (train it with the auxiliary BCE objective so that this is
            meaningful).
        p: threshold in [0, 1), one value or ``{layer: value}``. Live: `modlab.set_threshold` changes it at
            any time.
        skip: what a skipped token leaves out: ``"kv"``, its place in the cache (it passes the layer in full,
            but its keys and values are dropped once `keep_recent` tokens have come, itself counted), the
            whole ``"layer"``, its ``"attention"``, its ``"mlp"``; attention and MLP with its keys and values
            ``"written"`` for others all the same, or these ``"sublayers"`` apart; or, for tokens of a
            ``"prompt"`` but the last of each row, all layers above `leave_after`. All but the first save
            operations. ``"kv+prompt"`` is the first and the last at once.
        gate: how the gate g enters the output of a kept token.
            ``"straight-through"``: not at all in value, g only receives the gradient (lossless on
                conversion);
            ``"paper"``: u = x + g·Attn(Norm(x)), x' = u + g·MLP(Norm(u));
            ``"fused"``: x' = x + g·(Layer(x) - x), which needs no separable branches.
        capacity: share of tokens that the top-k operator keeps in training, in (0, 1].
        keep_recent: with ``skip="kv"`` and ``"kv+prompt"``, how many of the latest tokens every token may
            attend to, kept or not; other skips do not read it. Texts that are not longer save nothing; layers
            whose sliding window is not longer are not routed.
        keep_first: that many first real tokens of every row are always kept (attention sinks).
        leave_after: with ``skip="prompt"`` or ``"kv+prompt"``, the share of layers that all tokens run, in
            (0, 1).
        leave_rank: likewise, the rank of what is added to the projections of the layers above; 0 trains whole
            copies of them.
        init_gate: gate value of every token right after conversion, in (0, 1).
        gates: ``"layer"``: one gate a layer decides for all of its KV heads. ``"kv_head"``, with
            ``skip="kv"`` or ``"kv+prompt"``: each KV head has a gate of its own, and keeps other tokens than
            its neighbours.
        router_hidden: units of a hidden layer inside each router, which all gates of a layer share; 0: a
            router is linear.
        kv_cache_dtype: how routed layers store keys and values, with ``skip="kv"`` or ``"kv+prompt"``.
            ``"auto"``: in the model's own type. ``"int8"``: in eight bits, with one step a token and KV head,
            about half of the bytes. ``"k6v4"``: keys in six bits and values in four, about a third of them;
            no fast generation yet. With either, attention in evaluation sees the rounded numbers, with a
            cache and without; training and passes with routing off do not. Live:
            `modlab.set_kv_cache_dtype`.
    """

    layers: str | Sequence[int] = "inner"
    operator: Operator = "threshold"
    p: float | dict[int, float] = 0.5
    skip: str = "kv"
    gate: Gate = "straight-through"
    capacity: float = 0.25
    keep_recent: int = 128
    keep_first: int = 4
    leave_after: float = 2 / 3
    leave_rank: int = 0
    init_gate: float = 0.88
    gates: Gates = "layer"
    router_hidden: int = 0
    kv_cache_dtype: KVCacheDtype = "auto"
    format_version: int = field(default=FORMAT_VERSION, repr=False)

    def __post_init__(self) -> None:
        self._check_types()
        choices = {"operator": Operator, "gate": Gate, "gates": Gates, "kv_cache_dtype": KVCacheDtype}
        for name, allowed in choices.items():
            value = getattr(self, name)
            if value not in get_args(allowed):
                raise ModlabError(
                    f"MoDConfig({name}={value!r}): choose one of {', '.join(get_args(allowed))}."
                )
        if isinstance(self.layers, str):
            if self.layers not in ("alternate", "inner", "all"):
                raise ModlabError(
                    f"MoDConfig(layers={self.layers!r}): use 'inner', 'alternate', 'all' or a list of layer "
                    "indices."
                )
        else:
            self.layers = [_whole("layers", i) for i in self.layers]
            if not self.layers:
                raise ModlabError("MoDConfig(layers=[]): name at least one layer, or use 'inner'.")
        if isinstance(self.p, dict):
            self.p = {_whole("p", layer): check_threshold(p) for layer, p in self.p.items()}
        else:
            self.p = check_threshold(self.p)
        if not 0 < self.capacity <= 1:
            raise ModlabError(
                f"MoDConfig(capacity={self.capacity}): the share of kept tokens must lie in (0, 1]."
            )
        if self.keep_first < 0:
            raise ModlabError(f"MoDConfig(keep_first={self.keep_first}): must be 0 or more tokens.")
        if self.keep_recent < 1:
            raise ModlabError(
                f"MoDConfig(keep_recent={self.keep_recent}): at least 1, each token attends to itself."
            )
        if not 0 <= self.router_hidden <= WIDEST:
            raise ModlabError(f"MoDConfig(router_hidden={self.router_hidden}): 0 to {WIDEST:,} units.")
        if self.gates == "kv_head" and not skips.named(self.skip).by_head:
            raise ModlabError(
                f"MoDConfig(skip={self.skip!r}, gates='kv_head'): KV heads apart can only be dropped from "
                "the cache. Use skip='kv', or gates='layer' (the default)."
            )
        if not 0 < self.leave_after < 1:
            raise ModlabError(f"MoDConfig(leave_after={self.leave_after}): a share strictly between 0 and 1.")
        if not 0 <= self.leave_rank <= WIDEST:
            raise ModlabError(
                f"MoDConfig(leave_rank={self.leave_rank}): 0 (whole copies), or a rank up to {WIDEST:,}."
            )
        skips.named(self.skip).check(self)
        self._check_used()
        if not 0 < self.init_gate < 1:
            raise ModlabError(
                f"MoDConfig(init_gate={self.init_gate}): a sigmoid gate lies strictly inside (0, 1)."
            )

    def _check_types(self) -> None:
        """Settings may come from a file: what would only fail, or be rounded, much later is refused here."""
        for name in ("keep_recent", "keep_first", "leave_rank", "router_hidden", "format_version"):
            setattr(self, name, _whole(name, getattr(self, name)))
        for name in ("capacity", "leave_after", "init_gate"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, Real):
                raise ModlabError(f"MoDConfig({name}={value!r}): must be a number.")
        if isinstance(self.layers, dict) or not isinstance(self.layers, Iterable):
            raise ModlabError(f"MoDConfig(layers={self.layers!r}): name layers, or give a list of indices.")
        if self.format_version != FORMAT_VERSION:
            raise ModlabError(
                f"MoDConfig(format_version={self.format_version}): this modlab knows {FORMAT_VERSION} alone; "
                "update it if the file was written by a newer one."
            )

    def _check_used(self) -> None:
        """A setting that nothing asks for is a mistake about what is routed. But for `keep_recent`, so that
        skips can be compared with the others' settings unchanged."""
        used = {"layers", "skip", "format_version", "keep_recent", *skips.named(self.skip).settings}
        for name, declared in type(self).__dataclass_fields__.items():
            if name not in used and getattr(self, name) != declared.default:
                users = [repr(other) for other in skips.names() if name in skips.named(other).settings]
                raise ModlabError(
                    f"MoDConfig(skip={self.skip!r}, {name}={getattr(self, name)!r}): {name} means nothing "
                    f"there, only with skip={' or '.join(users)}. Leave it out."
                )
        if self.operator != "topk" and self.capacity != type(self).capacity:
            raise ModlabError(
                f"MoDConfig(operator={self.operator!r}, capacity={self.capacity}): the capacity is what "
                "operator='topk' keeps. Leave it out; p and the training decide what a threshold keeps."
            )

    @classmethod
    def paper(cls, **changes: Any) -> MoDConfig:
        """MoDification as published (arXiv 2410.14268): alternate layers as a whole, gate on both branches.

        The paper does not state the router's initialisation; zero weights (gate 0.5) are assumed. Unlike the
        default this form is not lossless: a gate of 0.5 halves what each routed layer adds, until training
        corrects it.
        """
        published = {"gate": "paper", "init_gate": 0.5, "keep_first": 1}
        return cls(**{"skip": "layer", "layers": "alternate", **published, **changes})

    @classmethod
    def topk(cls, capacity: float = 0.25, **changes: Any) -> MoDConfig:
        """Top-k Mixture-of-Depths (Raposo et al. 2024), the baseline: expert-choice routing of alternate
        layers as a whole, fused gate."""
        published = {"operator": "topk", "capacity": capacity, "gate": "fused"}
        return cls(**{"skip": "layer", "layers": "alternate", **published, **changes})

    @property
    def recent_stored(self) -> int:
        """How many of the latest tokens are in the cache between two forwards, kept or not."""
        return skips.named(self.skip).recent_stored(self)

    def resolve_layers(self, num_layers: int) -> list[int]:
        """Ascending indices of the layers to route in a model of `num_layers` decoder layers."""
        if self.layers == "alternate":
            indices = list(range(1, num_layers, 2))
        elif self.layers == "inner":
            indices = list(range(2, num_layers - 1) if num_layers > 5 else range(num_layers))
        elif self.layers == "all":
            indices = list(range(num_layers))
        else:
            wrong = [i for i in self.layers if not -num_layers <= int(i) < num_layers]
            if wrong:
                raise ModlabError(
                    f"MoDConfig(layers=...) names layer {wrong[0]}, but the model has {num_layers} decoder "
                    "layers: "
                    f"use indices from 0 to {num_layers - 1} (or -{num_layers} to -1)."
                )
            indices = sorted({int(i) % num_layers for i in self.layers})
        if not indices:
            raise ModlabError(
                f"layers={self.layers!r} selects nothing in a model of {num_layers} decoder layer(s)."
            )
        return indices

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dict; `from_dict` reads it back."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> MoDConfig:
        """The config that `to_dict` described; unknown keys are an error, they would be lost."""
        if not isinstance(values, dict) or not all(isinstance(name, str) for name in values):
            raise ModlabError(f"a MoDConfig is described by a dict of its fields, not by {values!r:.80}.")
        unknown = sorted(set(values) - set(cls.__dataclass_fields__))
        if unknown:
            raise ModlabError(
                f"unknown MoDConfig field(s) {', '.join(unknown)}: the file was written by a newer modlab, "
                "update it."
            )
        return cls(**values)


def _whole(name: str, value: Any) -> int:
    """`value` of a field as an int; of a JSON object's key, too, which is always text."""
    try:
        number = int(value) if isinstance(value, str) and value.isdecimal() else operator.index(value)
    except (TypeError, ValueError):
        number = None
    if number is None or isinstance(value, bool) or abs(number) > LARGEST:
        raise ModlabError(f"MoDConfig({name}={value!r:.80}): whole numbers only, up to {LARGEST:,}.")
    return number
