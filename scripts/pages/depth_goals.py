"""The first table of the depth section of docs/quality.md: what is asked, and what results give.

The goals are those of less compute a token on real models. A line a goal and model, "not run" where no
result has it. Of several arms of one form the one nearest to the dense model counts.
"""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from scripts.pages.depth import family

DECIDING = ("coder-0.5b", "coder-1.5b")
TEXTS = ("novels", "wikitext", "headers")
LIKE_TRAINING = "novels"
"""Of the texts, the one nearest to the rows that thresholds are set on."""
TASKS, HALF_TASKS, RECALL, KL, COMPUTE = 0.99, 0.97, 0.02, 0.06, 0.02
RATIO = 3.85
"""A cache is 4x smaller from here on: ratios are had within some hundredths of what is asked."""
PROMPTS = (("coder-1.5b", 32_768, 1.8), ("llama-3-8b", 32_768, 1.75), ("llama-3-8b", 131_072, 2.6))
LEVELS = (0.9, 0.8)
BY_TOKEN = ("written", "sublayers", "mlp")

Row = dict[str, Any]
NOT_RUN = "not run"
DRAWN = "random weights, drawn decisions"


def block(root: Path) -> str:
    """The table."""
    results = [
        json.loads(path.read_text(encoding="utf-8"))
        for path in sorted((root / "benchmarks" / "results").glob("*.json"))
        if path.name.startswith(("depth_", "speed_leave_"))
    ]
    rows = [row for result in results if result["what"] == "depth" for row in result["rows"]]
    lines = [
        *(line for model in DECIDING for line in _speed(model, rows)),
        *_prompts(results),
        *(line for model in DECIDING for line in _half(model, rows)),
        *(line for level in LEVELS for line in _by_token(level, rows)),
        *_paper(rows),
    ]
    head = ["| | asked | got | |", "|---|---|---|---|"]
    return "\n".join([*head, *(f"| {' | '.join(cells)} |" for cells in lines)])


Cells = tuple[str, str, str, str]


def _leaving(model: str, rows: Iterable[Row], after: float) -> Row | None:
    """The trained arm of a model's that leaves there with a cache 4x smaller and has the least KL."""
    found = []
    for row in rows:
        mod = row.get("arm_fields", {}).get("mod", {})
        here = mod.get("skip") == "kv+prompt" and abs(mod.get("leave_after", 0) - after) < 0.01
        if row["model"] == model and here and row["tokens"] and (row.get("ratio") or 0) >= RATIO:
            found.append(row)
    return min(found, key=lambda row: float(row["kl_far"]), default=None)


def _speed(model: str, rows: list[Row]) -> Iterator[Cells]:
    row = _leaving(model, rows, 2 / 3)
    what = f"{model}: leaving after 2/3, K/V at 4x"
    if row is not None:
        what += f" (`{row['arm']}`, {row['tokens'] / 1e6:.3g}M tokens)"
    yield what, f"tasks {TASKS:.0%} of dense", *_tasks(row, TASKS)
    if row is None:
        yield "", f"recall gap at most {RECALL:g} at every distance", NOT_RUN, ""
        yield "", f"KL at most {KL:g}", NOT_RUN, ""
        return
    gaps: dict[str, float] = row["recall_gap"]
    far = max(gaps, key=gaps.__getitem__)
    said = f"{gaps[far]:+.3f}, {int(far):,} tokens away"
    yield "", f"recall gap at most {RECALL:g} at every distance", said, _met(gaps[far] <= RECALL)
    yield "", f"KL at most {KL:g}", f"{row['kl_far']:.3f}", _met(row["kl_far"] <= KL)


def _tasks(row: Row | None, asked: float) -> tuple[str, str]:
    mean = None if row is None else row["tasks"].get("mean")
    if row is None or mean is None:
        return NOT_RUN, ""
    share, error = mean["score"] / mean["dense"], mean["gap_stderr"] / mean["dense"]
    names = [name for name in row["tasks"] if name != "mean"]
    without = "" if "humaneval" in names else "; HumanEval not run"
    return f"{share:.1%} ± {error:.1%}, mean of {len(names)}", _met(share >= asked) + without


def _prompts(results: list[dict[str, Any]]) -> Iterator[Cells]:
    """With the model's own weights and trained routers where that was run, else of its shape alone."""
    for model, context, asked in PROMPTS:
        what = f"{model}: a prompt of {context:,} tokens through `generate`, leaving after 2/3, K/V at 4x"
        own = sorted(_timed(results, model, context), key=lambda row: (row["routing"], row["date"]))
        if not own:
            yield what, f"{asked:g}x of dense", NOT_RUN, ""
            continue
        row = own[-1]
        # A note says what is wrong with a time, see `_timed`.
        met = "not settled" if row["note"] else _met(row["speedup"] >= asked)
        trained = row["routing"] == "trained"
        by = f"{row['ratio']:.1f}x by trained routers, its own weights" if trained else DRAWN
        rounds = ", one round" if row.get("rounds") == 1 else ""
        if model in DECIDING and not trained:
            met = f"{met}; {NOT_RUN} with its own weights"
        got = f"{row['speedup']:.2f}x ({by}{rounds}; by operations {row['ideal']:.2f}x)"
        yield what, f"{asked:g}x of dense", ". ".join(filter(None, [got, row["note"]])), met


