"""A report as a page: the figures that decide first, then curves, then every table. Needs no network."""

from __future__ import annotations

import html
import math
from typing import TYPE_CHECKING, Any

from modlab.config import KV_BITS
from modlab.measure.divergence import FAR

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

    from modlab.measure.reporting import Report, Setting

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }
table { border-collapse: collapse; margin: 0.5rem 0 1.5rem; font-variant-numeric: tabular-nums }
th, td { padding: 0.25rem 0.75rem; border-bottom: 1px solid #ddd; text-align: right }
th:first-child, td:first-child { text-align: left }
p.note { color: #555 }
"""
LOOK = {"height": 340, "margin": {"l": 60, "r": 20, "t": 40, "b": 50}, "template": "plotly_white"}


def page(report: Report) -> str:
    """The page of a report."""
    parts = [f"<h1>{html.escape(report.name)}: what routing costs and saves</h1>", _decides(report)]
    curves = [_by_position(report), _by_distance(report)]
    parts += [
        figure.to_html(full_html=False, include_plotlyjs=not number, default_height="340px")
        for number, figure in enumerate(curves)
    ]
    for setting in report.settings:
        parts += _tables(setting)
    if report.source:
        said = "; ".join(f"{key} {value}" for key, value in report.source.items())
        parts.append(f'<p class="note">{html.escape(said)}</p>')
    title = html.escape(report.name)
    head = f'<meta charset="utf-8"><title>{title}</title><style>{STYLE}</style>'
    return f"<!doctype html><html lang=en><head>{head}</head><body>{''.join(parts)}</body></html>\n"


def called(setting: Setting) -> str:
    """How a setting is named on the page."""
    return "present thresholds" if setting.asked is None else f"{setting.asked:g}x asked"


def kl_in_words(setting: Setting) -> str:
    """KL at far positions; rows that end before them have none."""
    found = setting.kl_far
    return f"{found:.4f}" if math.isfinite(found) else f"not measured before position {FAR:,}"


def gap_in_words(setting: Setting) -> str:
    """The largest recall gap, its standard error (of one question there is none), and where it is."""
    worst = setting.recall.loc[setting.recall["gap"].idxmax()]
    error = f" ± {worst['stderr']:.3f}" if math.isfinite(worst["stderr"]) else ""
    return f"{worst['gap']:+.3f}{error} at {int(worst['distance']):,}"


def answers_in_words(setting: Setting) -> str:
    """The share of dense's right answers that routing keeps; a model that answers nothing has none."""
    right = int(setting.retrieval["dense_right"].sum())
    return f"{setting.of_dense:.1%} of {right}" if right else "none: dense gives no right answer"


def _decides(report: Report) -> str:
    """A line a setting: what a reader wants to know in a minute."""
    import pandas as pd

    lines = []
    for setting in report.settings:
        keeps = setting.divergence["keep_ratio"]
        lines.append(
            {
                "setting": called(setting),
                "K/V smaller": f"{setting.kv_saving:.2f}x",
                "kept, by text": f"{keeps.min():.2f} to {keeps.max():.2f}",
                "KL, far": kl_in_words(setting),
                "largest recall gap": gap_in_words(setting),
                "dense's answers kept": answers_in_words(setting),
            }
        )
    bits = KV_BITS.get(report.kv_cache_dtype)
    rounded = f" The routed side stores keys and values in {bits}." if bits else ""
    note = (
        '<p class="note">Dense and routed are the same weights on the same rows, from one load; dropped keys '
        f"are gone.{rounded} KL: nats a token between the two models' predictions from position 1,024 on, "
        "mean of the texts. Recall gap: loss on the second copy of a passage above the dense model's, in "
        "nats a token; ± is the standard error of the paired difference. 0.02 is 2 % of a token's "
        "likelihood.</p>"
    )
    return _table(pd.DataFrame(lines)) + note


def _by_position(report: Report) -> go.Figure:
    import plotly.graph_objects as go

    figure = go.Figure()
    for setting in report.settings:
        for text, lines in setting.divergence.attrs["by_position"].groupby("text", sort=False):
            figure.add_scatter(
                x=lines["position"],
                y=lines["kl"],
                name=html.escape(f"{called(setting)}, {text}"),  # plotly reads tags and entities in names
                mode="lines",
            )
    figure.update_layout(title="KL to the dense model by position", yaxis_rangemode="tozero", **LOOK)
    figure.update_xaxes(title="position in the text (tokens)")
    figure.update_yaxes(title="nats a token")
    return figure


def _by_distance(report: Report) -> go.Figure:
    import plotly.graph_objects as go

    figure = go.Figure()
    for setting in report.settings:
        figure.add_scatter(
            x=setting.recall["distance"],
            y=setting.recall["gap"],
            error_y={"array": setting.recall["stderr"]},
            name=called(setting),
            mode="lines+markers",
        )
    figure.update_layout(title="Recall gap by distance", **LOOK)
    figure.update_xaxes(title="tokens between the two copies", type="log")
    figure.update_yaxes(title="nats a token above dense")
    return figure


def _tables(setting: Setting) -> list[str]:
    tables: dict[str, Any] = {
        "By text": setting.divergence,
        "Recall: loss on the second copy of a passage": setting.recall,
        "Retrieval: values that were assigned to names": setting.retrieval,
        "RULER-kind tasks: answers written": setting.tasks,
    }
    parts = [f"<h2>{html.escape(called(setting))}</h2>"]
    for title, table in tables.items():
        if table is not None:
            parts.append(f"<h3>{title}</h3>{_table(table)}")
    return parts


def _table(frame: pd.DataFrame) -> str:
    found: str = frame.to_html(index=False, border=0, float_format=lambda value: f"{value:.4g}", na_rep="-")
    return found
