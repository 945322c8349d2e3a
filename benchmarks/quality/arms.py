"""What is compared. Each arm changes one thing of another, whose name it begins with.

`layer` and `attn` say what a skipped token leaves out; `alt` is every other layer, `mid` all layers but the
first two and the last, `wide` all but the first. Keep ratios follow from the KV saving that an arm aims at.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from modlab import MoDConfig
from modlab.cache.stored import recent_share, unbounded_keep_ratio


@dataclass(frozen=True)
class Arm:
    """Attributes:
    name: of the arm, and of its result files.
    why: what it is there to tell.
    mod: fields of `MoDConfig`; None leaves the model dense. `layers` may be "wide", "static" or "low" too.
    train: fields of `TrainConfig`.
    kv_saving: aimed at; sets keep ratio (or capacity). None: whatever comes out.
    keep_ratio: instead, where no K/V is saved.
    mechanism: a name in `mechanisms.MECHANISMS`.
    teacher: weight of the KL divergence to the dense base.
    saving_range: KV savings between which each step has another one (`TrainConfig.keep_range`).
    """

    name: str
    why: str
    mod: dict[str, Any] | None = None
    train: dict[str, Any] = field(default_factory=dict)
    kv_saving: float | None = 1.8
    keep_ratio: float | None = None
    mechanism: str | None = None
    teacher: float = 0.0
    saving_range: tuple[float, float] | None = None

    def config(self, num_layers: int) -> MoDConfig | None:
        """The conversion for a model of so many layers, top-k capacity included."""
        if self.mod is None:
            return None
        fields = dict(self.mod)
        fields["layers"] = named_layers(fields["layers"], num_layers)
        if fields.get("operator") == "topk":
            fields["capacity"] = self.keep(num_layers)
        return MoDConfig(**fields)

    def keep(self, num_layers: int, length: float = math.inf) -> float:
        """The keep ratio in the routed layers that gives the KV saving, for rows of `length` tokens."""
        if self.keep_ratio is not None:
            return self.keep_ratio
        assert self.kv_saving is not None, self.name
        return self._keep_at(self.kv_saving, num_layers, length)

    def training(self, num_layers: int, length: float = math.inf) -> dict[str, Any]:
        """Fields of `TrainConfig`, the keep ratio included."""
        fields = dict(self.train)
        if self.mod is not None and (self.kv_saving or self.keep_ratio):
            fields["keep_ratio"] = self.keep(num_layers, length)
        if self.saving_range is not None:
            low, high = (self._keep_at(saving, num_layers, length) for saving in self.saving_range)
            fields["keep_range"] = (high, low)
        return fields

    def _keep_at(self, kv_saving: float, num_layers: int, length: float) -> float:
        assert self.mod is not None, self.name
        layers = named_layers(self.mod["layers"], num_layers)
        config = MoDConfig(**{**self.mod, "layers": layers})
        routed = len(config.resolve_layers(num_layers))
        return max(unbounded_keep_ratio(kv_saving, routed, num_layers, recent_share(config, length)), 0.01)


def named_layers(layers: Any, num_layers: int) -> Any:
    """The words of this file as indices; others as they are."""
    if layers == "wide":
        return list(range(1, num_layers))
    if layers == "static":  # as many as come closest to 1.8x when left out
        return list(range(1, num_layers, 2))[: round(num_layers * (1 - 1 / 1.8))]
    if layers == "low":  # the first ones of "inner", as many of them
        return list(range(2, 2 + round(num_layers * (1 - 1 / 1.8))))
    return layers


def _arms() -> Iterator[Arm]:
    alternate = {"skip": "layer", "layers": "alternate"}
    inner, wide = {**alternate, "layers": "inner"}, {**alternate, "layers": "wide"}

    # Zero line and controls.
    yield Arm("dense", "the zero line: the base, trained on", None, kv_saving=None)
    static = {**alternate, "layers": "static", "keep_first": 0}
    fixed = {"objective": "none", "what_if": 0.0}
    yield Arm("static", "layers left out", static, fixed, mechanism="static")
    yield Arm("random-alt", "tokens left out by chance", alternate, fixed, mechanism="random")
    topk = {**alternate, "operator": "topk", "gate": "fused", "init_gate": 0.5}
    published = {"what_if": 0.0}  # a skipped token tells the router nothing
    yield Arm("topk-alt", "top-k MoD, evaluated causally", topk, published)
    yield Arm("topk-mid", "top-k MoD on the layers of ours", {**topk, "layers": "inner"}, published)
    paper = MoDConfig.paper().to_dict()
    for alpha in (0.01, 0.03, 0.1, 0.3):
        load = {"objective": "load", "alpha": alpha, **published}
        yield Arm(f"paper-{alpha}", "the paper's recipe", paper, load, kv_saving=None)
    opened = {**paper, "init_gate": 0.88}
    yield Arm("paper-0.1-open", "the same, gates open at first", opened, {**load, "alpha": 0.1}, None)

    # Straight-through, what-if, two-sided target.
    yield Arm("layer-alt", "ours as it was: whole layers, alternate", alternate)
    yield Arm("layer-mid", "fewer tokens left out in more layers", inner)
    yield Arm("layer-wide", "still more layers", wide)
    attn = {"skip": "attention", "layers": "inner"}
    yield Arm("attn-mid", "every MLP runs, attention is left out", attn)
    yield Arm("attn-alt", "the same in alternate layers", {**attn, "layers": "alternate"})
    yield Arm("attn-wide", "the same in more layers", {**attn, "layers": "wide"})
    yield Arm("mlp-mid", "attention runs, MLPs are left out", {**attn, "skip": "mlp"}, keep_ratio=0.45)
    yield Arm("attn-mid-mlp", "a router each for attention and MLP", attn, mechanism="separate-mlp")
    yield Arm("attn-mid-perlayer", "each layer meets the target itself", attn, {"per_layer": True})

    # Every token passes every layer, routers decide about the cache alone.
    kv = {"skip": "kv", "layers": "inner"}
    yield Arm("kv-mid", "keys and values of the inner layers", kv)
    yield Arm("kv-all", "of all layers", {**kv, "layers": "all"})
    yield Arm("kv-alt", "of alternate layers", {**kv, "layers": "alternate"})
    yield Arm("kv-random-mid", "kept by chance", kv, fixed, mechanism="random")
    by_hand: dict[str, Any] = {"kv_saving": None, "mechanism": "static"}
    yield Arm(
        "kv-static-low",
        "no router: low layers see recent tokens alone",
        {**kv, "layers": "low"},
        fixed,
        **by_hand,
    )
    yield Arm("kv-static-alt", "no router: every other layer", {**kv, "layers": "static"}, fixed, **by_hand)
    yield Arm("kv-mid-recent32", "a shorter recent past", {**kv, "keep_recent": 32})
    yield Arm("kv-mid-recent512", "a longer one", {**kv, "keep_recent": 512})
    yield Arm("kv-mid-half", "weighed in half of the steps, hidden in the others", kv, {"what_if": 0.5})
    yield Arm("kv-mid-budget", "thresholds follow the gates", kv, {"objective": "budget", "what_if": 0.5})
    frozen = {"freeze_base": True, "router_lr": 3e-3}
    yield Arm("kv-mid-frozen", "routers alone are trained; the base has seen no more tokens", kv, frozen)
    yield Arm("kv-all-frozen", "of all layers", {**kv, "layers": "all"}, frozen)
    yield Arm("kv-mid-frozen-kl", "towards the dense model's predictions", kv, frozen, teacher=1.0)
    yield Arm("kv-mid-rlr", "routers learn ten times faster", kv, {"router_lr": 3e-3})
    yield Arm("kv-mid-kl", "KL to the dense base", kv, teacher=1.0)
    for saving in (1.3, 1.5, 2.2, 2.5):
        yield Arm(f"kv-mid-at{saving}", f"trained for {saving}x", kv, kv_saving=saving)
    yield Arm(
        "kv-mid-range", "another budget each step", kv, {"objective": "budget"}, saving_range=(1.2, 2.5)
    )
    yield Arm("kv-mid-normed", "router reads the normalised stream", kv, mechanism="normed")

    # How the target is met.
    yield Arm("attn-mid-budget", "thresholds follow the gates", attn, {"objective": "budget"})
    budget, spread = {"objective": "budget"}, (1.2, 2.5)
    yield Arm("attn-mid-range", "another budget each step", attn, budget, saving_range=spread)
    yield Arm("layer-mid-range", "of whole layers", inner, budget, saving_range=spread)
    yield Arm("attn-mid-ramp", "the target falls for longer", attn, {"ramp": 0.6})
    yield Arm("attn-mid-late", "and late", attn, {"hold": 0.3, "ramp": 0.4})
    yield Arm("attn-mid-whatif0", "no what-if passes", attn, {"what_if": 0.0})
    yield Arm("attn-mid-whatif1", "in every step", attn, {"what_if": 1.0})
    yield Arm("attn-mid-lam10", "a stiffer target", attn, {"lam": 10.0})
    yield Arm("attn-mid-rlr", "routers learn ten times faster", attn, {"router_lr": 3e-3})

    # Together.
    both = {"objective": "budget"}
    yield Arm("attn-mid-budget-kl", "thresholds and KL", attn, both, teacher=1.0)
    yield Arm("attn-wide-budget-kl", "in more layers", {**attn, "layers": "wide"}, both, teacher=1.0)
    yield Arm("layer-mid-budget", "whole layers", inner, both)

    # What else teaches, what is protected, what decides, what is left behind.
    yield Arm("attn-mid-kl", "KL to the dense base", attn, teacher=1.0)
    yield Arm("layer-mid-kl", "the same with whole layers", inner, teacher=1.0)
    yield Arm("attn-mid-first0", "no protected tokens", {**attn, "keep_first": 0})
    yield Arm("attn-mid-first32", "many protected tokens", {**attn, "keep_first": 32})
    yield Arm("attn-mid-normed", "router reads the normalised stream", attn, mechanism="normed")
    yield Arm("attn-mid-2layer", "router with a hidden layer", attn, mechanism="two-layer")
    yield Arm("layer-mid-adapter", "low-rank map for skipped tokens", inner, mechanism="adapter")
    yield Arm("layer-mid-shared", "K/V of the layer below", inner, mechanism="shared-kv")


ARMS = {arm.name: arm for arm in _arms()}
