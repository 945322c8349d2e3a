"""The front page's figures: what routing saves and what it costs, each from its result file."""

import json
import textwrap
from pathlib import Path
from typing import Any

import pandas as pd

from modlab.recipes import RECIPES
from scripts.pages.measured import AUTO, INT8, K6V4, records, ships
from scripts.pages.quality import PLAIN, summary
from scripts.pages.real_models import STORED, Settings, by_storage, of_recipe, settings, worst_of_models
from scripts.pages.results import newest, newest_headline, results

REAL = "Qwen2.5-Coder-0.5B-Instruct"
Row = tuple[str, str, str, str]


def why(root: Path) -> str:
    """The one number: what a smaller cache is good for."""
    suite = newest_headline(root, "speed_kv")
    (row,) = _kv_rows(suite, "throughput")
    return _wrapped(
        f"**Why.** Of a Llama-3-8B-shaped model with {row['context']:,} tokens a row, {row['batch']} rows "
        f"instead of {row['dense_batch']} fit on one {suite['device_name']} once three quarters of the keys "
        f"and values are dropped: **{row['speedup']:.2f}x as many tokens a second**."
    )


def real_sentence(root: Path) -> str:
    """What the plain form, trained on the loss of the text, does to a real model."""
    at = _settings(_real(root, REAL))
    dense, routed, moved = at["dense"], at["routers"], at["routers, moved"]
    distances = "/".join(f"{r['distance']:,}" for r in dense["recall"])
    found, before = ([f"{r['right']:.2f}" for r in row["retrieval"]] for row in (moved, dense))
    return _wrapped(
        "The loss of the text as the only objective does not do. With routers in the inner layers alone "
        f"(`MoDConfig()`, the plain form, base frozen) {REAL.removesuffix('-Instruct')} **loses verbatim "
        f"recall at {routed['kv_saving']:.1f}x**: the loss on Python text stays ({dense['loss_python']:.3f} "
        f"dense, {routed['loss_python']:.3f} routed), but on the second copy of a passage {distances} tokens "
        f"after the first it rises from {_losses(dense)} to {_losses(routed)} nats. With thresholds moved to "
        f"{moved['kv_saving']:.0f}x, a value assigned to a name and asked for later is found in {min(found)} "
        f"to {max(found)} of the cases instead of {min(before)} to {max(before)}."
    )


def distilled_sentence(root: Path) -> str:
    """What the package's own distillation reaches on real models, by recipe."""
    small, large, least = (_measured(root, name) for name in ("coder-0.5b", "coder-1.5b", "smollm2"))
    found = by_storage(root)
    made, by_recipe = small["training"], RECIPES["default"]
    default, memory, safe = _by_recipe(found, "coder-0.5b", "default", "memory", "safe")
    plain = of_recipe(found, "default", "coder-0.5b", AUTO)
    more, most = (
        " and ".join(_lost(row) for row in _by_recipe(found, name, "default", "memory"))
        for name in ("coder-1.5b", "smollm2")
    )
    fewest = worst_of_models(settings(records(root, K6V4)), 16.0)[1]
    eight = worst_of_models(found[INT8], 16.0)[1]
    return _wrapped(
        '**`recipe("default")` distils routers to the dense model itself** and stores what they keep in '
        f"eight bits, for {by_recipe.kv_saving:g}x less K/V: after {made['seconds'] / 60:.1f} minutes of "
        f"training on one {small['device_name']} ({made['tokens'] / 1e6:.0f} M tokens) Qwen2.5-Coder-0.5B "
        f"stores {default['ratio']:.1f}x less at a KL of {default['kl_far']:.4f} to its dense self, and at "
        f"most {_gap(default)} nats of recall are lost up to {max(map(int, default['recall_gap'])):,} "
        f'tokens. In 16 bits, `kv_cache_dtype="auto"`, it aims at {by_recipe.kv_savings["auto"]:g}x: '
        f'{_lost(plain)}. `recipe("memory")` aims at {RECIPES["memory"].kv_saving:g}x: {_lost(memory)}; '
        f'`recipe("safe")` at {RECIPES["safe"].kv_saving:g}x, nothing rounded: {_lost(safe)}. Its sibling of '
        f"1.5 B, after {large['tokens'] / 1e6:.1f} M tokens: {more}. SmolLM2-135M, after "
        f"{least['tokens'] / 1e6:.1f} M: {most}. Beyond that recall falls. At 16x, which no recipe aims at, "
        f"the three lose at most {fewest:.3f} nats of it with keys in six bits and values in four "
        f'(`kv_cache_dtype="k6v4"`, no kernels yet), at most {eight:.3f} with eight.'
    )


