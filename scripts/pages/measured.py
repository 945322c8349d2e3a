"""docs/quality.md: what routing of real models is asked for, and what it gives (`real_models join`)."""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modlab.published import MEASURED

SAVINGS = (2.0, 4.0, 8.0, 16.0)
CLOSE = 0.04
"""A ratio may be so much (as a share) below the one asked: what is met below that is said to be met there."""
PASSED = 0.5
"""The dense model passes a task whose score it has, and answers questions at a distance where that share of
them is right."""
AUTO, INT8, K6V4 = "auto", "int8", "k6v4"
"""How keys and values were stored: in the model's own type, in eight bits, keys in six and values in four."""
MEASURED_AT = {K6V4: (8.0, 16.0)}
"""Which of `SAVINGS` were measured, where not all: tables have no columns for others."""
BEST = {2.0: INT8, 4.0: INT8, 8.0: INT8, 16.0: K6V4}
"""How keys and values are stored where more of what is asked is met than in other ways."""
WORDS = {INT8: "eight bits", K6V4: "six bits and four"}
HALVED = 2.0
"""The saving at which eight bits with all keys kept are a control: they take about so much less."""
VARIES = ", "
"""In an arm's name before what it does otherwise than the routers that ship, which are the arm before it."""
MET, MISSED, UNKNOWN = "met", "**missed**", "not measured"
NONE = "No run is committed yet: `python -m benchmarks.real_models measure` fills the table."


@dataclass(frozen=True)
class Found:
    """A figure, its standard error if it has one, and how they are written."""

    value: float
    error: float | None = None
    form: str = ".3f"

    def __str__(self) -> str:
        error = "" if self.error is None else f" ± {self.error:{self.form}}"
        return f"{self.value:{self.form}}{error}"


Read = Callable[[dict[str, Any], list[dict[str, Any]]], Found | None]
"""Of a row at a saving, and of the controls at the same."""


def _kl(row: dict[str, Any], controls: list[dict[str, Any]]) -> Found | None:
    return Found(row["kl_far"], form=".4f") if "kl_far" in row else None


def _recall(row: dict[str, Any], controls: list[dict[str, Any]]) -> Found | None:
    if "recall_gap" not in row:
        return None
    far = max(row["recall_gap"], key=lambda distance: row["recall_gap"][distance])
    return Found(row["recall_gap"][far], row["recall_gap_stderr"][far])


def _retrieval(row: dict[str, Any], controls: list[dict[str, Any]]) -> Found | None:
    dense = row.get("retrieval_dense", {})
    shares = [share for d, share in row.get("retrieval_of_dense", {}).items() if dense.get(d, 1) >= PASSED]
    return Found(min(shares)) if shares else None


def _of(row: dict[str, Any], kind: str) -> list[dict[str, Any]]:
    return [task for task in row["tasks"].values() if task["kind"] == kind]


def _ruler(row: dict[str, Any], controls: list[dict[str, Any]]) -> Found | None:
    passed = [task for task in _of(row, "ruler") if task["dense"] >= PASSED]
    if not passed:
        return None
    dense = sum(task["dense"] for task in passed)
    error = math.sqrt(sum(task["stderr"] ** 2 for task in passed)) / dense
    return Found(sum(task["score"] for task in passed) / dense, error)


def _points(kind: str) -> Read:
    """Mean points below dense of the tasks of a kind."""

    def read(row: dict[str, Any], controls: list[dict[str, Any]]) -> Found | None:
        tasks = _of(row, kind)
        if not tasks:
            return None
        error = math.sqrt(sum(task["stderr"] ** 2 for task in tasks)) / len(tasks)
        return Found(-100 * sum(task["difference"] for task in tasks) / len(tasks), 100 * error, ".2f")

    return read


def _against(read: Read) -> Read:
    """The gates' figure over the best control's."""

    def ratio(row: dict[str, Any], controls: list[dict[str, Any]]) -> Found | None:
        own = read(row, [])
        others = [found.value for control in controls if (found := read(control, []))]
        if own is None or not others:
            return None
        return Found(own.value / min(others) if min(others) > 0 else math.inf, form=".2f")

    return ratio