def _timed(results: list[dict[str, Any]], model: str, context: int) -> Iterator[Row]:
    """One prompt alone at a quarter of the cache by KV head, from either kind of result. What is to be said
    of times stands in the note of a result that has nothing else; notes of the others are about training."""
    for result in results:
        alone = "prefill" not in result
        known = {"date": result["date"], "note": result.get("note", "") if alone else ""}
        for row in result["rows"] if alone else result["prefill"]:
            one = {"routing": "drawn", "granularity": "kv_head", **known, **row}
            trained = one["routing"] == "trained"
            enough = row.get("ratio", 0) >= RATIO if trained else row.get("keep_ratio") == 0.25
            form = (one["granularity"], row.get("skip")) == ("kv_head", "kv+prompt")
            here = (row.get("model") or row.get("shape"), row.get("context"), row.get("batch"))
            if row.get("case") in ("prompt", "prefill") and here == (model, context, 1) and form and enough:
                yield one


def _half(model: str, rows: list[Row]) -> Iterator[Cells]:
    row = _leaving(model, rows, 1 / 2)
    what = f"{model}: leaving after a half, K/V at 4x"
    if row is None:
        yield what, f"tasks {HALF_TASKS:.0%} of dense; all figures stated", NOT_RUN, ""
        return
    said, met = _tasks(row, HALF_TASKS)
    gap = max(row["recall_gap"].values())
    got = f"tasks {said}; KL {row['kl_far']:.3f}, recall gap {gap:+.3f}, {row['tokens'] / 1e6:.3g}M tokens"
    yield what, f"tasks {HALF_TASKS:.0%} of dense; all figures stated", got, met


def _by_token(level: float, rows: list[Row]) -> Iterator[Cells]:
    """A model at a time: the better of its token-level arms against the better of its static ones."""
    asked = "better than static removal on two of three texts, and on tasks beyond the error"
    models = [*DECIDING[:1], *sorted({row["model"] for row in rows} - set(DECIDING))]
    for model in models:
        own = [row for row in rows if row["model"] == model and row.get("compute_asked") == level]
        token, static = (
            min(
                (row for row in own if family(row["arm"]) in kinds),
                key=lambda r: float(r["kl_far"]),
                default=None,
            )
            for kinds in (BY_TOKEN, ("static",))
        )
        what = f"{model}: token by token at {level:g} of the operations"
        if token is None:
            if model in DECIDING:
                yield what, asked, NOT_RUN, ""
            continue
        if static is None:
            yield what, asked, f"`{token['arm']}`: nothing to compare with was run", ""
        else:
            yield what, asked, *_against(token, static)
        got = token["compute_by_text"]
        said = ", ".join(f"{name} {share:.3f}" for name, share in got.items())
        near = abs(got[LIKE_TRAINING] - level) <= COMPUTE
        yield (
            "",
            f"{level:g} of the operations, within {COMPUTE:g} on text like that of the threshold",
            said,
            _met(near),
        )


def _against(token: Row, static: Row) -> tuple[str, str]:
    texts = [name for name in TEXTS if token["kl_far_by_text"][name] < static["kl_far_by_text"][name]]
    means = [row["tasks"].get("mean") for row in (token, static)]
    trained = "" if token["tokens"] or static["tokens"] else ", nothing trained"
    got = (
        f"KL {token['kl_far']:.3f} (`{token['arm']}`) and {static['kl_far']:.3f} (`{static['arm']}`"
        f"{trained}): better on {len(texts)} of {len(TEXTS)}"
    )
    if None in means:
        return f"{got}; tasks {NOT_RUN}", _met(False) if len(texts) < 2 else ""
    gap = means[0]["score"] - means[1]["score"]
    error = (means[0]["gap_stderr"] ** 2 + means[1]["gap_stderr"] ** 2) ** 0.5
    return f"{got}; tasks {gap:+.3f} ± {error:.3f}", _met(len(texts) >= 2 and gap > error)


def _paper(rows: list[Row]) -> Iterator[Cells]:
    found = [row for row in rows if family(row["arm"]) == "paper" and row["tokens"]]
    asked = "tokens, KV ratio, loss and time stated"
    if not found:
        yield "the paper's recipe on a real model", asked, NOT_RUN, ""
    for row in found:
        got = (
            f"`{row['arm']}`: {row['tokens'] / 1e6:.3g}M tokens, {row['compute']:.2f} of the operations "
            f"({_operations(row)}), K/V {row['ratio']:.2f}x, KL {row['kl_far']:.3f}; loss "
            f"{_losses(row)}; time {_latency(row)}"
        )
        yield f"{row['model']}: the paper's recipe", asked, got, ""


def _operations(row: Row) -> str:
    """Of each text that has them: alpha asks for no share, and each text gets its own."""
    return ", ".join(f"{name} {share:.2f}" for name, share in row["compute_by_text"].items())


def _losses(row: Row) -> str:
    """Of the counted texts, and the dense model's."""
    if "loss_by_text" not in row:
        return NOT_RUN
    both = ((row["loss_by_text"][name], row["dense_loss_by_text"][name], name) for name in TEXTS)
    return ", ".join(f"{name} {own:.2f} (dense {dense:.2f})" for own, dense, name in both)


def _latency(row: Row) -> str:
    took = row.get("latency")
    if took is None:
        return NOT_RUN
    said = f"{took['speedup']:.2f}x of dense for a prompt of {took['context']:,} tokens"
    return f"{said}, {took['token_speedup']:.2f}x for a token after it"


def _met(met: bool) -> str:
    return "met" if met else "missed"
