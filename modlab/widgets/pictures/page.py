"""What the browser gets: the data of one trace, and the page that needs no Jupyter."""

from __future__ import annotations

import base64
import hashlib
import html
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from modlab.config import KV_BITS
from modlab.errors import ModlabError
from modlab.widgets.pictures.script import GRID, script, styles
from modlab.widgets.pictures.words import words

if TYPE_CHECKING:
    import pandas as pd

    from modlab.traces.routing_trace import RoutingTrace

MAX_TOKENS = 65_536
NEAR, FINE = 0.01, 6000  # how close to 0 or 1 four decimals are too few; values sent besides them


def fine_values(trace: RoutingTrace) -> NDArray[np.float32]:
    """float32[at most FINE], ascending: values that the browser needs besides all of four decimals, which
    tell little apart close to 0 and 1, where gates of real models lie: gates there, and the thresholds."""
    near = trace.gate[(trace.gate < NEAR) | (trace.gate > 1 - NEAR)]
    values = np.setdiff1d(np.unique(near), grid())
    values = values[(values > 0) & (values < 1)]
    if len(values) > FINE - len(trace.layers):
        values = values[np.linspace(0, len(values) - 1, FINE - len(trace.layers)).astype(int)]
    return np.setdiff1d(np.union1d(values, trace.thresholds), grid()).astype("<f4")


def grid() -> NDArray[np.float32]:
    """float32[GRID]: all values of four decimals above 0."""
    return (np.arange(1, GRID + 1) / GRID).astype(np.float32)


def gate_bytes(trace: RoutingTrace, fine: NDArray[np.float32] | None = None) -> bytes:
    """Gates and decisions for the browser: two bytes a cell, row after row of uint16[R, T].

    Bits 0..13: how many values of the table (`grid` and `fine_values`) lie at or under the gate. Comparing
    that with the place of p in the table decides exactly as `gate >= p` does in float32, for every p in it.
    Bit 15: the decision that was executed.
    """
    table = np.union1d(grid(), fine_values(trace) if fine is None else fine)
    level = np.searchsorted(table, trace.gate.ravel(), side="right").astype("<u2")
    return (level | (trace.keep.ravel().astype("<u2") << 15)).astype("<u2").tobytes()


def payload(trace: RoutingTrace) -> dict[str, Any]:
    """The data traits of one trace, by the names that js/store.js reads.

    Raises:
        ModlabError: the trace has more than MAX_TOKENS tokens.
    """
    if len(trace.tokens) > MAX_TOKENS:
        raise ModlabError(
            f"The trace has {len(trace.tokens):,} tokens; the views draw at most {MAX_TOKENS:,}. "
            f"Show a part, trace.part(0, {MAX_TOKENS}), or work with trace.gate and trace.keep directly."
        )
    p, fine = representative_threshold(trace), fine_values(trace)
    return {
        "tokens": list(trace.tokens),
        "gates": gate_bytes(trace, fine),
        "fine": fine.tobytes(),
        "losses": trace.loss.astype("<f4").tobytes(),
        "layers": [int(i) for i in trace.layers],
        "num_layers": int(trace.num_layers),
        "keep_first": int(trace.keep_first),
        "threshold": p,
        "summary": summary(trace),
        "group": group_of(trace),
    }


def summary(
    trace: RoutingTrace, kv_bytes: int | None = None, dense_bytes: int | None = None
) -> dict[str, Any]:
    """The figures of the traced run. K/V bytes: allocated ones if given, else the kept tokens' own."""
    dense, said = trace.kv_bytes_per_token * trace.num_layers * len(trace.tokens), words(trace.skip)
    return {
        "p": representative_threshold(trace),
        "ps": [float(x) for x in trace.thresholds],
        "varies": bool(len(trace.thresholds)) and float(np.ptp(trace.thresholds)) > 0,
        "kv_bytes": round(dense / trace.kv_saving) if kv_bytes is None else int(kv_bytes),
        "dense_bytes": dense if dense_bytes is None else int(dense_bytes),
        "token_bytes": said["saves"] * trace.kv_bytes_per_token,
        "stored_bytes": said["saves"] * trace.stored_bytes_per_token,
        "kv_cache_dtype": trace.kv_cache_dtype,
        "bits": KV_BITS.get(trace.kv_cache_dtype, ""),
        "recent": trace.keep_recent,
        "keep_ratio": float(trace.keep.mean()),
        "by_ratio": by_ratio(trace),
        "words": said,
        "loss": None if np.isnan(trace.mean_loss) else trace.mean_loss,
        "model": trace.model,
    }


