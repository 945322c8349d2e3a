"""What was measured: speed, memory, loss and recall, from the committed result files.

Reads modlab/demo/results.json and modlab/demo/kv/results.json (the demos' own scripts) and
benchmarks/results/*.json (`modlab bench`). Of several results for one thing on one device the newest counts;
in the suites of `SHAPED`, which may run in parts, of each shape and row.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

DEMO_CARD = "../modlab/demo/README.md"
KV_CARD = "../modlab/demo/kv/README.md"
# growth is drawn: speed.py
TABLES = ("speed", "speed_kv", "speed_leave", "generate", "throughput", "prefill", "decode", "demo")
SHAPED = ("speed_kv", "speed_leave")  # measured for several shapes, each of which counts, and in parts
SAME_ROW = (
    "case", "what", "shape", "context", "routed", "granularity", "skip", "prompt", "tokens", "guessed",
)  # fmt: skip
"""What, with keep ratio and batch, makes two rows of a suite on one device measurements of one thing."""
AUTO, INT8 = "auto", "int8"
"""How keys and values were stored: in the model's own type, in eight bits."""
GATES = {"layer": "a gate a layer", "kv_head": "a gate a KV head", "none": "-"}
HEADLINE = "llama-3-8b"
DEMO_NAMES = {
    "dense": "dense",
    "dense_continuation": "dense, trained on for as long",
    "mod": "Mixture-of-Depths",
}


def demo_table(record: dict[str, Any]) -> str:
    """What the demo's conversion costs in loss and saves in memory."""
    lines = [
        f"`demo`, which skips whole layers ({record['parameters'] / 1e6:.1f} M parameters), on other "
        f"held-out files ({record['results']['mod']['tokens']:,} predicted tokens, {record['dtype']}):",
        "",
        "| model | held-out loss (nats a token) | tokens kept in routed layers | KV cache |",
        "|---|---|---|---|",
    ]
    for name, title in DEMO_NAMES.items():
        result = record["results"][name]
        kept = f"{result['keep_ratio']:.0%}" if "keep_ratio" in result else "all"
        saving = f"{result['kv_saving']:.2f}x smaller" if "kv_saving" in result else "1x"
        lines.append(f"| {title} | {result['loss']:.3f} | {kept} | {saving} |")
    lines += [
        "",
        f"Made by `{record['command']}` on {record['date'][:10]}; all of it is in [the card]({DEMO_CARD}).",
    ]
    return "\n".join(lines)


def kv_table(record: dict[str, Any]) -> str:
    """What routing the cache alone costs in loss and saves in memory, recall at a distance included."""
    lines = [
        "`demo-kv`: the dense model's own weights with routers for its cache (every token passes every "
        "layer), on held-out Python files "
        f"({record['results']['demo-kv']['tokens']:,} predicted tokens). Below, the same weights with other "
        "keys and values, which no router chose:",
        "",
        "| model | held-out loss | the same, second copy of a passage 1,024 tokens after the first "
        "| keys and values kept in routed layers | KV cache |",
        "|---|---|---|---|---|",
    ]
    for name, result in record["results"].items():
        kept = f"{result['keep_ratio']:.0%}" if "keep_ratio" in result else "all"
        saving = f"{result['kv_saving']:.2f}x smaller" if "kv_saving" in result else "1x"
        recall = next(r["second_loss"] for r in result["recall"] if r["distance"] == 1024)
        title = f"{name}: {result['why']}" if "why" in result else f"`{name}`"
        lines.append(f"| {title} | {result['loss']:.3f} | {recall:.3f} | {kept} | {saving} |")
    lines += [
        "",
        f"Made by `{record['command']}` on {record['date'][:10]}; all of it is in [the card]({KV_CARD}).",
    ]
    return "\n".join(lines)


