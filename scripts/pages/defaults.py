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
from scripts.pages.quality import furthest_off, newest_result, summary

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
        "kv_cache_dtype": "the model's own type, with which conversion changes no logit; `'int8'` halves what routing leaves, "
        "and rounds ([design.md](design.md#keys-and-values-in-eight-bits))",
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
    return page(newest_result(root), demo)


def recommended() -> list[str]:
    """What the default recipe sets otherwise, field by field."""
    chosen = RECIPES[DEFAULT]
    plain = MoDConfig()
    changed = {
        name: value for name, value in asdict(chosen.mod).items() if value != getattr(plain, name)
    } | chosen.train
    said = ", ".join(f"`{name}={value!r}`" for name, value in changed.items())
    return [f"{said}, aimed at {chosen.kv_saving:g}x."]


def page(result: dict[str, Any], demo: dict[str, Any]) -> str:
    """The text of docs/defaults.md below its heading."""
    rows = pd.DataFrame(result["rows"])
    rows = rows[rows.tokens.between(0.9 * TOKENS, 1.1 * TOKENS)]
    table = summary(rows).set_index(["arm", "point"])

    def gap(arm: str, point: str = "trained", measure: str = "gap") -> str:
        return f"{table.at[(arm, point), measure]:.4f}"

    lines = [
        "`MoDConfig()` and `TrainConfig()` are the plain form of routing: every skip and objective starts from it, and all",
        "figures below are of it. For a model of yours take `modlab.recipe(\"default\", model)`:",
        *recommended(),
        "It is to be the highest saving of which a KL and a recall gap of at most .02 were measured on three real models, each with",
        "the best number of recent tokens that was tried. That is what 3x has with 683 (smollm2, Qwen2.5-Coder-0.5B) and 512 (1.5B);",
        "**with the 683 that a run of the recipe leaves at 3x the largest of them has .0203 ± .0026**, and .0188 ± .0028 with 512: no",
        "difference beyond the errors. `recipe(\"safe\")` stays at 2x, of which a KL of .0021 and a recall gap of .018 are the worst figures.",
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