@dataclass(frozen=True)
class Aim:
    """A row of the table: what, the same in a word or two, how it is read, what it may be at each of
    `SAVINGS` (None: it is only told), whether that is the least, and whether it is held against controls."""

    what: str
    short: str
    read: Read
    limits: tuple[float | None, ...]
    least: bool = False
    compares: bool = False

    def limit(self, saving: float) -> float | None:
        return dict(zip(SAVINGS, self.limits, strict=True))[saving]

    def cell(self, limit: float | None, found: Found | None) -> str:
        if limit is None:
            return "-" if found is None else str(found)
        verdict, sign = self.verdict(limit, found), "≥" if self.least else "≤"
        return verdict if found is None else f"{found}, {sign} {limit:.3g}: {verdict}"

    def verdict(self, limit: float, found: Found | None) -> str:
        if found is None:
            return UNKNOWN
        met = found.value >= limit if self.least else found.value <= limit
        return MET if met else MISSED


AIMS = (
    Aim("KL to dense, positions from 1,024, mean of three texts", "KL", _kl, (0.004, 0.015, 0.04, 0.10)),
    Aim(
        "loss on a passage's second copy above dense, worst distance", "worst recall gap", _recall,
        (0.01, 0.02, 0.05, 0.12),
    ),
    Aim(
        "retrieval, of dense's answers, worst distance", "worst retrieval", _retrieval,
        (0.99, 0.98, 0.95, 0.85), least=True,
    ),
    Aim(
        "RULER-kind tasks that dense passes, of dense's score", "RULER-kind, of dense's", _ruler,
        (0.99, 0.97, 0.93, None), least=True,
    ),
    Aim(
        "HumanEval behind other code, points below dense", "HumanEval, points", _points("humaneval"),
        (1, 2, 3, None),
    ),
    Aim("many shots, mean points below dense", "many shots, points", _points("shots"), (0.3, 0.5, 1.5, None)),
    Aim("KL over the best control's", "", _against(_kl), (None, 1 / 3, 1 / 3, None), compares=True),
    Aim(
        "worst recall gap over the best control's", "", _against(_recall), (None, 1 / 3, 1 / 3, None),
        compares=True,
    ),
)  # fmt: skip


def records(root: Path, stored: str = AUTO) -> list[dict[str, Any]]:
    """The newest record of each model and arm, those that ship before those that vary them.

    Args:
        stored: how keys and values were stored; no list has both.
    """
    files = sorted((root / "benchmarks" / "results").glob("real_*_20*.json"))
    read = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    newest: dict[tuple[str, bool, str], dict[str, Any]] = {}
    found = [one for one in read if one["what"] == MEASURED and _stored(one) == stored]
    for record in sorted(found, key=lambda one: str(one["date"])):
        newest[record["model"], not ships(record), record["arm"]] = record
    return [newest[name] for name in sorted(newest)]


def ships(record: dict[str, Any]) -> bool:
    """Whether a record is of routers that ship, or did; not of a variation that did no better."""
    return VARIES not in record["arm"]


def block(root: Path, stored: str = AUTO) -> str:
    """A table a model: what was asked, what was got, whether that is enough; then its tasks and controls. A
    variation of what ships has a short table."""
    found = records(root, stored)
    parts = [_model(record) if ships(record) else _variation(record) for record in found]
    return "\n\n".join(parts) if parts else NONE


def verdicts(root: Path, stored: str = AUTO) -> str:
    """One table for all models: which of them meet what is asked, which miss it, with what they have, and of
    which nothing is known."""
    columns = [(f"{saving:g}x", saving, stored) for saving in MEASURED_AT.get(stored, SAVINGS)]
    return _verdicts(root, columns)


def best_verdicts(root: Path) -> str:
    """The same with each saving stored as does best there, by most of what is asked."""
    return _verdicts(root, [(f"{saving:g}x, {WORDS[kind]}", saving, kind) for saving, kind in BEST.items()])


