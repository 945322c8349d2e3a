"""What a training run leaves: its history as a table, a figure and a short HTML summary."""

from __future__ import annotations

import html
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pandas as pd

if TYPE_CHECKING:
    import plotly.graph_objects as go

Stopped = Literal["finished", "time", "interrupted", "data"]


@dataclass
class TrainResult:
    """Outcome of `modlab.train`.

    Attributes:
        history: one row a log line: step, tokens, loss (nats), keep_ratio (mean over routed layers),
            keep_<layer>, objective (its value), kl, balance (what a mixture of
            experts adds to balance them), target, lr, grad_norm, tokens_per_s, seconds; eval_loss
            and eval_keep_ratio where an evaluation ran, of a distillation also eval_kl and eval_kl_keep (KL
            to the dense model on held-out data at the threshold for keep_ratio, and what it keeps there).
        model: the trained model, in eval mode.
        out: the run's folder, or None.
        steps: optimiser steps done in all.
        tokens: tokens trained on in all.
        seconds: training time in all, resumed parts included.
        stopped: why it ended: "finished", "time" (max_minutes), "interrupted", or "data" (a one-time stream
            ended).
        thresholds: of objective="distil" with a keep_range: by ratio (2.0, 4.0, ...), the thresholds by layer
            that keep so much less, with the recent tokens that go with them: `modlab.set_kv_saving(model, 4)`
            sets both.
    """

    history: pd.DataFrame
    model: Any = field(repr=False)
    out: Path | None
    steps: int
    tokens: int
    seconds: float
    stopped: Stopped = "finished"
    thresholds: dict[float, dict[int, float]] = field(default_factory=dict, repr=False)

    @property
    def interrupted(self) -> bool:
        """True if Ctrl-C or the notebook's stop button ended the run."""
        return self.stopped == "interrupted"

    @property
    def kept_in(self) -> str:
        """In words: where what was trained is, or that it is not saved yet."""
        folder = self.out and self.out / "model"
        if folder and folder.is_dir():
            return f"Saved in {folder}."
        return 'Not saved yet: model.save_pretrained("my-model").'

    def plot(self) -> go.Figure:
        """Loss over tokens, and the keep ratio of each routed layer where there are any."""
        import plotly.graph_objects as go
        from plotly.colors import sample_colorscale
        from plotly.subplots import make_subplots

        frame = self.history
        kept = [c for c in frame.columns if c.startswith("keep_")]
        layers = [c for c in kept if c != "keep_ratio"]  # from dark to light with the depth, none twice
        shades = sample_colorscale(
            "Viridis", [0.85 * i / max(1, len(layers) - 1) for i in range(len(layers))]
        )
        colours = dict(zip(layers, shades, strict=True))
        figure = make_subplots(
            rows=2 if kept else 1,
            cols=1,
            shared_xaxes=True,
            row_titles=["loss (nats)", "kept"][: 2 if kept else 1],
        )
        for name in ("loss", "eval_loss"):
            if name in frame:
                line = frame[["tokens", name]][frame[name].map(math.isfinite)]
                mode = "lines" if name == "loss" else "lines+markers"
                figure.add_trace(
                    go.Scatter(x=line["tokens"], y=line[name], name=name, mode=mode), row=1, col=1
                )
        for name in kept:
            line = {"color": colours[name], "width": 1} if name in colours else {"width": 3}
            figure.add_trace(
                go.Scatter(x=frame["tokens"], y=frame[name], name=name, mode="lines", line=line),
                row=2,
                col=1,
            )
        if kept and "target" in frame:
            figure.add_trace(
                go.Scatter(x=frame["tokens"], y=frame["target"], name="target", line={"dash": "dot"}),
                row=2,
                col=1,
            )
        figure.update_xaxes(title_text="tokens", row=2 if kept else 1)
        figure.update_layout(height=600 if kept else 350, margin={"t": 30})
        return figure

    def _repr_html_(self) -> str:
        head = f"{self.stopped}: {self.steps:,} steps, {self.tokens:,} tokens, {self.seconds:,.0f} s"
        where = f" · {html.escape(str(self.out))}" if self.out is not None else ""
        columns = [
            c
            for c in ("step", "tokens", "loss", "keep_ratio", "target", "lr", "tokens_per_s", "eval_loss")
            if c in self.history
        ]
        table = self.history[columns].tail(5).to_html(index=False, float_format="%.4g", border=0)
        return f"<p><b>TrainResult</b> · {head}{where}</p>{table}"