def _measured(root: Path, model: str) -> dict[str, Any]:
    """The newest record of a model's routers that ship, at ratios that it really has."""
    return next(one for one in records(root) if one["model"] == model and ships(one))


def _by_recipe(found: dict[str, Settings], model: str, *names: str) -> list[dict[str, Any]]:
    """A model's rows at these recipes' savings."""
    return [of_recipe(found, name, model) for name in names]


def _lost(row: dict[str, Any]) -> str:
    return f"at {row['ratio']:.1f}x they are {row['kl_far']:.4f} and {_gap(row)}"


def _gap(row: dict[str, Any]) -> str:
    return f"{max(row['recall_gap'].values()):.3f}"


def costs(root: Path) -> str:
    """One table: the forms of routing, what each saves, what each costs."""
    return _table(
        ("", "measured on", "saves", "costs"), [*_real_rows(root), *_quality_rows(root), *_time_rows(root)]
    )


def real_table(root: Path) -> str:
    """Every setting that was tried on real models, a table a model."""
    parts = []
    for record in sorted((r for r in results(root) if r["what"] == "real"), key=lambda r: str(r["model"])):
        distances = [r["distance"] for r in record["rows"][0]["recall"]]
        head = ["setting", "K/V", "Python", *(f"recall {d:,}" for d in distances)]
        asked = "retrieval" in record["rows"][0]
        head += [f"retrieval {d:,}" for d in distances] if asked else []
        lines = []
        for row in record["rows"]:
            cells = [
                f"{row['setting']}: {row['why']}",
                f"{row['kv_saving']:.1f}x",
                f"{row['loss_python']:.3f}",
            ]
            cells += [f"{r['second_loss']:.2f}" for r in row["recall"]]
            cells += [f"{r['right']:.2f}" for r in row.get("retrieval", ())]
            lines.append(tuple(cells))
        parts.append(f"{record['model']}. {record['note']}\n\n{_table(tuple(head), lines)}")
    return "\n\n".join(parts)


def _real_rows(root: Path) -> list[Row]:
    at = _settings(_real(root, REAL))
    dense = at["dense"]
    rows, found = [], by_storage(root)
    for name, model in (("coder-0.5b", "0.5B"), ("coder-1.5b", "1.5B")):
        rows += [
            _distilled_row(of_recipe(found, recipe, name), recipe, model) for recipe in ("default", "memory")
        ]
    for name, title in (
        ("routers", "cache, plain form (`MoDConfig()`, loss of the text)"),
        ("routers, moved", "the same routers, thresholds moved"),
    ):
        row = at[name]
        far = [r for r in row["recall"] if r["distance"] == 1024][0]["second_loss"]
        near = [r for r in dense["recall"] if r["distance"] == 1024][0]["second_loss"]
        rows.append(
            (
                title,
                REAL.removesuffix("-Instruct"),
                f"K/V {row['kv_saving']:.1f}x",
                f"{row['loss_python'] - dense['loss_python']:+.3f} nats on Python, "
                f"**{far - near:+.2f}** on a passage seen 1,024 tokens before",
            )
        )
    return rows


