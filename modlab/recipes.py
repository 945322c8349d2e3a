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

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, overload

from modlab.config import KVCacheDtype, MoDConfig
from modlab.errors import ModlabError
from modlab.training.config import TrainConfig
from modlab.training.fit_config import FitConfig

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
        kv_savings: aimed at by default, by how keys and values are stored: dense bytes over allocated ones of
            a model in 16 bits. In a way that is not named routing is trained to the saving of "auto", and
            what fewer bits save comes on top. None at all leaves `keep_ratio` as it is.
        fits: routers are not trained but fitted (`modlab.fit_routers`).
    """

    summary: str
    mod: MoDConfig = field(default_factory=MoDConfig)
    train: dict[str, Any] = field(default_factory=dict)
    started: dict[str, Any] = field(default_factory=lambda: {"ramp": 0.0})
    kv_savings: Mapping[KVCacheDtype, float] = field(default_factory=dict)
    fits: bool = False

    @property
    def kv_saving(self) -> float | None:
        """Aimed at by default, as the recipe itself stores keys and values."""
        return self.kv_savings.get(self.mod.kv_cache_dtype)


BY_HEAD = MoDConfig(layers="all", gates="kv_head", router_hidden=16)
"""What was studied on real models; where KV heads cannot have gates of their own, one gate a layer."""

IN_EIGHT_BITS = replace(BY_HEAD, kv_cache_dtype="int8")
"""The same with what is kept in eight bits, of which real models lose less than of keys that are dropped."""

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
        kv_savings={"auto": 2.0},
        fits=True,
    ),
    "distil": Recipe(
        "a gate a KV head in all layers, distilled to the dense model, base frozen; one run leaves "
        "thresholds for 2x to 16x; at 4x a KL of 0.006, 0.016 and 0.011 to the dense model and recall gaps "
        "of at most 0.018, 0.039 and 0.031 nats on smollm2, coder-0.5b and coder-1.5b",
        BY_HEAD,
        DISTILLING,
        kv_savings={"auto": 4.0},
    ),
    "safe": Recipe(
        "distil, aimed at 2x by routing alone, nothing rounded, and it stays there whatever default becomes: "
        "a KL of at most 0.0021 and a recall gap of at most 0.018 on the three models of default",
        BY_HEAD,
        DISTILLING,
        # Eight bits save 1.94x of these 2x by themselves: nothing that a run could be trained to is left.
        kv_savings={"auto": 2.0},
    ),
    "default": Recipe(
        "distil, with what is kept in eight bits, aimed at the highest saving of both of which a KL and a "
        "recall gap of at most 0.02 were measured on three real models (0.1 to 1.5 B): 6x, with 0.0081 and "
        "0.020; 3x with --kv-cache-dtype auto, with 0.0071 and 0.019",
        IN_EIGHT_BITS,
        DISTILLING,
        # coder-1.5b has both with 512 recent tokens, where a run leaves 662 at 6x and 683 at 3x: in 16 bits
        # .0203 ± .0026 with those, in eight not measured. At 8x, 4x in 16 bits, coder-0.5b has .044 and .035.
        kv_savings={"auto": 3.0, "int8": 6.0},
    ),
    "memory": Recipe(
        "distil, with what is kept in eight bits, aimed at the highest saving of both with a recall gap of "
        "at most 0.05: 8x, with 0.044; 4x with --kv-cache-dtype auto, with 0.039",
        IN_EIGHT_BITS,
        DISTILLING,
        kv_savings={"auto": 4.0, "int8": 8.0},  # 16x: 0.32; 8x in 16 bits: 0.20 at least
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
        kv_savings={"auto": 4.0},
    ),
    "layers": Recipe(
        "whole layers, in all but the first two and the last: most operations saved, at a loss that leaving "
        "layers out for all tokens would not exceed",
        MoDConfig(skip="layer"),  # 0.29; alternate layers 0.32, seven of 16 left out 0.16
        kv_savings={"auto": 1.8},
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
    kv_cache_dtype: KVCacheDtype | None = None,
    started: bool = False,
    **settings: Any,
) -> tuple[MoDConfig, FitConfig]: ...


@overload
def recipe(
    name: str,
    model: Any,
    *,
    kv_saving: float | None = None,
    kv_cache_dtype: KVCacheDtype | None = None,
    started: bool = False,
    **settings: Any,
) -> tuple[MoDConfig, TrainConfig]: ...


def recipe(
    name: str,
    model: Any,
    *,
    kv_saving: float | None = None,
    kv_cache_dtype: KVCacheDtype | None = None,
    started: bool = False,
    **settings: Any,
) -> tuple[MoDConfig, TrainConfig | FitConfig]:
    """The settings of a recipe for this model.

    Args:
        name: "quick", "distil", "safe", "default", "memory", "speed", "layers" or "paper".
        model: dense, to be converted; its number of layers sets the keep ratio. Of a recipe in eight bits it
            is converted and reverted once, with a forward of a few tokens, to see whether it can have them.
        kv_saving: how many times smaller the K/V cache is to be: dense bytes over allocated ones, whatever
            saves them. The recipe's own by default, or less, with a warning, where windows leave too few
            layers for it; it is counted in 16 bits (of a model in single precision routing keeps the same
            share, which is a larger saving there). Of what is distilled in texts of 8,192 tokens (or the
            model's context), the latest included; shorter ones save less. With "layers" all along.
        kv_cache_dtype: how what is kept is stored (`MoDConfig.kv_cache_dtype`): "int8", in eight bits, or
            "auto", in the model's own type. By default the recipe's: eight bits of "default" and "memory",
            or, with a warning, the model's own type where it cannot have them (tensor parallelism) or a
            `kv_saving` is so small that they would leave routing next to nothing. "auto" is aimed at 3x and
            4x by these two. What no recipe was measured with ("k6v4", eight bits of any other recipe) saves
            on top of what "auto" is aimed at: 4x of "distil" becomes 7.8x in eight bits (heads of 64).
            Routers are trained at full precision either way.
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
    from modlab.conversion.aim import Aim, at_one_saving
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
    config = _for(found, chosen.mod)
    if kv_cache_dtype is not None:
        config = replace(config, kv_cache_dtype=kv_cache_dtype)
    if started and chosen.fits:
        raise ModlabError(f"the recipe {name!r} fits routers itself: leave started=True out.")
    fields = {**chosen.train, **(chosen.started if started else {}), **settings}
    if chosen.train.get("objective") == "distil" != fields["objective"]:
        raise ModlabError(
            f"the recipe {name!r} distils, and objective={fields['objective']!r} is another way to train: "
            "leave it out, or train the plain form: modlab.convert(model) (`modlab convert`), then "
            "modlab.train with settings of yours (`modlab train` of that folder)."
        )
    if kv_saving is not None and "keep_ratio" in fields:
        raise ModlabError(
            f"kv_saving={kv_saving} and keep_ratio={fields['keep_ratio']} say the same: give one."
        )
    if kv_saving is not None and fields.get("objective") == "load":
        raise ModlabError(
            "the load objective aims at no KV saving, alpha decides it: leave kv_saving out, or calibrate "
            "the trained model (modlab.calibrate)."
        )
    settings_class = FitConfig if chosen.fits else TrainConfig
    settings_class(**fields).check()  # before the model is tried
    layers = len(select(found, config).facts), found.holding_keys
    bounds = fields.get("keep_range") or (0.0, 1.0)
    aim = Aim(name, model, chosen.kv_savings, layers, bounds, insists=kv_cache_dtype is not None)
    config, saving = aim.own(config) if kv_saving is None else aim.asked(config, kv_saving)
    if saving is not None and "keep_ratio" not in fields:
        fields["keep_ratio"] = keep_ratio_for_saving(saving, *layers)
        if "recent_range" in chosen.started and started and fields["recent_range"] is None:
            recent_range = DISTILLING["recent_range"]
            config, fields["keep_ratio"] = at_one_saving(model, config, recent_range, saving, layers)
    how = settings_class(**fields)
    how.check()
    return config, how


def _for(found: Survey, config: MoDConfig) -> MoDConfig:
    """The caller's own copy of the settings, with one gate a layer where KV heads allow no more."""
    from modlab.conversion.selection import select

    if config.gates == "kv_head":
        try:
            select(found, config)
        except ModlabError:
            return replace(config, gates="layer")
    return replace(config)
