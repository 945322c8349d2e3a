"""Figures that were measured elsewhere and are committed with their device, date and command, as tables.

    published.benchmarks()      `modlab bench`, this project's runs (benchmarks/results/*.json)
    published.quality()         what conversion recipes cost in loss (python -m benchmarks.quality)
    published.latencies(case)   of these, milliseconds by keep ratio: one curve
    published.real_models()     what K/V routing costs real models (python -m benchmarks.real_models)
    published.token_classes()   which kinds of tokens real models' routers keep, what each kind loses
    published.kv_latencies()    milliseconds by KV saving, where keys and values are routed
    published.demo()            the demo models on held-out text (modlab/demo/results.json)

The files travel in the package: an installed modlab can draw them next to what this machine measures.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from modlab.errors import ModlabError
from modlab.saving.json_files import read_object

if TYPE_CHECKING:
    import pandas as pd

CURE = "install modlab again, or in a checkout restore the file"
PACKAGE = Path(__file__).resolve().parent
QUALITY = "quality"
GATES, REPORT, MEASURED = "real_gates", "report", "real_measured"
CLASSES = "classes"
SHIPPED = {"smollm2": "mixed-rate-0.003", "coder-0.5b": "mixed", "coder-1.5b": "mixed"}
"""The run of the study whose gates are told of, by real model; none of them ships any more."""
REAL = ("real", GATES, "real_tasks", REPORT, MEASURED, "depth", CLASSES)
"""Kinds of results on what real models lose; docs/quality.md, docs/results.md, docs/log.md."""
PROVENANCE = ("device_name", "dtype", "date", "command")
TIMED = ["device_name", "dtype", "shape", "context", "batch", "case", "routed", "granularity"]
"""Columns that say what was timed: `_timed_name` tells all of them, so that no two things share a name."""
SAME = ("case", "shape", "context", "batch", "routed", "granularity", "skip", "guessed")
"""What makes two rows of one benchmark on one device measurements of one thing, at whatever keep ratio, where
keys and values were stored alike."""
ROUTED = {"alternate": "every other layer routed", "most": "most layers routed", "all": "all layers routed"}


def result_files() -> list[Path]:
    """The benchmark files: inside an installed package, next to it in a checkout.

    Raises:
        ModlabError: there are none.
    """
    for folder in (PACKAGE / "_results", PACKAGE.parent / "benchmarks" / "results"):
        if files := sorted(folder.glob("*.json")):
            return files
    raise ModlabError(
        f"modlab's benchmark results are not where they should be ({PACKAGE / '_results'}): the installation "
        "is incomplete. Install modlab again."
    )


def benchmarks() -> pd.DataFrame:
    """One row a measurement; where several files of a benchmark have the same thing on the same device, the
    newest counts, and what it lacks (another model's shape, say) is that of the file before.

    Columns at least: result (the benchmark: "speed", "growth", ...), case ("prefill", "decode", ...), shape
    (of the model), context (tokens), batch, routed, routed_layers, num_layers, keep_ratio (in the routed
    layers), dense_ms, mod_ms, speedup, ideal, kv_bytes, dense_kv_bytes, kv_saving; and where it comes from:
    device_name, dtype, torch, date, command.
    """
    import pandas as pd

    results = [read_result(path) for path in result_files()]
    newest: dict[tuple[Any, ...], int] = {}
    rows: list[tuple[tuple[Any, ...], int, dict[str, Any]]] = []
    for file, result in sorted(enumerate(results), key=lambda item: _date(item[1])):
        if result["what"] in (QUALITY, *REAL):
            continue
        origin = {name: result[name] for name in PROVENANCE}
        origin |= {"result": result["what"], "torch": result["versions"]["torch"]}
        for row in result["rows"]:
            stored = row.get("kv_cache_dtype", "auto")  # earlier rows do not say: in the model's own type
            same = (result["what"], result["device_name"], stored, *(row.get(name) for name in SAME))
            newest[same] = file
            rows.append((same, file, {**origin, **row}))
    rows.sort(key=lambda told: told[0][:2])
    return pd.DataFrame([row for same, file, row in rows if newest[same] == file])


def quality() -> pd.DataFrame:
    """One row an operating point of a trained arm, from the newest study.

    Columns at least: arm, seed, tokens, point ("trained", or the KV saving that its thresholds were moved
    to), keep_ratio, kv_saving, flops_share, loss, dense_loss, gap, recall_gap (nats). `attrs` holds date,
    command and device_name; there is no row where no study is committed.
    """
    import pandas as pd

    results = [read_result(path) for path in result_files()]
    studies = sorted((result for result in results if result["what"] == QUALITY), key=_date)
    frame = pd.DataFrame(studies[-1]["rows"] if studies else [])
    frame.attrs = {name: studies[-1][name] for name in ("date", "command", "device_name")} if studies else {}
    return frame


def token_classes() -> pd.DataFrame:
    """One row a model's routers, text and class of token, from the newest record of each model.

    Columns: model, routers, saving (that their threshold was set for), text, token_class, tokens, kept (share
    of all gates), dense_loss, loss, loss_excess with its standard error loss_excess_stderr (nats), kl;
    device_name, date, command.
    """
    import pandas as pd

    results = [read_result(path) for path in result_files()]
    newest = {
        (result["model"], result["routers"]): result
        for result in sorted(results, key=_date)
        if result["what"] == CLASSES
    }
    origin = ("model", "routers", "saving", "device_name", "date", "command")
    return pd.DataFrame(
        [{**{name: one[name] for name in origin}, **row} for one in newest.values() for row in one["rows"]]
    )


def latencies(
    case: str, *, device: str = "NVIDIA H200", context: int = 32_768, batch: int = 1
) -> pd.DataFrame:
    """Milliseconds by keep ratio of whole layers on one device, as `modlab bench growth` measured them.

    Args:
        case: "prefill" (of the whole context) or "decode" (one token).
        device: as the result files name it.
        context: tokens.
        batch: rows.

    Returns:
        DataFrame by ascending keep_ratio (of the routed layers) with dense_ms, mod_ms, speedup, ideal;
        `attrs["origin"]` is one sentence on where it comes from.

    Raises:
        ModlabError: there is no such measurement; the message says what there is.
    """
    frame = benchmarks()
    frame = frame[(frame.result == "growth") & (frame.device_name == device)]
    if "skip" in frame:  # the earliest files name none
        frame = frame[frame.skip.fillna("layer") == "layer"]
    chosen = frame[(frame.case == case) & (frame.context == context) & (frame.batch == batch)]
    if chosen.empty:
        keys = frame[["case", "context", "batch"]].drop_duplicates().itertuples(index=False)
        there = "; ".join(f"{c}, context={n}, batch={b}" for c, n, b in keys) or "nothing"
        raise ModlabError(
            f"no {case!r} by keep ratio with context={context}, batch={batch} was measured on {device!r}; "
            f"there is {there}."
        )
    chosen = chosen.sort_values("keep_ratio")
    first = chosen.iloc[0]
    made = chosen[["keep_ratio", "dense_ms", "mod_ms", "speedup", "ideal"]].reset_index(drop=True)
    made.attrs["origin"] = (
        f"{case} of {first['shape']} (random weights, {first.routed_layers:g} of {first.num_layers:g} layers "
        f"routed, batch {batch}, {context:,} tokens, {first['dtype']}) on {device}, {first['date'][:10]}, "
        f"by `{first['command']}`"
    )
    return made


def real_models() -> dict[str, pd.DataFrame]:
    """What K/V routing costs real models, by KV saving: a frame a model and kind of record, of the newest.

    The study's gates a KV head (by its masks) have the model's name; what `modlab report` measured with the
    package's own cache has the model's, the run's where the record names one, and the device's. A record
    with a single saving is no curve and is left out.

    Columns: kv_saving (over all texts, the window included), kl (nats a token to the dense model, positions
    from 1,024 on), agreement (of the likeliest token there), and for each distance in tokens recall_gap_<d>
    (nats on the second copy of a passage, above dense) and lost_<d> (of the questions that the dense model
    answers, the share that is answered no more); for each length in tokens of RULER-kind tasks task_gap_<n>
    (their mean score below dense's). What has a gap is left out. `attrs["origin"]` is one sentence on where
    it comes from.
    """
    found = {}
    for result in sorted((read_result(path) for path in result_files()), key=_date):
        if result["what"] == REPORT:
            name, rows, about = _report_name(result), result["rows"], ", by the package's own cache"
        elif result["what"] == GATES and result["model"] in SHIPPED:
            name, about = result["model"], ", gates a KV head"
            rows = [row for row in result["rows"] if _is_shipped(name, row)]
        else:
            continue
        if len(rows) > 1:
            found[name] = _real_frame(result, rows, about)
    return found


def _report_name(result: dict[str, Any]) -> str:
    run = result["rows"][0].get("run") if result["rows"] else None
    of_run = f" {run}" if run else ""
    return f"{result['model']}{of_run}, modlab report on {result['device_name']}"


def _real_frame(result: dict[str, Any], rows: list[dict[str, Any]], about: str) -> pd.DataFrame:
    import pandas as pd

    frame = pd.DataFrame([_gates_row(row) for row in rows])
    frame = frame.sort_values("kv_saving").reset_index(drop=True).dropna(axis="columns")
    note = f" {result['note']}" if result.get("note") else ""
    frame.attrs["origin"] = (
        f"{result.get('base', result['model'])}{about}, on {result['device_name']}, "
        f"{str(result['date'])[:10]}, by `{result['command']}`.{note}"
    )
    return frame


def _is_shipped(model: str, row: dict[str, Any]) -> bool:
    """Whether a row is of the gates that are told of, at a saving: not a control, nothing with all kept."""
    return row["run"] == SHIPPED[model] and ":" not in row["arm"] and row["ratio_asked"] > 1


def _gates_row(row: dict[str, Any]) -> dict[str, float | None]:
    agreement = row["top1_far_by_text"].values()
    lost = {d: None if share is None else 1 - share for d, share in row["retrieval_of_dense"].items()}
    return {
        "kv_saving": row["ratio"],
        "kl": row["kl_far"],
        "agreement": None if None in agreement else sum(agreement) / len(agreement),
        **{f"recall_gap_{distance}": gap for distance, gap in row["recall_gap"].items()},
        **{f"lost_{distance}": share for distance, share in lost.items()},
        **_task_gaps(row.get("tasks") or {}),
    }


def _task_gaps(tasks: dict[str, Any]) -> dict[str, float]:
    """Of tasks named "<task> <length>" with two scores: dense's mean less the routed one's, by length."""
    gaps: dict[str, list[float]] = {}
    for name, told in tasks.items():
        length = name.rpartition(" ")[2]
        if length.isdigit() and isinstance(told, dict) and "dense" in told:
            gaps.setdefault(f"task_gap_{length}", []).append(told["dense"] - told["score"])
    return {name: sum(of) / len(of) for name, of in gaps.items()}


def kv_latencies() -> dict[str, pd.DataFrame]:
    """Milliseconds by KV saving with `skip="kv"`, a frame for each thing timed, by a name for people.

    Columns by ascending kv_saving: kv_saving, dense_ms, mod_ms; on a machine with other work these are CPU
    time where the record has it. A frame is of one result file: where several timed the same thing, the
    newest counts. `attrs["origin"]` is one sentence on where it comes from.
    """
    frame = benchmarks()
    if "skip" not in frame:
        return {}
    if "kv_cache_dtype" in frame:  # rows are told apart by their KV saving alone
        frame = frame[frame.kv_cache_dtype.isin(["auto"]) | frame.kv_cache_dtype.isna()]
    frame = frame[(frame.skip == "kv") & frame.case.isin(["prefill", "decode"])]
    found = {}
    for _, part in frame.groupby(TIMED, dropna=False):
        part = part[part.result == part.sort_values("date", kind="stable").result.iloc[-1]]
        first = part.iloc[0]
        cpu_time = "dense_cpu_ms" in part and bool(part.dense_cpu_ms.notna().all())
        names = ("dense_cpu_ms", "mod_cpu_ms") if cpu_time else ("dense_ms", "mod_ms")
        made = part[["kv_saving", *names]].sort_values("kv_saving").reset_index(drop=True)
        made.columns = ["kv_saving", "dense_ms", "mod_ms"]
        made.attrs["origin"] = (
            f"{first.case} of {first['shape']} ({first.routed_layers:g} of {first.num_layers:g} layers "
            f"routed, batch {first.batch:g}, {first.context:,.0f} tokens, {first['dtype']}) on "
            f"{first.device_name}, "
            f"{first.date[:10]}, by `{first.command}`" + (", CPU time of a busy machine" if cpu_time else "")
        )
        found[_timed_name(first)] = made
    return found


def _timed_name(row: Any) -> str:
    what = "time to the first token" if row.case == "prefill" else "time for a further token"
    gates = {"layer": ", a gate a layer", "kv_head": ", a gate a KV head"}.get(row.granularity, "")
    rows = f", {row.batch:g} rows" if row.batch > 1 else ""
    return (
        f"{what}: {row['shape']} shape, {row.context:,.0f} tokens{rows}, {row.device_name}, {row['dtype']}, "
        f"{ROUTED.get(row.routed, row.routed)}{gates}"
    )


def read_result(path: Path) -> dict[str, Any]:
    """One file of results, which has rows and says where they come from."""
    result = read_object(path, CURE)
    rows = result.get("rows")
    missing = [name for name in ("what", *PROVENANCE, "versions") if name not in result]
    if missing or not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ModlabError(f"{str(path)!r} is no file of results ({', '.join(missing) or 'rows'}): {CURE}.")
    if not isinstance(result["versions"], dict) or "torch" not in result["versions"]:
        raise ModlabError(f"{str(path)!r} does not say with which torch it was measured: {CURE}.")
    return result


def _date(result: dict[str, Any]) -> str:
    return str(result["date"])


def demo() -> pd.DataFrame:
    """The demo models on held-out text, one row a model: loss (nats a token), perplexity, tokens, and of the
    converted one keep_ratio and kv_saving. `attrs` holds date, command and dtype.
    """
    import pandas as pd

    record = read_object(PACKAGE / "demo" / "results.json", CURE)
    if missing := [name for name in ("results", "date", "command", "dtype") if name not in record]:
        raise ModlabError(f"the results of the demo lack {missing[0]!r}: {CURE}.")
    frame = pd.DataFrame.from_dict(record["results"], orient="index")
    frame.attrs = {name: record[name] for name in ("date", "command", "dtype")}
    return frame
