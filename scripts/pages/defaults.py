# ruff: noqa: E501 (the text of the page)
"""docs/defaults.md: a reason and a figure for each default of a conversion and its training.

Values are those of the dataclasses; figures come from the newest benchmarks/results/quality_*.json and from
modlab/demo/kv/results.json (scripts/demo/06_kept_keys.py).
"""

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd

from modlab import MoDConfig, TrainConfig
from modlab.recipes import DEFAULT, RECIPES
from scripts.pages.measured import AUTO, INT8, K6V4, own_rows, records
from scripts.pages.quality import furthest_off, newest_result, summary
from scripts.pages.real_models import LIMITS, SHIPPED, by_storage, of_recipe, settings, worst_of_models

Gap = Callable[..., str]
TOKENS = 10_000_000
UNTRIED = "not compared with others"


def reasons(gap: Gap, off: float, demo: dict[str, Any]) -> dict[str, dict[str, str]]:
    """For each dataclass, why its fields have their defaults.

    Args:
        gap: `gap(arm, point="trained")` is the loss above the dense continuation, as text.
        off: how far the keep ratio asked for and the one got are apart at most.
        demo: what `demo-kv` was measured to do, with other settings too.
    """
    kv, settings = demo["results"]["demo-kv"], demo["settings"]

    def at(setting: str) -> str:
        found = settings[setting]
        return (
            f"{found['loss'] - kv['loss']:+.4f} and {found['recall'][2]['second_loss'] - kv['recall'][2]['second_loss']:+.3f} at "
            f"`{setting}` ({found['kv_saving']:.2f}x)"
        )

    recent = ", ".join(at(f"keep_recent={n}") for n in (16, 32, 64, 256, 512))
    config = {
        "skip": f"gap at 1.8x: {gap('kv-mid', '1.8x')}; attention {gap('attn-mid', '1.8x')}, whole layers "
        f"{gap('layer-mid', '1.8x')}",
        "layers": f"the layers of that {gap('kv-mid', '1.8x')}; others were not trained with `kv`. Of whole layers: inner "
        f"{gap('layer-mid')}, alternate {gap('layer-alt')}",
        "operator": f"top-k, which knows whole layers only: {gap('topk-alt', '1.8x')}",
        "p": f"calibration shifts the gates to it; moved to 1.3x and 2.5x: {gap('kv-mid', '1.3x')} and "
        f"{gap('kv-mid', '2.5x')}",
        "gate": "conversion changes no logit; the paper's changes them all (notebook 1) and ends at "
        f"{gap('paper-0.03', '1.8x')}, in one of three seeds with nothing kept",
        "capacity": "top-k only; Raposo et al. take 0.125",
        "keep_recent": f"`demo-kv` without new training, held-out loss and loss on the second copy of a passage 1,024 "
        f"tokens away: {recent}",
        "keep_first": f"the same: {at('keep_first=0')}; four tokens a row cost nothing",
        "kv_cache_dtype": "the model's own type, with which conversion changes no logit; `'int8'` halves what routing leaves, `'k6v4'` leaves a third of it, "
        "and both round ([design.md](design.md#keys-and-values-in-eight-bits))",
        "init_gate": f"open, so that nothing is left out at first; {UNTRIED}",
    }
    train = {
        "objective": f"target; thresholds that follow the gates (`budget`), attention skipped: {gap('attn-mid-budget')} "
        f"against {gap('attn-mid')}",
        "keep_ratio": "in all but three of 16 layers it gives 1.8x; `modlab.recipe` works it out for other depths",
        "what_if": f"none, attention skipped: {gap('attn-mid-whatif0')} against {gap('attn-mid')} with a quarter of the "
        "steps; all of them where every token runs anyway",
        "router_lr": f"the same as the weights'; ten times that, attention skipped: {gap('attn-mid-rlr')} against "
        f"{gap('attn-mid')}",
        "kl": f"1.0 with attention skipped: {gap('attn-mid-kl')} against {gap('attn-mid')}, for a second forward; `kv` at "
        f"{gap('kv-mid')} leaves nothing to gain",
        "freeze_base": f"trained on {gap('kv-mid', '1.8x')} above its control; frozen "
        f"{gap('kv-mid-frozen', '1.8x', 'gap_to_base')} above its own base: routing costs the same, so it is up to "
        "whether the base is to learn",
        "calibrate": f"keep ratios come out within {off:.3f} of what was asked for (docs/quality.md)",
        **dict.fromkeys(("lr", "lam", "ramp", "hold", "per_layer"), UNTRIED),
        "alpha": "the paper's term only: 0.03 "
        f"{gap('paper-0.03')}, 0.1 {gap('paper-0.1')} with nothing kept; 0.01 {UNTRIED}",
    }
    return {"MoDConfig": config, "TrainConfig": train}


