"""One look for the plotly figures: readable on a light and on a dark page, and for the colour-blind.

    figure.update_layout(template=modlab.figures.template())

A notebook's figure cannot know which theme its reader has chosen, so the ground is transparent, and text and
grid are greys that stand out on white and on black (4.2 : 1 or better).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import plotly.graph_objects as go

TEXT, GRID = "#777777", "rgba(128, 128, 128, 0.25)"
# Okabe and Ito, "Color universal design" (2008), without black and yellow: they vanish on one of the grounds.
COLOURS = ("#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7", "#56b4e9")


def template() -> go.layout.Template:
    """Layout defaults for `update_layout(template=...)`; nothing is registered or changed globally."""
    import plotly.graph_objects as go

    axis = {
        "gridcolor": GRID,
        "linecolor": TEXT,
        "zerolinecolor": GRID,
        "ticks": "outside",
        "tickcolor": TEXT,
        "automargin": True,
        "title": {"standoff": 8},
    }
    return go.layout.Template(
        layout={
            "colorway": COLOURS,
            "paper_bgcolor": "rgba(0, 0, 0, 0)",
            "plot_bgcolor": "rgba(0, 0, 0, 0)",
            "font": {"color": TEXT, "size": 13},
            "title": {"x": 0, "xref": "paper", "xanchor": "left", "font": {"size": 15}},
            "xaxis": axis,
            "yaxis": axis,
            "colorscale": {"sequential": "Viridis"},
            "coloraxis": {"colorbar": {"thickness": 12, "outlinewidth": 0}},
            # Below the picture: plotly's buttons come up over its upper right corner.
            "legend": {"orientation": "h", "yref": "container", "y": 0, "yanchor": "bottom", "x": 0},
            "margin": {"t": 60, "r": 20, "b": 50, "l": 60},
            "height": 380,
        }
    )
