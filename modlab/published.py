"""Figures that were measured elsewhere and are committed with their device, date and command, as tables.

    published.benchmarks()      `modlab bench`, this project's runs (benchmarks/results/*.json)
    published.quality()         what conversion recipes cost in loss (python -m benchmarks.quality)
    published.latencies(case)   of these, milliseconds by keep ratio: one curve
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
REAL = ("real", "real_gates", "real_tasks")  # of real models; docs/quality.md, docs/results.md, docs/log.md
PROVENANCE = ("device_name", "dtype", "date", "command")


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
    """One row a measurement; of several results for the same thing on the same device the newest counts.

    Columns at least: result (the benchmark: "speed", "growth", ...), case ("prefill", "decode", ...), shape
    (of the model), context (tokens), batch, routed, routed_layers, num_layers, keep_ratio (in the routed
    layers), dense_ms, mod_ms, speedup, ideal, kv_bytes, dense_kv_bytes, kv_saving; and where it comes from:
    device_name, dtype, torch, date, command.
    """
    import pandas as pd

    results = [read_result(path) for path in result_files()]
    newest: dict[tuple[str, str], dict[str, Any]] = {}
    for result in sorted(results, key=_date):
        if result["what"] not in (QUALITY, *REAL):
            newest[result["what"], result["device_name"]] = result
    rows: list[dict[str, Any]] = []
    for _, result in sorted(newest.items()):
        origin = {name: result[name] for name in PROVENANCE}
        origin |= {"result": result["what"], "torch": result["versions"]["torch"]}
        rows += [{**origin, **row} for row in result["rows"]]
    return pd.DataFrame(rows)


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


def latencies(
    case: str, *, device: str = "NVIDIA H200", context: int = 32_768, batch: int = 1
) -> pd.DataFrame:
    """Milliseconds by keep ratio on one device, as `modlab bench growth` measured them.

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