def _verdicts(root: Path, columns: list[tuple[str, float, str]]) -> str:
    """Columns are a title, a saving and how keys and values are stored."""
    kinds = {stored for _, _, stored in columns}
    found = {kind: [record for record in records(root, kind) if ships(record)] for kind in kinds}
    if not any(found.values()):
        return NONE
    lines = ["| | " + " | ".join(title for title, _, _ in columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for aim in AIMS:
        cells = [_verdict(found[kind], aim, saving, aim.limit(saving)) for _, saving, kind in columns]
        lines.append(f"| {aim.what} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _verdict(found: list[dict[str, Any]], aim: Aim, saving: float, limit: float | None) -> str:
    if limit is None:
        return "-"
    of: dict[str, list[str]] = {MET: [], MISSED: [], UNKNOWN: []}
    for record in found:
        row = own_rows(record).get(saving)
        figure = aim.read(row, _controls_of(record, saving)) if row else None
        got = "" if figure is None else f" ({figure})"
        of[aim.verdict(limit, figure)].append(f"{record['model']}{got}")
    told = "; ".join(f"{verdict}: {', '.join(models)}" for verdict, models in of.items() if models)
    return f"{'≥' if aim.least else '≤'} {limit:.3g}: {told}"


def own_rows(record: dict[str, Any]) -> dict[float, dict[str, Any]]:
    """A record's own rows by saving: no controls, no other recent tokens."""
    return {row["ratio_asked"]: row for row in record["rows"] if row["arm"] == record["arm"]}


def _model(record: dict[str, Any]) -> str:
    rows = own_rows(record)
    savings = MEASURED_AT.get(_stored(record), SAVINGS)
    controls = {s: _controls_of(record, s) for s in savings}
    floor = rows.get(1.0, {}).get("kl_far")
    lines = [
        _origin(record)
        + ("" if floor is None else f" With all keys kept the KL is {floor:.4f}: {_kept(rows[1.0], record)}.")
        + (f" Failed: {', '.join(record['failed'])}." if record.get("failed") else "")
        + _answers(rows.get(1.0, {})),
        "",
        "| | " + " | ".join(f"{saving:g}x" for saving in savings) + " |",
        "|---" * (len(savings) + 1) + "|",
        "| recent tokens | " + " | ".join(_recent(rows.get(s, {})) for s in savings) + " |",
        "| ratio got, together (by text) | " + " | ".join(_ratio(rows.get(s, {}), s) for s in savings) + " |",
    ]
    for aim in AIMS:
        cells = [
            aim.cell(aim.limit(saving), aim.read(rows[saving], controls[saving]) if saving in rows else None)
            for saving in savings
        ]
        lines.append(f"| {aim.what} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, *_others(record), *_tasks(rows, savings), *_controls(rows, controls)])


def _origin(record: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    return (
        f"**{record['model']}**, routers {record['arm']!r} ({record['tokens']:,} tokens), "
        f"{record['device_name']}, {record['dtype']}, {versions}, {record['date'][:10]}, commit "
        f"{str(record['commit'])[:7]}, `{record['command']}`. {record['note']}"
    )


def _kept(row: dict[str, Any], record: dict[str, Any]) -> str:
    """What makes a difference where all keys are kept."""
    stored = WORDS.get(_stored(record))
    return "rounding" if stored is None else f"{stored}, {row['ratio']:.2f}x"


def _answers(row: dict[str, Any]) -> str:
    """At which distances retrieval is not counted, as the dense model does not pass it there."""
    dense = row.get("retrieval_dense", {})
    if all(share >= PASSED for share in dense.values()):
        return ""
    told = ", ".join(f"{share:.3g} at {int(distance):,}" for distance, share in dense.items())
    return f" The dense model answers {told} tokens: retrieval counts where that is {PASSED:g} at least."


def _variation(record: dict[str, Any]) -> str:
    rows = [row for saving, row in own_rows(record).items() if saving > 1]
    return "\n".join([_origin(record), *_short(rows, "not shipped")])


def _controls_of(record: dict[str, Any], saving: float) -> list[dict[str, Any]]:
    begins = f"{record['arm']}: "
    found = [row for row in record["rows"] if row["arm"].startswith(begins) and row["ratio_asked"] == saving]
    if saving == HALVED and _stored(record) == INT8 and "kl_far" in (kept := own_rows(record).get(1.0, {})):
        found.append({**kept, "arm": begins + "eight bits alone"})
    return found


def _stored(record: dict[str, Any]) -> str:
    return str(record.get("kv_cache_dtype", AUTO))


def of_gates(row: dict[str, Any], record: dict[str, Any]) -> bool:
    """Whether a row is of the record's own gates, with whatever recent tokens; no control."""
    rest = row["arm"].removeprefix(record["arm"])
    return row["arm"].startswith(record["arm"]) and (not rest or rest.startswith(VARIES)) and ": " not in rest


def _others(record: dict[str, Any]) -> list[str]:
    """Settings that no column of the table is for: other savings, and a saving with other recent tokens."""
    rows = [row for row in record["rows"] if of_gates(row, record)]
    own = (1.0, *MEASURED_AT.get(_stored(record), SAVINGS))
    return _short(
        [row for row in rows if row["arm"] != record["arm"] or row["ratio_asked"] not in own], "also"
    )


def _short(rows: list[dict[str, Any]], title: str) -> list[str]:
    """A line a row, without limits."""
    told = [aim for aim in AIMS if not aim.compares]
    lines = []
    for row in rows:
        cells = [aim.cell(None, aim.read(row, [])) for aim in told]
        asked = row["ratio_asked"]
        lines.append(f"| {asked:g}x | {_recent(row)} | {_ratio(row, asked)} | {' | '.join(cells)} |")
    head = ["", f"| {title} | recent | got (by text) | " + " | ".join(aim.short for aim in told) + " |"]
    return [*head, "|---" * (len(told) + 3) + "|", *lines] if lines else []


def _recent(row: dict[str, Any]) -> str:
    return f"{row['recent']:,}" if "recent" in row else "-"


def _ratio(row: dict[str, Any], asked: float) -> str:
    if "ratio" not in row:
        return "not measured"
    texts = row["ratio_by_text"].values()
    short = " **(less than asked)**" if row["ratio"] < asked * (1 - CLOSE) else ""
    return f"{row['ratio']:.2f}x ({min(texts):.1f}x to {max(texts):.1f}x){short}"


def _tasks(rows: dict[float, dict[str, Any]], savings: tuple[float, ...]) -> list[str]:
    told = {name: task for s in savings if s in rows for name, task in rows[s]["tasks"].items()}
    if not told:
        return []
    lines = ["", "| task | items | dense | " + " | ".join(f"{saving:g}x" for saving in savings) + " |"]
    lines.append("|---" * (len(savings) + 3) + "|")
    for name, task in told.items():
        cells = []
        for saving in savings:
            one = rows.get(saving, {"tasks": {}})["tasks"].get(name)
            cells.append(
                "-" if one is None else f"{one['score']:.3f} ({one['difference']:+.3f} ± {one['stderr']:.3f})"
            )
        lines.append(f"| {name} | {task['items']} | {task['dense']:.3f} | " + " | ".join(cells) + " |")
    return lines


def _controls(rows: dict[float, dict[str, Any]], controls: dict[float, list[dict[str, Any]]]) -> list[str]:
    lines: list[str] = []
    for saving, others in controls.items():
        for row in [rows[saving], *others] if others and saving in rows and "ratio" in rows[saving] else []:
            name = row["arm"].partition(": ")[2] or "**gates**"
            gaps = " ".join(f"{gap:.3f}" for gap in row["recall_gap"].values())
            lines.append(f"| {name} | {saving:g}x | {row['ratio']:.2f}x | {row['kl_far']:.4f} | {gaps} |")
    head = ["", "| at equal bytes | asked | got | KL | recall gap, by distance |", "|---|---|---|---|---|"]
    return head + lines if lines else []