def _distilled_row(row: dict[str, Any], name: str, size: str) -> Row:
    gap = row["recall_gap"]["1024"]
    return (
        f"cache {STORED[RECIPES[name].mod.kv_cache_dtype]}, recipe `{name}`",
        f"Qwen2.5-Coder-{size}",
        f"K/V {row['ratio']:.1f}x",
        f"KL {row['kl_far']:.3f}, {gap:+.3f} nats on a passage seen 1,024 tokens before",
    )


def _quality_rows(root: Path) -> list[Row]:
    file = sorted((root / "benchmarks" / "results").glob("quality_*.json"))[-1]
    study = pd.DataFrame(json.loads(file.read_text(encoding="utf-8"))["rows"])
    table = summary(study[study.tokens == study.tokens.min()])
    table = table[table.point == "trained"].set_index("arm")
    rows = []
    for arm, title in (
        (PLAIN, "cache, plain form"),
        ("layer-mid", "whole layers, recipe `layers`"),
        ("paper-0.03", "whole layers, the paper's recipe"),
        ("static", "control: layers left out for all tokens"),
    ):
        row = table.loc[arm]
        work = f", {row.flops_share:.2f} of the operations" if row.flops_share < 1 else ""
        spread = f" ± {row.gap_sd:.4f}" if row.runs > 1 else ""
        rows.append(
            (title, "own model, 56 M", f"K/V {row.kv_saving:.2f}x{work}", f"{row.gap:+.4f}{spread} nats")
        )
    return rows


def _time_rows(root: Path) -> list[Row]:
    said = "not measured: tokens kept at random"
    suite = newest_headline(root, "speed_kv")
    device = suite["device_name"].removeprefix("NVIDIA ")
    prefill, decode, (full,) = (_kv_rows(suite, case) for case in ("prefill", "decode", "throughput"))
    speed = [r for r in _suite(root)["rows"] if r["context"] == 32_768 and r["batch"] == 1]
    fast = {
        case: [r["speedup"] for r in speed if r["case"] == case and r["keep_ratio"] < 1]
        for case in ("prefill", "decode")
    }
    return [
        (
            "cache, a quarter kept, one row of 32k",
            f"8B shape, {device}",
            f"prefill {_speedups(prefill)}, decode {_speedups(decode)}",
            said,
        ),
        (
            "cache, a quarter kept, as many rows of 32k as fit",
            f"8B shape, {device}",
            f"{full['speedup']:.2f}x tokens a second",
            said,
        ),
        (
            "whole layers, one row of 32k",
            "8B shape, H200",
            f"prefill {_range(fast['prefill'])}, decode {_range(fast['decode'])}",
            said,
        ),
    ]


def _kv_rows(suite: dict[str, Any], case: str) -> list[dict[str, Any]]:
    """Of the cache alone, a quarter kept, 32k tokens: one row, or as many as fit."""
    rows = [r for r in suite["rows"] if (r["case"], r["context"], r["keep_ratio"]) == (case, 32_768, 0.25)]
    return [row for row in rows if case == "throughput" or row["batch"] == 1]


def _speedups(rows: list[dict[str, Any]]) -> str:
    return _range([row["speedup"] for row in rows])


def _range(values: list[float]) -> str:
    low, high = f"{min(values):.2f}x", f"{max(values):.2f}x"
    return low if low == high else f"{low} to {high}"


def _losses(row: dict[str, Any]) -> str:
    return "/".join(f"{r['second_loss']:.2f}" for r in row["recall"])


def _real(root: Path, model: str) -> dict[str, Any]:
    (record,) = (r for r in results(root) if r["what"] == "real" and r["model"] == model)
    return record


def _settings(record: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {row["setting"]: row for row in record["rows"]}


def _suite(root: Path) -> dict[str, Any]:
    (suite,) = newest(r for r in results(root) if r["what"] == "speed")
    return suite


def _wrapped(text: str) -> str:
    return textwrap.fill(text, 120, break_long_words=False, break_on_hyphens=False)


def _table(head: tuple[str, ...], rows: list[Any]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
