"""What is drawn without a widget: pages, scripts and still pictures need no kernel and no widget library."""

import importlib
import re
import subprocess
import sys

import pytest

from modlab import widgets
from modlab.widgets.pictures import script
from modlab.widgets.views import VIEWS
from tests.helpers.traces import make_trace

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
assert trace.to_png() and "modlab-data" in trace.to_html()
for name in ("page", "panels", "png", "script", "words"):
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