def newest(results: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The newest result of each benchmark and device, by name; of those in `SHAPED`, the newest rows of each
    shape."""
    found: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for result in sorted(results, key=lambda result: result["date"]):
        shape = result["settings"]["shape"] if result["what"] in SHAPED else ""
        found.setdefault((result["what"], result["device_name"], shape), []).append(result)
    return [joined(found[key]) if key[0] in SHAPED else found[key][-1] for key in sorted(found)]


def joined(results: list[dict[str, Any]]) -> dict[str, Any]:
    """Several results of one suite, device and shape, the oldest first, as the newest with the newest row of
    everything that was measured: each row's `run` is its result's place in `of`, which lists those that have
    any."""
    newest: dict[tuple[Any, ...], tuple[int, dict[str, Any]]] = {}
    for number, result in enumerate(results):
        newest |= {_measured(row): (number, row) for row in result["rows"]}
    left = sorted({number for number, _ in newest.values()})
    rows = [row | {"run": left.index(number)} for number, row in newest.values()]
    return results[-1] | {"rows": rows, "of": [results[number] for number in left]}


def _measured(row: dict[str, Any]) -> tuple[Any, ...]:
    """What a row is of. The largest batch is a figure itself."""
    batch = None if row["case"] == "throughput" else row["batch"]
    return (*(row.get(name) for name in SAME_ROW), batch, round(row["keep_ratio"], 3))


def notes(result: dict[str, Any]) -> list[str]:
    """What the rows of a result say besides the times, one sentence each."""
    lines = []
    for row in result["rows"]:
        if row["case"] == "peak" and "dense_engine_peak_bytes" not in row:
            lines.append(
                f"- Peak memory of the {row['context']:,}-token prefill, above the weights: "
                f"{row['dense_peak_bytes'] / 1e9:.1f} GB with this engine and no routing, "
                f"{row['mod_peak_bytes'] / 1e9:.1f} GB routed, {gates_of(row)} "
                f"({row['peak_saving']:.2f}x), of which {row['kv_bytes'] / 1e9:.1f} GB are keys and values."
            )
        elif row["case"] == "peak":
            lines.append(
                f"- Peak memory of the {row['context']:,}-token prefill, above the weights: "
                f"{row['dense_peak_bytes'] / 1e9:.1f} GB in stock transformers, "
                f"{row['dense_engine_peak_bytes'] / 1e9:.1f} GB with this engine and no routing, "
                f"{row['mod_peak_bytes'] / 1e9:.1f} GB routed ({row['peak_saving']:.2f}x of stock, "
                f"{row['dense_engine_peak_bytes'] / row['mod_peak_bytes']:.2f}x by routing). "
                "The times of that row are stock's and ours."
            )
        if row["case"] == "throughput":
            lines.append(
                f"- Largest batch whose cache fits at {row['context']:,} tokens: {row['dense_batch']} rows "
                f"and {row['dense_tokens_per_s']:,.0f} tokens/s dense, {row['batch']} rows and "
                f"{row['mod_tokens_per_s']:,.0f} tokens/s routed. {_room(row)}"
            )
        if row["case"] == "baseline" and row["what"] == "decode":
            lines.append(
                "- The dense side of prefill and decode is this engine with routing off: "
                f"{row['mod_ms']:.2f} ms a token at {row['context']:,} tokens, where "
                f"transformers' compiled static cache takes {row['dense_ms']:.2f} ms."
            )
        if row.get("bandwidth_share") and row["keep_ratio"] == 1.0:
            lines.append(
                f"- Dense decoding at {row['context']:,} tokens reads {row['dense_tb_s']:.2f} TB/s, "
                f"{row['bandwidth_share']:.0%} of what a copy moves on this machine."
            )
    return lines


def _room(row: dict[str, Any]) -> str:
    """What has to fit in a row's largest batch."""
    if "mod_prefill_ms_a_row" in row:
        return (
            "The prefill of its last line has to fit as well; random keys stand in for the lines before it."
        )
    return (
        "Decoding steps alone: random keys stand in for the prompts, whose prefill would need somewhat more "
        "room."
    )


def bench_table(result: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """Time and memory against the dense model, one row a measurement, under its command."""
    gates = any("granularity" in row for row in rows)
    of = result.get("of", [result])
    several = len(of) > 1
    lines = [
        f"With {skipped_words(result)}: {runs(of)}",
        "",
        f"| | model | batch x tokens |{' gates |' * gates} routed layers | kept | dense | MoD | speed-up "
        f"| ideal | KV saving | rounds |{' run |' * several}",
        f"|---|---|---|{'---|' * gates}---|---|---|---|---|---|---|---|{'---|' * several}",
    ]
    for row in rows:
        unequal = row.get("tokens", 0) != row["batch"] * row["context"] and "tokens" in row
        saving = f"{row['kv_saving']:.2f}x" if row["case"] != "train" else "-"
        lines.append(
            f"| {row['case']} | {row['shape']} "
            f"| {row['batch']} x {'up to ' if unequal else ''}{row['context']:,} "
            f"{'| ' + gates_of(row) + ' ' if gates else ''}"
            f"| {row['routed_layers']} of {row['num_layers']} "
            f"| {share(row['keep_ratio'])} | {duration(row['dense_ms'])} | {duration(row['mod_ms'])} "
            f"| {row['speedup']:.2f}x | {row['ideal']:.2f}x | {saving} "
            f"| {row.get('rounds', '')} |" + f" {row.get('run', 0) + 1} |" * several
        )
    return "\n".join(lines)


def runs(of: list[dict[str, Any]]) -> str:
    """Where rows come from, under what conditions: the command of one result, or of each by its number."""
    told = [
        f"`{one['command']}` on {one['device_name']}, {one['dtype']}, torch {one['versions']['torch']}, "
        f"{one['date'][:10]}"
        for one in of
    ]
    notes = [_aside(one["note"]) if one.get("note") else "" for one in of]
    if len(told) == 1:
        return f"{told[0]}{notes[0]}:"
    commits = [f", commit {str(one['commit'])[:7]}" if one.get("commit") else "" for one in of]
    every = zip(told, commits, notes, strict=True)
    return "; ".join(f"({n}) {one}{commit}{note}" for n, (one, commit, note) in enumerate(every, 1)) + ":"


def _aside(note: str) -> str:
    """A sentence in parentheses."""
    return f" ({note[0].lower()}{note[1:].rstrip('.')})"


def gates_of(row: dict[str, Any]) -> str:
    """Who decides in the models of a row."""
    if row["skip"] == "layer":
        return "whole layers" + ", on guesses" * row.get("guessed", False)
    return GATES[row["granularity"]]


def skipped(result: dict[str, Any]) -> str:
    """What a token that is not kept leaves out in the models of a result; the earliest files name nothing."""
    by_case = {"speed_kv": "kv", "speed_leave": "kv+prompt"}  # whatever the settings say
    return by_case.get(result["what"]) or str(result.get("settings", {}).get("skip", "layer"))


def skipped_words(result: dict[str, Any]) -> str:
    """The same as a table's caption has it."""
    more = ' and, where nothing is said of gates, `skip="prompt"`' if result["what"] == "speed_leave" else ""
    eight = ", keys and values in eight bits against dense ones in 16" if _stored(result) == INT8 else ""
    return f'`skip="{skipped(result)}"`{more}{eight}'


def share(part: float) -> str:
    """A share in percent, to a tenth where it has one: an eighth is 12.5%."""
    return f"{round(100 * part, 1):g}%"


def duration(ms: float) -> str:
    """Milliseconds with as many digits as mean something."""
    return f"{ms:,.1f} ms" if ms >= 100 else f"{ms:.2f} ms"


def is_headline(row: dict[str, Any]) -> bool:
    """Rows of the GPU suite that stand outside the fold: long contexts and batches."""
    return row["case"] != "baseline" and (row["context"] >= 32768 or row["batch"] > 1)


def bench_section(results: list[dict[str, Any]]) -> list[str]:
    """What the default routing (of keys and values) and the GPU suite show at length, notes on it,
    and all else in a fold."""
    parts, folded = [], []
    for result in results:
        rows = [row for row in result["rows"] if row["case"] != "baseline"]
        if result["what"] in ("speed", "speed_kv", "speed_leave") or skipped(result) == "kv":
            parts.append(bench_table(result, [row for row in rows if is_headline(row)]))
            parts.append("\n".join(notes(result)).strip())
            rows = [row for row in rows if not is_headline(row)]
        if rows:
            folded.append(bench_table(result, rows))
    fold = ["<details><summary>Short prompts, a 70B shape, two CPU cores</summary>", *folded, "</details>"]
    return [part for part in (*parts, *fold) if part]


def results(root: Path, stored: str = AUTO) -> list[dict[str, Any]]:
    """All result files directly in benchmarks/results. Times with keys and values in eight bits
    (stored="int8") are not measurements of the same things as others, and stand by themselves."""
    files = sorted((root / "benchmarks" / "results").glob("*.json"))
    found = (json.loads(path.read_text(encoding="utf-8")) for path in files)
    return [result for result in found if (_stored(result) == INT8) == (stored == INT8)]


def _stored(result: dict[str, Any]) -> str:
    """How a result's models stored keys and values."""
    return str(result.get("settings", {}).get("kv_cache_dtype", AUTO))


def demos(root: Path) -> str:
    """The two demo models, on held-out text."""
    demo = root / "modlab" / "demo"
    kv, layers = (
        json.loads((demo / name).read_text("utf-8")) for name in ("kv/results.json", "results.json")
    )
    return f"{kv_table(kv)}\n\n{demo_table(layers)}"


def benchmarks(root: Path) -> str:
    """Times and memory against the dense model, the default routing first."""
    stored = (results(root, kind) for kind in (AUTO, INT8))
    chosen = [found for some in stored for found in newest(one for one in some if one["what"] in TABLES)]
    chosen.sort(
        key=lambda result: (
            result["what"] != "speed_kv",
            _stored(result) != INT8,
            result["what"] != "speed_leave",
            skipped(result) != "kv",
        )
    )
    return "\n\n".join(bench_section(chosen)) if chosen else "No result files are in the repository yet."


def headline_speed(root: Path) -> str:
    """The newest run of each GPU suite on any device, long contexts and batches only.

    Raises:
        SystemExit: a suite has no result for `HEADLINE`.
    """
    tables = []
    for what in ("speed_kv", "speed_leave", "speed"):
        suite = newest_headline(root, what)
        rows = [row for row in suite["rows"] if is_headline(row) and row["case"] in ("prefill", "decode")]
        if what != "speed":  # an eighth is in docs/results.md
            rows = [row for row in rows if row["keep_ratio"] in (0.25, 1.0)]
        if what == "speed_leave":  # and its decoding is that of the first table
            rows = [row for row in rows if row["case"] == "prefill"]
        tables.append(bench_table(suite, rows))
    return "\n\n".join(tables)


def newest_headline(root: Path, what: str) -> dict[str, Any]:
    """The newest rows of a suite for the shape `HEADLINE`, on the device with the newest result.

    Raises:
        SystemExit: there is none.
    """
    of = (r for r in results(root) if r["what"] == what and r["settings"]["shape"] == HEADLINE)
    found = newest(of)
    if not found:
        raise SystemExit(
            f"No result of `modlab bench {what} --shape {HEADLINE}` is in benchmarks/results: the headline "
            "of the speed tables needs one. Run it and commit its file."
        )
    return max(found, key=lambda result: str(result["date"]))