def block(root: Path) -> str:
    """The page of the committed results."""
    demo = json.loads((root / "modlab" / "demo" / "kv" / "results.json").read_text(encoding="utf-8"))
    return page(newest_result(root), demo, root)


def recommended() -> list[str]:
    """What the default recipe sets otherwise, field by field."""
    chosen = RECIPES[DEFAULT]
    plain = MoDConfig()
    changed = {
        name: value for name, value in asdict(chosen.mod).items() if value != getattr(plain, name)
    } | chosen.train
    said = ", ".join(f"`{name}={value!r}`" for name, value in changed.items())
    aims = f"aimed at {chosen.kv_saving:g}x, in 16 bits (`kv_cache_dtype='auto'`) at {chosen.kv_savings['auto']:g}x."
    return [f"{said}, {aims}"]


def chosen_by(root: Path) -> list[str]:
    """Why the recipes aim where they do: the worst figures of three models, from their records."""
    found = by_storage(root)

    def worst(name: str, stored: str) -> str:
        rows = [of_recipe(found, name, model, stored) for model in SHIPPED]
        gap = max(max(row["recall_gap"].values()) for row in rows)
        recent = ", ".join(f"{row['recent']}" for row in rows)
        return f"KL of {max(row['kl_far'] for row in rows):.4f} and a recall gap of {gap:.4f} ({recent} recent tokens)"

    def largest(row: dict[str, Any]) -> str:
        far = max(row["recall_gap"], key=lambda distance: row["recall_gap"][distance])
        return f"{row['recall_gap'][far]:.4f} ± {row['recall_gap_stderr'][far]:.4f}"

    recall, kl = LIMITS["default"]
    (left,) = (row for row in found[AUTO]["coder-1.5b"][3.0] if row["recent"] == 683)
    safe = max(max(of_recipe(found, "safe", model)["recall_gap"].values()) for model in SHIPPED)
    rounded = [found[INT8][model][2.0][0] for model in SHIPPED]
    return [
        f"It is to be the highest saving of which a KL of at most {kl:g} and a recall gap of at most {recall:g} were measured on three real",
        f"models ({', '.join(SHIPPED)}; H200). In eight bits that is {RECIPES['default'].kv_saving:g}x of both together, with at most a",
        f"{worst('default', INT8)}, in 16 bits {RECIPES['default'].kv_savings['auto']:g}x, with a",
        f"{worst('default', AUTO)}. The limit is met by less than the error: coder-1.5b has",
        f"{largest(of_recipe(found, 'default', 'coder-1.5b'))} at 6x. **A run of the recipe leaves 683 recent tokens at 3x**, with which it has",
        f"{largest(left)} in 16 bits, and 672 at 6x, with which it was not measured in eight bits.",
        f'`recipe("memory")` is the highest with a recall gap of at most {LIMITS["memory"][0]:g}: {RECIPES["memory"].kv_saving:g}x, a',
        f"{worst('memory', INT8)};",
        f"in 16 bits {RECIPES['memory'].kv_savings['auto']:g}x, a {worst('memory', AUTO)}.",
        "",
        f'`recipe("safe")` stays at 2x by routing alone: a {worst("safe", AUTO)}. At 2x of both together eight bits are',
        f"closer to the dense model, KL at most {max(row['kl_far'] for row in rounded):.4f} and recall gap at most "
        f"{max(max(row['recall_gap'].values()) for row in rounded):.4f} (16 bits: {safe:.4f}), but they save 1.94x to 1.97x of it by",
        "themselves: next to nothing is left out, and a run has nothing to be trained to. Routers of any of these recipes give it:",
        '`modlab.set_kv_cache_dtype(model, "int8")`, then `modlab.set_kv_saving(model, 2)`; eight bits without any training are',
        '`modlab.convert(model, MoDConfig(layers="all", kv_cache_dtype="int8"))`, 1.81x to 1.87x with the index of gates a KV head.',
        '`recipe("quick")` stays at 2x in 16 bits for the same reason, `"distil"` at 4x because that is what was studied.',
        "",
        *without_recipe(root),
        "",
    ]