def by_ratio(trace: RoutingTrace) -> bool:
    """Whether a slider asks which share is kept instead of p: gates that were fitted or distilled on a real
    model, one a KV head, lie close to 0 or 1, where p itself says little."""
    p = representative_threshold(trace)
    return len(set(trace.layers)) < len(trace.layers) or not NEAR <= p <= 1 - NEAR


def keeping_one_in(trace: RoutingTrace, ratios: Sequence[float]) -> list[float]:
    """The thresholds at which the gates of this trace keep one token in each of `ratios`; ones that gates
    cannot tell apart once."""
    found = np.quantile(trace.gate, [1 - 1 / ratio for ratio in ratios], method="higher")
    return sorted({float(p) for p in found if 0 < p < 1})


def group_of(trace: RoutingTrace) -> str:
    """A name that all traces of the same tokens share: their views mark the same token."""
    digest = hashlib.sha256(trace.token_ids.tobytes() + trace.text.encode("utf-8", "surrogatepass"))
    return digest.hexdigest()[:16]


def representative_threshold(trace: RoutingTrace) -> float:
    """One p for the slider: that of the rows if they agree, else their mean; four decimals, or as exact as it
    is where these say little."""
    p = float(trace.thresholds[0] if np.ptp(trace.thresholds) == 0 else trace.thresholds.mean())
    return round(p, 4) if NEAR <= p <= 1 - NEAR else p


def curve(sweep: pd.DataFrame | None) -> list[dict[str, float]]:
    """Points of the curve view from a `modlab.sweep` frame, by ascending threshold.

    Raises:
        ModlabError: a column is missing.
    """
    if sweep is None:
        return []
    need = ["threshold", "kv_bytes", "loss"]
    missing = [name for name in need if name not in sweep.columns]
    if missing:
        raise ModlabError(
            f"The sweep has no column {', '.join(missing)}; it has {', '.join(map(str, sweep.columns))}. "
            "Pass the frame that modlab.sweep(model, tokenizer, texts, thresholds=...) returns."
        )
    rows = sweep[need].dropna().astype(float).sort_values("threshold")
    return [dict(zip(("p", "kv_bytes", "loss"), row, strict=True)) for row in rows.itertuples(index=False)]


def trace_page(trace: RoutingTrace) -> str:
    """The explorer of one trace, without a kernel."""
    values = {**payload(trace), "can_run": False, "points": [], "runs": [], "job": {}}
    values |= {"layer_thresholds": [], "cursor": -1, "locked": False, "layer": -1}
    values |= {"budget": {}, "text_note": "", "forms": []}
    title = f"Routing of {len(trace.tokens):,} tokens, {trace.model or 'model'}"
    return html_page("explorer", values, title)


def html_page(view: str, values: dict[str, Any], title: str) -> str:
    """A whole page for one view: its widget without a kernel, nothing loaded from outside.

    Args:
        view: its file in js/.
        values: its traits; bytes travel as base64.
        title: of the page.
    """
    binary = [name for name, value in values.items() if isinstance(value, bytes)]
    data = {**values, **{n: base64.b64encode(values[n]).decode("ascii") for n in binary}}
    # "<" is escaped because a token may well be "</script>".
    embedded = json.dumps(data).replace("<", "\\u003c")
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{html.escape(title)}</title>
<style>
{styles()}
body {{ margin: 0 auto; padding: 16px; max-width: 1180px; background: var(--mod-ground); }}
</style>
</head>
<body class="modlab-page">
<main id="modlab"></main>
<noscript>This page draws with JavaScript, which is turned off.</noscript>
<script type="application/json" id="modlab-data">{embedded}</script>
<script type="module">
{script(view)}
const values = JSON.parse(document.getElementById("modlab-data").textContent);
showPage(document.getElementById("modlab"), values, {json.dumps(binary)});
</script>
</body>
</html>
"""
