"""Latencies of the widgets in a real JupyterLab in headless Chromium: python benchmarks/lab_latency.py

Slider to pixels: from a real mouse move over the slider (the browser's own time stamp of the event) to the
canvas drawn, and to the frame painted. Frames: the time from one frame to the next while the heatmap scrolls
and zooms, and the main thread's work in each. Live view: the same while a text is generated, and how often
the picture changes. The browser draws in software here: a desktop with a GPU is faster. Needs what the
browser tests need (playwright, Chromium).
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

SIZES = ((2_000, 32, 1), (8_192, 32, 1), (8_192, 30, 3), (65_536, 32, 1))
"""Tokens, layers, gates of a routed layer: every other layer is routed by one, or all are by several (the
third size has SmolLM2-135M's 90)."""
CELL = """\
import numpy as np, time
from modlab import RoutingTrace
from modlab.widgets import {view}
from modlab.widgets.pictures.page import trace_page
rng = np.random.default_rng(0)
T, L, G = {tokens}, {layers}, {gates}
layers = sorted([*range(0 if G > 1 else 1, L, 1 if G > 1 else 2)] * G)
gate = rng.uniform(0.02, 0.98, (len(layers), T)).astype(np.float32)
loss = rng.uniform(0.1, 5, T); loss[0] = np.nan
trace = RoutingTrace(tokens=["word "] * T, token_ids=np.arange(T), gate=gate, keep=gate >= 0.5,
                     layers=layers, num_layers=L, thresholds=np.full(len(gate), 0.5), keep_first=4, loss=loss,
                     kv_bytes_per_token=4096, model="synthetic", skip="kv" if G > 1 else "layer",
                     keep_recent=128 if G > 1 else 0)
start = time.perf_counter()
widget = {view}(trace)
made_ms = 1e3 * (time.perf_counter() - start)
widget"""
DEMO = """\
import modlab, time
model, tokenizer = modlab.load("demo")
text = open({source!r}).read()[:1800]
start = time.perf_counter()
widget = modlab.widgets.explore(model, tokenizer, text)
made_ms = 1e3 * (time.perf_counter() - start)
widget"""

LIVE = """\
import modlab
model, tokenizer = modlab.load("demo-kv")
text = open({source!r}).read()[:1800]
widget = modlab.widgets.CacheView(model, tokenizer, text, max_new_tokens=60)
widget"""

# Presses Generate; the time from one frame to the next, and how often the picture changed.
GENERATE = """async () => {
  const canvas = document.querySelector('canvas.modlab-heatmap');
  const badge = document.querySelector('.modlab-badge');
  const frames = [], labels = new Set(), start = performance.now();
  document.querySelector('.modlab-generate').click();
  let last = 0;
  await new Promise((done) => {
    const step = (now) => {
      if (last) frames.push(now - last);
      last = now;
      labels.add(canvas.getAttribute('aria-label'));
      if (now - start > 500 && badge.dataset.state !== 'running') done(); else requestAnimationFrame(step);
    };
    requestAnimationFrame(step);
  });
  return { frames, pictures: labels.size - 1, seconds: (performance.now() - start) / 1000 };
}"""

# Notes, for every input event of a slider, when the canvas was drawn and when the frame was painted.
WATCH = """() => {
  const canvas = document.querySelector('canvas.modlab-heatmap');
  window.__bench = { drawn: [], painted: [] };
  let start = null;
  document.addEventListener('input', (e) => { if (start === null) start = e.timeStamp; }, true);
  new MutationObserver(() => {
    if (start === null) return;
    const from = start, channel = new MessageChannel();
    start = null;
    window.__bench.drawn.push(performance.now() - from);
    channel.port1.onmessage = () => window.__bench.painted.push(performance.now() - from);
    requestAnimationFrame(() => channel.port2.postMessage(0));
  }).observe(canvas, { attributes: true, attributeFilter: ['data-threshold'] });
}"""
# From one frame to the next while `act` runs in each of them.
FRAMES = """async (what) => {
  const scroll = document.querySelector('.mod-scroll');
  const canvas = document.querySelector('canvas.modlab-heatmap');
  const box = canvas.getBoundingClientRect(), times = [], far = scroll.scrollWidth - scroll.clientWidth;
  const send = (Kind, name, x, more) => canvas.dispatchEvent(
    new Kind(name, { clientX: box.left + x, clientY: box.top + 60, bubbles: true, ...more }));
  const act = {
    scroll: (i) => { scroll.scrollLeft = (i * 37) % Math.max(1, far); },
    zoom: (i) => send(WheelEvent, 'wheel', 400,
      { ctrlKey: true, cancelable: true, deltaY: Math.floor(i / 30) % 2 ? -12 : 12 }),
    overview: (i) => send(PointerEvent, 'pointermove', 60 + ((i * 7) % 800), {}),
    nothing: () => {},
  }[what];
  await new Promise((done) => {
    let last = 0, i = 0;
    const step = (now) => {
      if (last) times.push(now - last);
      last = now;
      act(i);
      if (++i > 180) done(); else requestAnimationFrame(step);
    };
    requestAnimationFrame(step);
  });
  return times;
}"""


def summary(values: Sequence[float]) -> dict[str, float]:
    """Median, 95th percentile and largest, milliseconds."""
    ordered = sorted(values)
    return {
        "median": round(statistics.median(ordered), 2),
        "p95": round(ordered[min(len(ordered) - 1, int(0.95 * len(ordered)))], 2),
        "max": round(ordered[-1], 2),
        "count": len(ordered),
    }


class Page:
    """One notebook of one cell, open in the browser."""

    def __init__(self, nb: Any) -> None:
        self.nb, self.page = nb, nb.page
        self.cdp = self.page.context.new_cdp_session(self.page)
        self.cdp.send("Performance.enable")

    def work_ms(self) -> dict[str, float]:
        """The main thread's time so far, milliseconds: scripts, and everything."""
        found = {m["name"]: m["value"] for m in self.cdp.send("Performance.getMetrics")["metrics"]}
        return {"script": 1e3 * found["ScriptDuration"], "task": 1e3 * found["TaskDuration"]}

    def drag(self, moves: int = 60) -> dict[str, Any]:
        """Drag the threshold slider to and fro, move by move."""
        self.page.evaluate(WATCH)
        slider = self.page.locator(".modlab-threshold").first
        slider.scroll_into_view_if_needed()
        box = slider.bounding_box()
        y = box["y"] + box["height"] / 2
        self.page.mouse.move(box["x"] + 0.5 * box["width"], y)
        self.page.mouse.down()
        for i in range(moves):
            self.page.mouse.move(box["x"] + (0.5 + 0.4 * ((i % 20) - 10) / 10) * box["width"], y)
            self.page.wait_for_timeout(40)
        # The release would ask for a run: back to where it began first.
        self.page.mouse.up()
        found = self.page.evaluate("() => window.__bench")
        return {"drawn_ms": summary(found["drawn"]), "painted_ms": summary(found["painted"])}

    def frames(self, what: str) -> dict[str, Any]:
        """180 frames of scrolling, zooming or hovering."""
        before = self.work_ms()
        times = self.page.evaluate(FRAMES, what)
        after = self.work_ms()
        return {
            "frame_ms": summary(times),
            "late_frames": sum(t > 1.5 * 1000 / 60 for t in times),
            "script_ms_a_frame": round((after["script"] - before["script"]) / len(times), 2),
            "main_thread_ms_a_frame": round((after["task"] - before["task"]) / len(times), 2),
        }


def synthetic(lab: Any, notebook: Any, tokens: int, layers: int, gates: int) -> list[dict[str, Any]]:
    """The views of a synthetic trace of this size."""
    rows = []
    size = {"tokens": tokens, "layers": layers, "gates": layers * gates if gates > 1 else layers // 2}
    source = CELL.format(view="RoutingHeatmap", tokens=tokens, layers=layers, gates=gates)
    with lab.open(notebook(source), timeout=180) as nb:
        nb.run_all()
        page = Page(nb)
        made = float(nb.python("print(made_ms)"))
        rows.append({"case": "kernel: make the heatmap widget", **size, "ms": round(made, 1)})
        rows.append({"case": "frames: page at rest", **size, **page.frames("nothing")})
        rows.append({"case": "frames: scroll", **size, **page.frames("scroll")})
        rows.append({"case": "frames: zoom", **size, **page.frames("zoom")})
        nb.page.locator("canvas.modlab-heatmap").focus()
        nb.page.keyboard.press("0")
        rows.append({"case": "frames: hover, all tokens in view", **size, **page.frames("overview")})
    page_file = Path(tempfile.mkdtemp()) / "explorer.html"
    with lab.open(
        notebook(source + f"\nopen({str(page_file)!r}, 'w').write(trace_page(trace));"), timeout=180
    ) as nb:
        nb.run_all()
        tab = nb.page.context.new_page()
        tab.goto(page_file.as_uri())
        tab.wait_for_selector("canvas.modlab-heatmap[data-threshold]")
        nb.page = tab
        rows.append({"case": "slider to pixels: explorer, page", **size, **Page(nb).drag()})
        tab.close()
    return rows


def explorer(lab: Any, notebook: Any) -> list[dict[str, Any]]:
    """The explorer over the demo model, in JupyterLab: the preview, and the real run."""
    with lab.open(notebook(DEMO.format(source=str(ROOT / "modlab" / "plan.py"))), timeout=180) as nb:
        nb.run_all()
        tokens, layers = (int(x) for x in nb.python("print(len(widget.tokens), widget.num_layers)").split())
        size = {"tokens": tokens, "layers": layers}
        made = float(nb.python("print(made_ms)"))
        rows = [{"case": "kernel: explore(demo), first run included", **size, "ms": round(made, 1)}]
        rows.append({"case": "slider to pixels: explorer, JupyterLab", **size, **Page(nb).drag()})
        measured = []
        for p in (0.4, 0.6, 0.45, 0.55, 0.5):
            nb.drag(".modlab-threshold", p, steps=2)
            measured.append(
                nb.page.evaluate(
                    """async () => {
                      const start = performance.now(), badge = document.querySelector('.modlab-badge');
                      await new Promise(r => setTimeout(r, 260)); // what the slider waits for further keys
                      while (badge.dataset.state !== 'measured') await new Promise(requestAnimationFrame);
                      return performance.now() - start; }"""
                )
            )
        rows.append({"case": "release to measured: a real run of the text", **size, "ms": summary(measured)})
        return rows


def live(lab: Any, notebook: Any) -> dict[str, Any]:
    """The cache while a text is generated."""
    with lab.open(notebook(LIVE.format(source=str(ROOT / "modlab" / "plan.py"))), timeout=180) as nb:
        nb.run_all()
        found = nb.page.evaluate(GENERATE)
        nb.python("widget.wait(60)")
        rate = float(nb.python("print(widget.written['tokens_per_s'])"))
        tokens, layers = (int(x) for x in nb.python("print(len(widget.tokens), widget.num_layers)").split())
    return {
        "case": "live view: a text is generated",
        "tokens": tokens,
        "layers": layers,
        "frame_ms": summary(found["frames"]),
        "late_frames": sum(t > 1.5 * 1000 / 60 for t in found["frames"]),
        "pictures_per_s": round(found["pictures"] / found["seconds"], 2),
        "tokens_per_s": round(rate, 1),
    }


def git_commit() -> str:
    """This tree's commit, "-dirty" added if files of the package differ from it."""
    words = ["git", "-C", str(ROOT)]
    head = subprocess.run([*words, "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    changed = [*words, "status", "--porcelain", "--untracked-files=no", "modlab", "benchmarks/lab_latency.py"]
    dirty = subprocess.run(changed, capture_output=True, text=True).stdout.strip()
    return (head or "unknown") + ("-dirty" if dirty else "")


def main(argv: Sequence[str] | None = None) -> int:
    """Measures, prints a table, writes the JSON file."""
    import nbformat

    from tests.browser.notebook_browser import JupyterLab
    from tests.helpers.launch import python_path

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--out",
        type=Path,
        default=ROOT / "benchmarks" / "results" / "lab",
        help="folder of the result file",
    )
    parser.add_argument("--quick", action="store_true", help="only the smallest size")
    options = parser.parse_args(argv)
    folder = Path(tempfile.mkdtemp(prefix="lab-latency-"))

    def notebook(source: str) -> Path:
        path = folder / f"{len(list(folder.iterdir()))}.ipynb"
        nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source)]), path)
        return path

    load = os.getloadavg()[0]
    rows: list[dict[str, Any]] = []
    with JupyterLab(env={"PYTHONPATH": python_path(), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}) as lab:
        browser = lab.browser.version
        rows += explorer(lab, notebook)
        rows.append(live(lab, notebook))
        for size in SIZES[:1] if options.quick else SIZES:
            rows += synthetic(lab, notebook, *size)
    for row in rows:
        print(json.dumps(row))
    now = datetime.datetime.now(datetime.UTC)
    result = {
        "schema": 1,
        "what": "lab",
        "command": shlex.join(
            ["python", "benchmarks/lab_latency.py", *(["--quick"] if options.quick else [])]
        ),
        "commit": git_commit(),
        "date": now.isoformat(timespec="seconds"),
        "device": "cpu",
        "versions": {
            "chromium": browser,
            "python": platform.python_version(),
            **{
                name: version(name)
                for name in ("jupyterlab", "ipywidgets", "anywidget", "ipykernel", "torch")
            },
        },
        "cores": os.cpu_count(),
        "load": {"before": round(load, 2), "after": round(os.getloadavg()[0], 2)},
        "rows": rows,
    }
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"lab_chromium_{now:%Y-%m-%d}.json"
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(path)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
