"""Conversion recipes by name: what is routed, how it is trained, for which KV saving.

    mod_config, train_config = modlab.recipe("default", model, tokens=30_000_000)
    modlab.convert(model, mod_config)
    modlab.fit_routers(model, rows)
    modlab.train(model, modlab.data.with_repeats(rows, tokenizer), train_config)

`modlab train` does all four by itself. The fit may be left out: routers then begin open; what that costs was
not measured.

"speed" has been measured from a start: routers of K/V that are trained, then projections in closed form,
then what lies above the point of leaving alone is distilled. `modlab train --recipe speed --start ROUTERS`
does all of it; in Python:

    mod_config, train_config = modlab.recipe("speed", model, started=True, tokens=14_000_000)
    modlab.convert(model, mod_config)
    modlab.start_from(model, "coder-0.5b-kv")
    modlab.set_keep_recent(model, mod_config.keep_recent)  # for 4x
    modlab.fit_projections(model, rows)
    modlab.train(model, modlab.data.with_repeats(rows, tokenizer), train_config)

What each choice rests on is in docs/defaults.md, docs/quality.md and docs/log.md: "default", "memory",
"safe", "distil" and "speed" on real models, the others on this project's own. `MoDConfig()` with
`TrainConfig()` is no recipe but the plain form: a gate a layer in the inner layers, all weights trained on
the loss of the text. Real models lose recall over a distance by it (docs/results.md).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, overload

from modlab.config import KVCacheDtype, MoDConfig
from modlab.errors import ModlabError
from modlab.training.config import TrainConfig
from modlab.training.fit_config import FitConfig
from modlab.warn import warn

if TYPE_CHECKING:
    from modlab.conversion.survey import Survey


@dataclass(frozen=True)
class Recipe:
    """A recipe.

    Attributes:
        summary: what it is for, in a line.
        mod: the conversion.
        train: fields of `TrainConfig` that differ from the default.
        started: fields that differ further where trained routers are the start (`modlab.start_from`).
        kv_saving: aimed at by default; None leaves `keep_ratio` as it is.
        fits: routers are not trained but fitted (`modlab.fit_routers`).
    """

    summary: str
    mod: MoDConfig = field(default_factory=MoDConfig)
    train: dict[str, Any] = field(default_factory=dict)
    started: dict[str, Any] = field(default_factory=lambda: {"ramp": 0.0})
    kv_saving: float | None = None
    fits: bool = False


BY_HEAD = MoDConfig(layers="all", gates="kv_head", router_hidden=16)
"""What was studied on real models; where KV heads cannot have gates of their own, one gate a layer."""

LEAVING = replace(BY_HEAD, skip="kv+prompt")
"""The same with less work for prompts."""

DISTILLING: dict[str, Any] = {
    "objective": "distil",
    "keep_range": (0.04, 0.67),  # 16x to 1.5x less K/V at 8,192 tokens, the latest included
    "recent_range": (128, 1024),  # a quarter of what is stored there are the latest tokens
    "router_lr": 0.004,  # of all that was measured on real models since recent tokens go with the saving
    "ramp": 0.7,
    "warmup": 0.01,
    # The rate stays up until the target has reached its end, then falls to nothing: at a rate of 0.001 a step
    # of AdamW still moves logits by more than what tells neighbouring savings apart.
    "cooldown": 0.3,
    "min_lr_ratio": 0.0,
}
"""How gates are distilled to the dense model."""

LEAVING_STARTED: dict[str, Any] = {
    "freeze_below": True,  # K/V routers there were trained on the states that they still read
    "keep_range": None,
    "recent_range": None,  # those of the one saving, which `recipe` puts into the conversion
    "batch_size": 4,  # 16,384 tokens a step, in rows of 4,096
    "lr": 5e-4,
    "router_lr": 2e-3,
    "ramp": 0.0,
    "warmup": 0.05,
    "cooldown": 1.0,
    "min_lr_ratio": 0.1,
}
"""How leaving is distilled above K/V routers that are trained: as measured, coder-0.5b and coder-1.5b."""

# Figures: docs/quality.md, by the product's cache in rows of 8,192 tokens on an H200; of "layers" on 55.6 M
# parameters, 10 M tokens, gap to the dense continuation in nats a token. tests/scripts holds savings to them.
RECIPES = {
    "quick": Recipe(
        "a gate a KV head in all layers, fitted in one forward pass over some text, without training: 2x "
        "less K/V in minutes on a CPU",
        BY_HEAD,
        kv_saving=2.0,
        fits=True,
    ),
    "distil": Recipe(
        "a gate a KV head in all layers, distilled to the dense model, base frozen; one run leaves "
        "thresholds for 2x to 16x; at 4x a KL of 0.006, 0.016 and 0.011 to the dense model and recall gaps "
        "of at most 0.018, 0.039 and 0.031 nats on smollm2, coder-0.5b and coder-1.5b",
        BY_HEAD,
        DISTILLING,
        kv_saving=4.0,
    ),
    "safe": Recipe(
        "distil, aimed at 2x, and it stays there whatever default becomes: a KL of at most 0.0021 and a "
        "recall gap of at most 0.018 on the three models of default",
        BY_HEAD,
        DISTILLING,
        kv_saving=2.0,
    ),
    "default": Recipe(
        "distil, aimed at the highest saving of which a KL and a recall gap of at most 0.02 were measured on "
        "three real models (0.1 to 1.5 B), each with the best number of recent tokens that was tried: 3x, "
        "with 0.0071 and 0.019",
        BY_HEAD,
        DISTILLING,
        # With the 683 recent tokens that a run leaves at 3x coder-1.5b has 0.0203 ± 0.0026, with 512
        # 0.0188 ± 0.0028. At 4x coder-0.5b has at least 0.035, whatever their number.
        kv_saving=3.0,
    ),
    "memory": Recipe(
        "distil, aimed at the highest saving with a recall gap of at most 0.05: 4x, as distil itself today",
        BY_HEAD,
        DISTILLING,
        kv_saving=4.0,  # 8x: 0.20 at least
    ),
    "speed": Recipe(
        "prompt tokens leave after two thirds of the layers, and a gate a KV head in all layers keeps a "
        "quarter of the cache; distilled to the dense model, base frozen. With --start (routers of K/V; what "
        "is above the point of leaving learns alone) a study's arm with these settings has on coder-0.5b "
        "after 13.6 M tokens, at 4.2x, a KL of 0.056, recall gaps up to 0.019 nats and 0.989 ± 0.015 of "
        "dense's mean of five tasks (HumanEval -0.043 ± 0.025), on coder-1.5b after 1.4 M, at 4.4x, 0.065, "
        "0.039 and 0.952 ± 0.011 of four (LAMBADA -0.070 ± 0.018); without a start, coder-0.5b, 3 M tokens, "
        "a KL of 0.15 and recall gaps up to 0.11",
        LEAVING,  # docs/quality.md, its section on depth
        {**DISTILLING, "lr": 2e-4, "router_lr": 0.01},
        LEAVING_STARTED,
        kv_saving=4.0,
    ),
    "layers": Recipe(
        "whole layers, in all but the first two and the last: most operations saved, at a loss that leaving "
        "layers out for all tokens would not exceed",
        MoDConfig(skip="layer"),  # 0.29; alternate layers 0.32, seven of 16 left out 0.16
        kv_saving=1.8,
    ),
    "paper": Recipe(
        "MoDification as published: load objective, gate on both branches; where it ends is up to alpha",
        MoDConfig.paper(),
        {"objective": "load", "alpha": 0.01, "what_if": 0.0, "calibrate": False},
    ),
}


DEFAULT = "default"
"""What `modlab train` converts a dense model by."""

TRAINED = [name for name, chosen in RECIPES.items() if not chosen.fits]
"""Recipes whose settings are of `modlab.train`."""


@overload
def recipe(  # type: ignore[overload-overlap]
    name: Literal["quick"],
    model: Any,
    *,
    kv_saving: float | None = None,
    kv_cache_dtype: KVCacheDtype = "auto",
    started: bool = False,
    **settings: Any,
) -> tuple[MoDConfig, FitConfig]: ...


@overload
def recipe(
    name: str,
    model: Any,
    *,
    kv_saving: float | None = None,
    kv_cache_dtype: KVCacheDtype = "auto",
    started: bool = False,
    **settings: Any,
) -> tuple[MoDConfig, TrainConfig]: ...


def recipe(
    name: str,
    model: Any,
    *,
    kv_saving: float | None = None,
    kv_cache_dtype: KVCacheDtype = "auto",
    started: bool = False,
    **settings: Any,
) -> tuple[MoDConfig, TrainConfig | FitConfig]:
    """The settings of a recipe for this model.

    Args:
        name: "quick", "distil", "safe", "default", "memory", "speed", "layers" or "paper".
        model: dense, to be converted; its number of layers sets the keep ratio.
        kv_saving: how many times smaller the K/V cache is to be; the recipe's own by default, or less, with
            a warning, where windows leave too few layers for it. Of what is distilled in texts of 8,192
            tokens (or the model's context), the latest included; shorter ones save less. With "layers" all
            along.
        kv_cache_dtype: "int8" stores keys and values in eight bits (`MoDConfig.kv_cache_dtype`). A recipe's
            own saving is what routing is trained to, and eight bits save on top: 3x of "default" becomes
            5.8x (16 bit, heads of 64). A `kv_saving` that is given is that of both.
        started: routers that are trained already will be the start (`modlab.start_from`): the run begins at
            the ratio aimed at; what else differs is the recipe's ("speed").
        **settings: further fields of `TrainConfig` (of "quick": of `FitConfig`), such as `tokens`; they win
            over the recipe's.

    Returns:
        (MoDConfig, TrainConfig) for `modlab.convert` and `modlab.train`; of "quick" (MoDConfig, FitConfig)
        for `modlab.convert` and `modlab.fit_routers`.

    Raises:
        ModlabError: no such recipe, a saving that its layers cannot give, or settings that do not fit.
    """
    # The command line reads RECIPES for its help, and must not wait for torch.
    from modlab.cache.stored import keep_ratio_for_saving
    from modlab.conversion.selection import select
    from modlab.conversion.survey import survey
    from modlab.routing.state import is_converted

    if name not in RECIPES:
        raise ModlabError(f"there is no recipe {name!r}: choose one of {', '.join(RECIPES)}.")
    if is_converted(model):
        raise ModlabError(
            f"this {type(model).__name__} is converted already, and a recipe is for a dense model: call it "
            "before modlab.convert, or modlab.revert(model) first."
        )
    chosen = RECIPES[name]
    found = survey(model)
    config = replace(_for(found, chosen.mod), kv_cache_dtype=kv_cache_dtype)
    if started and chosen.fits:
        raise ModlabError(f"the recipe {name!r} fits routers itself: leave started=True out.")
    fields = {**chosen.train, **(chosen.started if started else {}), **settings}
    if chosen.train.get("objective") == "distil" != fields["objective"]:
        raise ModlabError(
            f"the recipe {name!r} distils, and objective={fields['objective']!r} is another way to train: "
            "leave it out, or train the plain form: modlab.convert(model) (`modlab convert`), then "
            "modlab.train with settings of yours (`modlab train` of that folder)."
        )
    saving = chosen.kv_saving if kv_saving is None else kv_saving
    if kv_saving is not None and "keep_ratio" in fields:
        raise ModlabError(
            f"kv_saving={kv_saving} and keep_ratio={fields['keep_ratio']} say the same: give one."
        )
    if kv_saving is not None and fields.get("objective") == "load":
        raise ModlabError(
            "the load objective aims at no KV saving, alpha decides it: leave kv_saving out, or calibrate "
            "the trained model (modlab.calibrate)."
        )
    if saving is not None and "keep_ratio" not in fields:
        routed, holding = len(select(found, config).facts), found.holding_keys
        if kv_saving is None:
            saving = _reachable(name, saving, routed, holding)
        elif kv_cache_dtype != "auto":
            saving = _by_routing(model, saving, routed)
        fields["keep_ratio"] = keep_ratio_for_saving(saving, routed, holding)
        if "recent_range" in chosen.started and started and fields["recent_range"] is None:
            config, fields["keep_ratio"] = _at_one_saving(model, config, saving, routed, holding)
    how = (FitConfig if chosen.fits else TrainConfig)(**fields)
    how.check()
    return config, how


def _reachable(name: str, saving: float, routed: int, holding: int) -> float:
    """The recipe's own aim, or, with a word, three quarters of the way to what so few layers can save."""
    most = holding / (holding - routed) if routed < holding else math.inf
    if saving < most:
        return saving
    aim = 1 + 0.75 * (most - 1)
    warn(
        f"{routed} of {holding} layers are routed (others hold a window alone), which saves less than "
        f"{most:.3g}x: the recipe {name!r} aims at {aim:.3g}x here instead of {saving:g}x (kv_saving=...)."
    )
    return aim


def _by_routing(model: Any, saving: float, routed: int) -> float:
    """What routing has to save where eight bits save a part of `saving`."""
    from modlab.routing.kv_saving import rounding_ahead

    rounding = rounding_ahead(model, routed)
    if (by_routing := rounding.routed(saving)) > 1:
        return by_routing
    raise ModlabError(
        f"kv_saving={saving:g}: eight bits alone save {rounding.total(1.0):.3g}x, which leaves nothing to "
        "routing. Ask for more, or leave kv_cache_dtype out."
    )


def _at_one_saving(
    model: Any, config: MoDConfig, saving: float, routed: int, holding: int
) -> tuple[MoDConfig, float]:
    """The conversion with the recent tokens that go with a saving, and the keep ratio that they leave."""
    from modlab.cache.stored import recent_share, unbounded_keep_ratio
    from modlab.hf.model import context_length
    from modlab.routing.recent_tokens import SAVING_TEXT, recent_at

    length = min(context_length(model) or SAVING_TEXT, SAVING_TEXT)
    config = replace(config, keep_recent=recent_at(DISTILLING["recent_range"], saving, length))
    return config, unbounded_keep_ratio(saving, routed, holding, recent_share(config, length))


def _for(found: Survey, config: MoDConfig) -> MoDConfig:
    """The caller's own copy of the settings, with one gate a layer where KV heads allow no more."""
    from modlab.conversion.selection import select

    if config.gates == "kv_head":
        try:
            select(found, config)
        except ModlabError:
            return replace(config, gates="layer")
    return replace(config)
