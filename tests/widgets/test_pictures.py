"""What is drawn without a widget: pages, scripts and still pictures need no kernel and no widget library."""

import importlib
import re
import subprocess
import sys
from xml.etree import ElementTree

import numpy as np
import pytest

from modlab import widgets
from modlab.widgets.pictures import panels, script
from modlab.widgets.pictures.svg import LINE, colour_of
from modlab.widgets.pictures.trace import curve_svg, trace_svg
from modlab.widgets.views import VIEWS
from tests.helpers.traces import head_trace, make_trace

for name in widgets.__all__:
    getattr(widgets, name)  # loads the module that holds it, which registers its views

NEEDLESS = """\
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"anywidget", "ipywidgets", "traitlets", "IPython", "ipykernel", "torch"}:
            raise ImportError(f"{name} was asked for")
sys.meta_path.insert(0, Blocked())
from modlab.traces.routing_trace import RoutingTrace
trace = RoutingTrace.load(sys.argv[1])
assert trace.to_svg() and "modlab-data" in trace.to_html()
for name in ("axes", "page", "panels", "script", "svg", "trace", "words"):
    __import__(f"modlab.widgets.pictures.{name}")
"""


def test_a_trace_draws_itself_without_a_widget_library(tmp_path: object) -> None:
    file = make_trace().save(f"{tmp_path}/a.npz")
    done = subprocess.run([sys.executable, "-c", NEEDLESS, str(file)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("view", sorted(VIEWS))
def test_a_script_is_one_module_with_all_that_its_view_is_made_of(view: str) -> None:
    made = script.script(view)
    code = re.sub(r'//.*|"[^"\n]*"', "", made)
    assert made.count("export default") == 1 and "import " not in code
    assert f"VIEWS.{view} = " in made and len(made) < 80_000
    parts = re.search(rf"VIEWS\.{view} = \{{(.*?)\}};\n", code, re.S)
    assert parts
    named = re.findall(r"\b[A-Z]\w+", parts[1])
    assert named and all(re.search(rf"^class {name}\b", code, re.M) for name in named)


def test_every_view_has_a_class_and_every_file_a_view() -> None:
    needed = {name for view in VIEWS for name in script.files(view)}
    assert needed == {path.stem for path in script.JS.glob("*.js")}
    registered = {
        name
        for path in script.JS.glob("*.js")
        for name in re.findall(r"^VIEWS\.(\w+) =", path.read_text(), re.M)
    }
    assert registered == set(VIEWS)


def test_a_class_has_the_script_of_the_view_it_names() -> None:
    for view, cls in VIEWS.items():
        assert cls.view == view and cls._esm == script.script(view)
        assert issubclass(getattr(importlib.import_module(cls.__module__), cls.__name__), cls)


def test_a_subclass_of_a_view_is_drawn_as_its_parent() -> None:
    class Mine(widgets.TokenText):
        pass

    assert Mine._esm == script.script("text") and VIEWS["text"] is widgets.TokenText


def test_lines_of_the_browsers_half_can_be_read() -> None:
    for path in script.JS.glob("*.js"):
        assert max(map(len, path.read_text(encoding="utf-8").splitlines())) <= 150, path.name


SVG = "{http://www.w3.org/2000/svg}"


def read(svg: str) -> ElementTree.Element:
    """The picture as a reader's program takes it in: well-formed, without script, style or address."""
    picture = ElementTree.fromstring(svg)
    names = {element.tag.removeprefix(SVG) for element in picture.iter()}
    assert names <= {"svg", "title", "rect", "path", "polyline", "text"}
    assert not re.search(r"href|style=|url\(|https?://(?!www\.w3\.org/2000/svg)", svg)
    return picture


def boxes(picture: ElementTree.Element, colour: str) -> list[tuple[float, ...]]:
    """(x, y, width, height) of what is filled with a colour."""
    paths = [e.get("d", "") for e in picture.iter(f"{SVG}path") if e.get("fill") == colour]
    numbers = r"M([-\d.]+) ([-\d.]+)h([-\d.]+)v([-\d.]+)"
    return [tuple(map(float, box)) for path in paths for box in re.findall(numbers, path)]


def test_a_still_picture_shows_kept_and_skipped_cells() -> None:
    keep = np.zeros((1, 20), dtype=bool)
    keep[0, ::2] = True
    picture = read(make_trace(20, 2, keep=keep, gate=np.full((1, 20), 0.9)).to_svg())
    full = [box for box in boxes(picture, colour_of(22 / 24)) if box[3] > 10 and box[2] > 20]
    thin = [box for box in boxes(picture, LINE) if box[3] < 2 and box[2] > 21]
    assert [round((x - 62) / 22) for x, *_ in sorted(full)] == list(range(0, 20, 2))
    assert [round((x - 62) / 22) for x, *_ in sorted(thin)] == list(range(1, 20, 2))


def test_a_still_picture_has_a_line_for_each_kv_head() -> None:
    trace = head_trace(20, 4)
    trace.gate[:] = 0.9
    picture = read(trace.to_svg())
    full = [box for box in boxes(picture, colour_of(22 / 24)) if box[3] > 10 and 20 < box[2] < 22]
    lanes = sorted({round(y) for _, y, *_ in full})
    assert len(lanes) == 4  # layers 0 and 2 have no router
    found = [sorted(round((x - 62) / 22) for x, y, *_ in full if round(y) == lane) for lane in lanes]
    assert found == [np.flatnonzero(row).tolist() for row in trace.keep]
    said = [e.text for e in picture.iter(f"{SVG}text")]
    assert f"{100 * trace.keep[:2].mean():.0f} %" in said and said.count("dense") == 2


def test_neighbours_that_are_skipped_share_a_line() -> None:
    keep = np.ones((1, 20), dtype=bool)
    keep[0, 5:12] = keep[0, 15] = False
    picture = read(make_trace(20, 2, keep=keep).to_svg())
    thin = sorted(box for box in boxes(picture, LINE) if box[3] < 2 and box[2] > 21)
    found = [(round((x - 62) / 22), round(width / 22)) for x, _, width, _ in thin]
    assert found == [(5, 7), (15, 1)]


def test_a_still_picture_has_notes_below_the_text() -> None:
    plain, noted = make_trace(30).to_svg(), trace_svg(make_trace(30), notes=["one: 1.0", "two <: 3.1"])
    assert "two &lt;: 3.1" in noted
    assert int(read(noted).get("height", 0)) == int(read(plain).get("height", 0)) + 40


def test_a_still_picture_holds_the_text() -> None:
    tokens = ["<b>", "&amp;", "", "日本", "🙂", "\n", "\x00", "\ud800", "\t x "] * 3
    trace = make_trace(27, tokens=tokens)
    said = "".join(e.text or "" for e in read(trace.to_svg()).iter(f"{SVG}text"))
    assert "<b>" in said and "&amp;" in said and "日本" in said and "🙂" in said and "27 tokens" in said


def test_a_still_picture_of_a_long_text_stays_small() -> None:
    svg = make_trace(20_000, 32).to_svg()
    picture = read(svg)
    assert int(picture.get("height", 0)) < 1400 and picture.get("width") == "960" and len(svg) < 300_000
    assert "shown" in svg


def points(losses: list[float]) -> list[dict[str, float]]:
    return [{"p": i / 10, "kv_bytes": 1e6 - i, "loss": loss} for i, loss in enumerate(losses)]


def frontier_points() -> list[dict[str, float]]:
    return [
        {"at": d["p"], "kv_bytes": d["kv_bytes"], "loss": d["loss"], "ms": 3.0} for d in points([2.0, 2.1])
    ]


def heights(svg: str) -> list[float]:
    """Where the line of losses, the last one, goes."""
    line = [e for e in read(svg).iter(f"{SVG}polyline") if not e.get("stroke-dasharray")][-1]
    return [float(at.split(",")[1]) for at in line.get("points", "").split()]


def test_noise_is_not_drawn_as_a_cliff() -> None:
    assert np.ptp(heights(curve_svg(points([2.0, 2.001, 2.003])))) < 0.05 * 130
    assert np.ptp(heights(curve_svg(points([2.0, 2.3, 2.6])))) == pytest.approx(130)


def test_the_dense_model_is_a_dashed_line_with_a_name() -> None:
    svg = curve_svg(points([2.0, 2.1, 2.3]), dense=1.9)
    dashed = [e for e in read(svg).iter(f"{SVG}polyline") if e.get("stroke-dasharray")]
    assert len(dashed) == 1 and "dense model" in svg
    at = float(dashed[0].get("points", "").split()[0].split(",")[1])
    assert at > max(heights(svg))  # lower is better


@pytest.mark.parametrize(
    "sides", [[], [{"p": 0.3, "pieces": ["a\n", "<"], "same": [True, False], "kv_bytes": 5}] * 2]
)
def test_panels_are_well_formed(sides: list[dict[str, object]]) -> None:
    read(panels.compare_svg(sides))
    axes = [{"key": "kv_bytes", "title": "KV cache", "unit": "bytes", "note": ""}]
    lost = [{"key": "loss", "title": "loss", "unit": "nats", "note": ""}]
    line = {"dial": "threshold", "costs": axes, "qualities": lost, "points": frontier_points()}
    line["references"] = [{"name": "dense & more", "kv_bytes": 9e5, "loss": 2}]
    assert len(list(read(panels.frontier_svg(line, 0.1)).iter(f"{SVG}polyline"))) == 1
    line["costs"] = [*axes, {"key": "ms", "title": "time: there", "unit": "ms", "note": ""}]
    assert len(list(read(panels.frontier_svg(line, 0.1)).iter(f"{SVG}polyline"))) == 2
    read(panels.training_svg({}))
    read(
        panels.training_svg(
            {"step": [1, 2], "loss": [3.0, 2.9], "keep_1": [1.0, 0.9], "eval_loss": [np.nan, 2.8]}
        )
    )
    rows = [{"name": "newline", "tokens": 3, "kept": [0.1, None]}]
    read(panels.classes_svg([1, 3], rows, rows))