def without_recipe(root: Path) -> list[str]:
    """Why no recipe stores keys in six bits and values in four, and what that is for."""
    of = records(root, K6V4)
    fewer, eight = settings(of), by_storage(root)[INT8]
    kept = max(max(own_rows(one)[1.0]["recall_gap"].values()) for one in of)
    recall = LIMITS["default"][0]

    def has(rows: Any, saving: float) -> str:
        return "KL of {:.4f} and recall gap of {:.4f}".format(*worst_of_models(rows, saving))

    return [
        '**`kv_cache_dtype="k6v4"`, keys in six bits and values in four, has no recipe**: of 3x, 4x, 6x and 8x the highest with a recall gap of',
        f"at most {recall:g} on all three models is still {RECIPES['default'].kv_saving:g}x, in eight bits. In fewer bits the worst of the three is {kept:.4f} with all keys kept and",
        f"{worst_of_models(fewer, 8.0)[1]:.4f} at 8x; 3x to 6x were not measured. It is for 8x to 16x: at 8x a worst {has(fewer, 8.0)} (eight bits: {has(eight, 8.0)}),",
        f"at 16x a worst {has(fewer, 16.0)} (eight bits: {has(eight, 16.0)}). Routers that ship have it by",
        '`modlab.load("coder-1.5b-kv", kv_cache_dtype="k6v4")`, then `modlab.set_kv_saving(model, 16)`, others by `modlab.set_kv_cache_dtype(model, "k6v4")` before that.',
        "It generates by the ordinary path: fast generation has no kernels for it yet.",
    ]


def page(result: dict[str, Any], demo: dict[str, Any], root: Path) -> str:
    """The text of docs/defaults.md below its heading."""
    rows = pd.DataFrame(result["rows"])
    rows = rows[rows.tokens.between(0.9 * TOKENS, 1.1 * TOKENS)]
    table = summary(rows).set_index(["arm", "point"])

    def gap(arm: str, point: str = "trained", measure: str = "gap") -> str:
        return f"{table.at[(arm, point), measure]:.4f}"

    lines = [
        "`MoDConfig()` and `TrainConfig()` are the plain form of routing: every skip and objective starts from it, and all",
        'figures below are of it. For a model of yours take `modlab.recipe("default", model)`:',
        *recommended(),
        *chosen_by(root),
        "On real models the plain form loses recall over a distance ([results.md](results.md)), the recipe little",
        "([quality.md](quality.md)).",
        "",
        "Written by `python -m scripts.pages`. Unless it says otherwise, a figure is the held-out loss above the",
        "dense continuation in nats a token, 55.6 M parameters, 10 M tokens of conversion at 1.8x KV saving, from",
        "[quality.md](quality.md), where runs and seeds are counted. Where a default was not compared with others, it says",
        "so.",
    ]
    defaults = {"MoDConfig": MoDConfig(), "TrainConfig": TrainConfig()}
    for name, fields in reasons(gap, furthest_off(rows), demo).items():
        lines += ["", f"## {name}", "", "| field | default | |", "|---|---|---|"]
        lines += [
            f"| `{field}` | `{getattr(defaults[name], field)!r}` | {why} |" for field, why in fields.items()
        ]
    lines += [
        "",
        f"{result['device_name']}, {result['dtype']}, torch {result['versions']['torch']}, {result['date'][:10]}; `demo-kv`: "
        f"`{demo['command']}`, {demo['date'][:10]}, torch {demo['torch']}.",
    ]
    return "\n".join(lines)
