"""`modlab sweep`: loss, memory and time at several thresholds."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from modlab.cli.flags import Command, add_kv_cache_dtype, read_name, read_path
from modlab.cli.models import (
    add_data_flags,
    add_model_flags,
    launched,
    load_model,
    row_length,
    rows_of,
    store_as_asked,
)
from modlab.errors import ModlabError

if TYPE_CHECKING:
    import pandas


def add(command: Command) -> None:
    """The parser of this command."""
    sub = command(
        "sweep",
        run,
        "measure loss, memory and time of a converted model at several thresholds",
        "One row a threshold. Give --text, --text-file or --data.",
    )
    sub.add_argument("model", metavar="MODEL", type=read_name, help="converted model")
    sub.add_argument("--text", metavar="TEXT", nargs="+", default=[], help="text to measure on")
    sub.add_argument(
        "--text-file", metavar="FILE", type=read_path, nargs="+", default=[], help="UTF-8 text files"
    )
    add_data_flags(sub, required=False, tokens=8192)
    sub.add_argument("--split", choices=("heldout", "train", "all"), help="with --data: as for `modlab eval`")
    sub.add_argument(
        "--thresholds",
        metavar="P",
        type=float,
        nargs="+",
        default=[0.0, 0.1, 0.3, 0.5, 0.7, 0.9],
        help="values in [0, 1); 0 keeps every token",
    )
    sub.add_argument(
        "--repeats", metavar="N", type=int, default=5, help="timed calls a threshold; 0: no times"
    )
    sub.add_argument("--csv", metavar="FILE", type=read_path, help="write the table to a CSV file")
    sub.add_argument("--plot", metavar="FILE", type=read_path, help="write a page with the curves (.html)")
    add_kv_cache_dtype(sub, "keys and values of routed layers")
    add_model_flags(sub)


def run(options: argparse.Namespace) -> int:
    """Runs the command and returns its exit status."""
    import modlab
    from modlab.routing.state import routing_of

    if options.data and (options.text or options.text_file):
        raise ModlabError("give either --data or texts (--text, --text-file), not both.")
    texts = [*options.text, *(_read_text(path) for path in options.text_file)]
    if not options.data and not texts:
        raise ModlabError("nothing to measure on: give --text, --text-file or --data.")
    for number, text in enumerate(texts, 1):
        if not text.strip():
            raise ModlabError(f"text {number} of {len(texts)} is empty: give some text to measure on.")
    for path in filter(None, (options.csv, options.plot)):
        if not path.resolve().parent.is_dir():
            raise ModlabError(f"{path} cannot be written: there is no folder {path.resolve().parent}.")

    accelerator = launched()
    model, tokenizer = load_model(options, options.model)
    store_as_asked(options, model)
    routing_of(model)  # a dense model is refused before minutes are spent on reading --data
    source = rows_of(options, model, tokenizer) if options.data else texts
    table = modlab.sweep(
        model,
        tokenizer,
        source,
        thresholds=options.thresholds,
        seq_len=row_length(options, model),
        repeats=options.repeats,
        accelerator=accelerator,
    )
    if accelerator is not None and not accelerator.is_main_process:
        return 0
    print(table.to_string(index=False, float_format=lambda value: f"{value:.4g}"))
    if options.csv:
        table.to_csv(options.csv, index=False)
        print(f"table: {options.csv}")
    if options.plot:
        options.plot.write_text(_sweep_page(table, options.model), encoding="utf-8")
        print(f"page: {options.plot}")
    return 0


def _sweep_page(table: pandas.DataFrame, model: str) -> str:
    """Loss over KV saving as a page that needs no network (plotly's own code is inside)."""
    import plotly.graph_objects as go

    figure = go.Figure(
        go.Scatter(
            x=table["kv_saving"],
            y=table["loss"],
            text=[f"p = {p:g}" for p in table["threshold"]],
            customdata=table[["keep_ratio", "kv_bytes", "perplexity"]],
            mode="lines+markers+text",
            textposition="top center",
            hovertemplate="%{text}<br>kept %{customdata[0]:.1%}<br>KV %{customdata[1]:,} bytes"
            "<br>perplexity %{customdata[2]:.3f}<extra></extra>",
        )
    )
    figure.update_layout(title=f"{model}: what each threshold costs and saves")
    figure.update_xaxes(title="KV saving (dense bytes / allocated bytes)")
    figure.update_yaxes(title="loss (nats a token)")
    page: str = figure.to_html(include_plotlyjs=True)
    return page


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as problem:
        raise ModlabError(
            f"{path} is not UTF-8 text ({problem.reason} at byte {problem.start})."
        ) from problem
