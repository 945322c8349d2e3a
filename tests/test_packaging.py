"""The package as described, built and imported: two dependency lists, the README's commands, lazy names."""

import ast
import importlib.util
import json
import re
import subprocess
import sys
import tomllib
import warnings
import zipfile
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import modlab
from tests.helpers.models import dense_llama
from tests.helpers.tokenizers import make_tokenizer

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCS = sorted((ROOT / "docs").glob("*.md"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def by_name(lines: list[str]) -> dict[str, str]:
    """Requirement strings as {name: version specifier}, in a form that compares."""
    parsed = [Requirement(line) for line in lines]
    assert len({r.name for r in parsed}) == len(parsed), "a package is listed twice"
    return {canonicalize_name(r.name): str(r.specifier) for r in parsed}


def run_python(code: str) -> str:
    """stdout of `code` in a fresh Python that imports this checkout."""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def load_script(name: str) -> ModuleType:
    """A file of scripts/ as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_environment_yml_and_pyproject_agree() -> None:
    conda = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))["dependencies"]
    (pip_section,) = [entry["pip"] for entry in conda if isinstance(entry, dict)]
    assert pip_section[-1] == "-e .", "the environment installs modlab itself last"
    assert by_name(pip_section[:-1]) == by_name(PROJECT["dependencies"])
    plain = by_name([entry for entry in conda if isinstance(entry, str)])
    assert set(plain) == {"python", "pip"}, "everything but Python and pip comes from the pip section"
    assert plain["python"] == PROJECT["requires-python"]


def test_every_dependency_has_a_lower_bound_that_is_met() -> None:
    from importlib.metadata import version

    extras = PROJECT["optional-dependencies"]
    lines = [line for name in ("test", "peft", "trl", "eval", "gguf", "quantized") for line in extras[name]]
    for line in PROJECT["dependencies"] + lines:
        requirement = Requirement(line)
        if requirement.name == PROJECT["name"]:  # its own extras, all of them among these lines
            assert requirement.extras <= extras.keys()
            continue
        assert any(spec.operator == ">=" for spec in requirement.specifier), line
        installed = Version(version(requirement.name))
        assert requirement.specifier.contains(installed.public, prereleases=True), f"{line}: {installed}"


def imported_packages(folder: str) -> set[str]:
    """Top-level names of everything the Python files of a folder import, wherever in the file."""
    found = set()
    for path in (ROOT / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                found.add(node.module.split(".")[0])
    return found


def test_every_third_party_import_of_the_package_is_a_dependency() -> None:
    third_party = imported_packages("modlab") - set(sys.stdlib_module_names) - {"modlab"}
    third_party -= {"triton", "cuda"}  # come with CUDA builds of torch; without them slower paths serve
    third_party -= {"deepspeed"}  # imported only in steps that the caller's own DeepSpeed takes
    assert {canonicalize_name(name) for name in third_party} <= set(by_name(PROJECT["dependencies"]))
    assert {"torch", "transformers"} <= third_party


def marked_command(marker: str) -> str:
    match = re.search(rf"<!-- ci:{marker} -->\n```bash\n(.+)\n```", README)
    assert match, f"README.md has no command marked ci:{marker}"
    return match[1]


def test_ci_runs_exactly_the_readmes_test_command() -> None:
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    (awk,) = re.findall(r"awk '(.+)' README\.md", script)
    extracted = subprocess.run(
        ["awk", awk, "README.md"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    assert extracted.strip() == marked_command("test")
    assert "pytest" in extracted
    assert 'bash -euo pipefail -c "$test_command"' in script


def test_ci_script_is_executable_and_parses() -> None:
    script = ROOT / ".ci" / "run"
    assert script.stat().st_mode & 0o111
    subprocess.run(["bash", "-n", str(script)], check=True)


def test_readme_is_short_enough_to_be_read() -> None:
    assert README.count("\n") <= 150


def test_readme_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    example = re.search(r"```python\n(.*?)```", README, re.S)
    assert example and example[1].count("tokens=10_000_000") == 1
    lines = "\n".join(f"word{i % 97} = {i}" for i in range(700))  # four rows
    (tmp_path / "my_texts").mkdir()
    (tmp_path / "my_texts" / "own.txt").write_text(lines)
    (tmp_path / "held_out.txt").write_text(lines[:1000])
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    code = example[1].replace("tokens=10_000_000", "tokens=2_048, batch_size=2")  # the README's own, sooner
    exec(compile(code, "README.md", "exec"), names)
    assert not modlab.is_converted(names["model"])
    assert names["rows"].shape[1] == 1024
    again, _ = modlab.load("my-routers")
    assert modlab.is_converted(again)


@pytest.mark.filterwarnings("ignore:No threshold for:UserWarning")  # after one step
def test_example_for_large_models_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (ROOT / "docs" / "large_models.md").read_text(encoding="utf-8")
    example = re.search(r"```python\n(.*?)```", page, re.S)
    assert example and "tokens=10_000_000" in example[1] and "4096" in example[1]
    tokenizer = make_tokenizer()
    model = dense_llama(vocab_size=512, max_position_embeddings=256)
    monkeypatch.setattr(modlab, "load", lambda *_, **__: (model, tokenizer))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "texts.jsonl").write_text(json.dumps({"text": "the router decides. " * 400}) + "\n")
    code = example[1].replace("10_000_000", "512").replace("4096", "256")
    exec(compile(code, "large_models.md", "exec"), {})
    assert (tmp_path / "qwen3-8b-kv" / "modlab_router.safetensors").is_file()


def links_of(page: Path) -> list[tuple[Path, str]]:
    """Files that a page links to, and which heading of theirs ("" where none is named)."""
    found = re.findall(r"\]\((?!https?://)([^)#\s]*)#?([^)\s]*)\)", page.read_text(encoding="utf-8"))
    return [((page.parent / file).resolve() if file else page, heading) for file, heading in found]


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", *(f"docs/{p.name}" for p in DOCS)])
def test_links_of_pages_lead_somewhere(page: str) -> None:
    links = links_of(ROOT / page)
    assert [file for file, _ in links if not file.exists()] == []
    for file, heading in links:
        headings = re.findall(r"^#+ (.+)$", file.read_text(encoding="utf-8"), re.M) if heading else []
        slugs = [re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in headings]
        assert not heading or heading in slugs, (file.name, heading)


def test_every_page_is_reached_from_the_readme() -> None:
    reached, waiting = set(), [ROOT / "README.md"]
    while waiting:
        page = waiting.pop()
        if page not in reached and page.suffix == ".md":
            reached.add(page)
            waiting += [file for file, _ in links_of(page)]
    assert {*DOCS, ROOT / "notebooks" / "README.md"} <= reached


def test_changelog_has_a_section_for_this_version_or_for_unreleased_work() -> None:
    headings = re.findall(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.M)
    assert headings and headings[0] in {"Unreleased", modlab.__version__}


def test_import_modlab_is_cheap() -> None:
    heavy = ("torch", "transformers", "datasets", "plotly", "ipywidgets", "anywidget", "pandas", "accelerate")
    loaded = run_python(f"import sys, modlab; print([m for m in {heavy!r} if m in sys.modules])")
    assert loaded == "[]"


def test_import_of_all_public_names_leaves_notebook_and_data_libraries_out() -> None:
    names = [name for name in modlab.__all__ if name != "widgets"]
    heavy = ("datasets", "plotly", "ipywidgets", "anywidget", "IPython")
    load = f"import sys, modlab; [getattr(modlab, n) for n in {names!r}]"
    assert run_python(f"{load}; print([m for m in {heavy!r} if m in sys.modules])") == "[]"


def test_every_public_name_loads() -> None:
    for name in modlab.__all__:
        assert getattr(modlab, name) is not None
    assert set(modlab.__all__) == {*modlab._HOME, "__version__"}
    assert set(modlab.__all__) <= set(dir(modlab))


def test_type_checkers_see_the_same_names_as_the_table() -> None:
    tree = ast.parse((ROOT / "modlab" / "__init__.py").read_text(encoding="utf-8"))
    (block,) = [node for node in tree.body if isinstance(node, ast.If)]
    declared = {
        alias.name: None if node.module == "modlab" else node.module.removeprefix("modlab.")
        for node in block.body
        if isinstance(node, ast.ImportFrom) and node.module
        for alias in node.names
    }
    assert declared == modlab._HOME


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'konvert'"):
        modlab.konvert  # noqa: B018


def test_no_module_hides_behind_a_public_name() -> None:
    """`import modlab.NAME` and `modlab.NAME` must be one thing."""
    names = [name for name, home in modlab._HOME.items() if home is not None]
    assert [name for name in names if importlib.util.find_spec(f"modlab.{name}")] == []


@pytest.mark.parametrize("category", [DeprecationWarning, FutureWarning])
def test_deprecations_in_modlab_fail_the_suite(category: type[Warning]) -> None:
    def warn_from(module: str) -> None:
        warnings.warn_explicit("old", category, filename="x.py", lineno=1, module=module, registry={})

    with pytest.raises(category):
        warn_from("modlab.convert")
    with pytest.warns(category):
        warn_from("somebody.else")


def make_wheel(path: Path, files: dict[str, int]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, size in files.items():
            archive.writestr(name, bytes(size))
    return path


def test_wheel_check_accepts_a_whole_wheel_and_names_what_is_wrong(tmp_path: Path) -> None:
    check = load_script("check_wheel")
    more = ("modlab/widgets/js/heatmap.js", "modlab/_results/decode.json")
    whole = dict.fromkeys((*check.REQUIRED, *more), 10)
    assert check.problems(make_wheel(tmp_path / "good.whl", whole)) == []

    too_big = whole | {"modlab/demo/mod/model.safetensors": check.DEMO_LIMIT + 1}
    assert any("limit" in line for line in check.problems(make_wheel(tmp_path / "big.whl", too_big)))

    without = {name: size for name, size in whole.items() if not name.endswith("quickstart.ipynb")}
    assert any("quickstart" in line for line in check.problems(make_wheel(tmp_path / "less.whl", without)))

    without = {name: size for name, size in whole.items() if "_results" not in name}
    assert any("_results" in line for line in check.problems(make_wheel(tmp_path / "bare.whl", without)))

    strange = whole | {"tests/test_x.py": 1, "modlab/__pycache__/a.pyc": 1}
    assert len(check.problems(make_wheel(tmp_path / "more.whl", strange))) == 2
