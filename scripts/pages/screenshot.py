"""A plotly figure as a PNG file, drawn by Chromium (as in the browser tests)."""

import tempfile
from pathlib import Path

import plotly.graph_objects as go


def save_png(figure: go.Figure, target: Path, width: int, height: int) -> None:
    """Writes `figure`, of this size in CSS pixels, to `target` at 1.5 times the resolution."""
    from playwright.sync_api import sync_playwright

    with tempfile.TemporaryDirectory() as folder:
        page_file = Path(folder, "figure.html")
        figure.write_html(page_file, include_plotlyjs=True)
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(
                executable_path="/usr/bin/chromium", args=["--no-sandbox", "--disable-gpu"]
            )
            page = browser.new_page(
                viewport={"width": width + 16, "height": height + 16}, device_scale_factor=1.5
            )
            page.goto(page_file.as_uri())
            page.wait_for_selector(".main-svg")
            page.screenshot(path=target)
            browser.close()
