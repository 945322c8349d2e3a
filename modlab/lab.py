"""The notebooks: list them, copy them to a folder of the user's, open JupyterLab there, or only run them."""

import filecmp
import json
import os
import re
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from modlab.errors import ModlabError

QUICKSTART = "quickstart.ipynb"


def notebook_source() -> Path:
    """The folder the notebooks are copied from: inside an installed package, next to it in a checkout."""
    package = Path(__file__).resolve().parent
    for folder in (package / "_notebooks", package.parent / "notebooks"):
        if (folder / QUICKSTART).is_file():
            return folder
    raise ModlabError(
        f"modlab's notebooks are not where they should be ({package / '_notebooks'}): "
        "the installation is incomplete. Install modlab again."
    )


@dataclass(frozen=True)
class Guide:
    """One notebook: its file name, its title and one sentence, both as its first cell gives them."""

    file: str
    title: str
    summary: str

    @property
    def name(self) -> str:
        """The file name without suffix."""
        return self.file.removesuffix(".ipynb")


def guides(folder: Path | None = None) -> list[Guide]:
    """The notebooks of a folder (by default modlab's own), the quickstart first."""
    folder = notebook_source() if folder is None else folder
    paths = [path for path in folder.glob("*.ipynb") if not path.stem.endswith(".executed")]
    return [_guide(path) for path in sorted(paths, key=lambda path: (path.name != QUICKSTART, path.name))]


def _guide(path: Path) -> Guide:
    """Title: the first heading; summary: the paragraph after it."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    text = "".join(cells[0]["source"]) if cells else ""
    title, _, rest = text.partition("\n")
    summary = " ".join(rest.strip().split("\n\n")[0].split())
    return Guide(path.name, title.lstrip("# ").strip(), summary)


def find_guide(word: str, folder: Path | None = None) -> Guide:
    """The notebook that a user means: "train", "2", "2_train" and "2_train.ipynb" are the same one.

    Raises:
        ModlabError: none or several are meant; the message lists what there is.
    """
    there = guides(folder)
    wanted = word.lower().removesuffix(".ipynb").replace("-", "_").replace(" ", "_")
    exact = [guide for guide in there if guide.name == wanted or guide.name.split("_")[0] == wanted]
    found = exact or [guide for guide in there if wanted in guide.name]
    if len(found) == 1:
        return found[0]
    problem = "several notebooks are" if found else "no notebook is"
    names = ", ".join(guide.name for guide in found or there)
    raise ModlabError(f"{problem} called {word!r}; choose one of {names}.")


@dataclass
class CopyReport:
    """What `copy_notebooks` did: paths relative to the target folder."""

    copied: list[str] = field(default_factory=list)
    replaced: list[str] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)  # differ from modlab's and were left alone

    def lines(self, folder: Path) -> Iterator[str]:
        """The report in words, one line a fact."""
        for verb, names in (("copied", self.copied), ("replaced", self.replaced)):
            if names:
                yield f"{verb} to {folder}: {', '.join(names)}"
        for name in self.kept:
            yield f"kept {folder / name}: it differs from modlab's own (--overwrite replaces it)"


def copy_notebooks(target: Path, overwrite: bool = False) -> CopyReport:
    """Copy the notebooks and the files next to them to `target`; a file that was changed there is kept.

    Args:
        target: folder, made if it is not there.
        overwrite: replace changed files instead of keeping them.

    Raises:
        ModlabError: `target` is a file, or the package carries no notebooks.
    """
    if target.exists() and not target.is_dir():
        raise ModlabError(f"{target} is a file; give the name of a folder for the notebooks.")
    source = notebook_source()
    target.mkdir(parents=True, exist_ok=True)
    report = CopyReport()
    for origin in sorted(source.rglob("*")):
        name = origin.relative_to(source)
        if not origin.is_file() or any(part.startswith(".") or part == "__pycache__" for part in name.parts):
            continue
        copy = target / name
        if copy.exists():
            if filecmp.cmp(origin, copy, shallow=False):
                continue
            if not overwrite:
                report.kept.append(str(name))
                continue
            report.replaced.append(str(name))
        else:
            report.copied.append(str(name))
        copy.parent.mkdir(parents=True, exist_ok=True)
        _write(copy, origin.read_bytes())
    return report


_START = (
    "import sys; sys.path = [folder for folder in sys.path if folder]; "
    "from jupyterlab.labapp import main; sys.exit(main())"
)
"""Starts JupyterLab. `python -m jupyterlab` would look for it, and for all it imports, in the current folder
first, which may be anybody's."""


def jupyter_command(
    folder: Path, browser: bool = True, extra: Sequence[str] = (), notebook: str = QUICKSTART
) -> list[str]:
    """The command that opens JupyterLab in `folder` on a notebook, reachable from this machine only.

    `extra` comes last, so that what the user gives after `--` wins.
    """
    command = [
        sys.executable,
        "-c",
        _START,
        f"--ServerApp.root_dir={folder.resolve()}",
        "--ServerApp.ip=127.0.0.1",
        f"--LabApp.default_url=/lab/tree/{notebook}",
    ]
    if not browser:
        command.append("--no-browser")
    # In containers the user is often root, and Jupyter then refuses to start without this.
    if hasattr(os, "geteuid") and os.geteuid() == 0:
        command.append("--allow-root")
    return [*command, *extra]


def open_lab(
    folder: Path, browser: bool = True, extra: Sequence[str] = (), notebook: str = QUICKSTART
) -> int:
    """Replace this process by JupyterLab (on Windows: run it and wait); returns its exit status."""
    _prefer_this_python()
    command = jupyter_command(folder, browser, extra, notebook)
    if os.name == "posix":
        sys.stdout.flush()
        sys.stderr.flush()
        os.execv(command[0], command)
    import subprocess

    return subprocess.run(command, check=False).returncode


@dataclass
class Executed:
    """Where an executed notebook and its page lie; `error` is the failing cell's message, else None."""

    notebook: Path
    page: Path
    error: str | None


def execute(notebook: Path, timeout_s: int = 600, progress: bool = True) -> Executed:
    """Run every cell of `notebook` in this Python, with its folder as working directory.

    The notebook itself is not touched: `NAME.executed.ipynb` and `NAME.html` are written next to it,
    also when a cell fails (with all outputs so far and the error).

    Args:
        timeout_s: longest time for one cell, seconds.
        progress: show a bar, one step a cell, on stderr.

    Raises:
        ModlabError: the file is absent or is no notebook.
    """
    import nbformat
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError
    from tqdm.auto import tqdm

    if not notebook.is_file():
        raise ModlabError(f"there is no notebook {notebook}.")
    try:
        content = nbformat.read(notebook, as_version=4)
    except (nbformat.reader.NotJSONError, nbformat.ValidationError) as problem:
        reason = str(problem).splitlines()[0][:200]
        raise ModlabError(f"{notebook} is not a readable notebook: {reason}") from problem

    _prefer_this_python()
    code_cells = [cell for cell in content.cells if cell.cell_type == "code" and cell.source.strip()]
    with tqdm(total=len(code_cells), desc=notebook.name, unit="cell", disable=not progress) as bar:

        def done(cell: Any, **_: Any) -> None:
            if cell.cell_type == "code" and cell.source.strip():
                bar.update()

        client = NotebookClient(
            content,
            timeout=timeout_s,
            kernel_name="python3",
            resources={"metadata": {"path": str(notebook.resolve().parent)}},
            # A saved widget state makes the file large and shows a dead slider where there is no kernel;
            # the static pictures in the outputs serve such readers.
            store_widget_state=False,
            extra_arguments=["--log-level=ERROR"],  # the kernel's warnings would tear the progress bar
            on_cell_executed=done,
        )
        error = None
        try:
            client.execute()
        except (CellExecutionError, CellTimeoutError, DeadKernelError) as failure:
            error = re.sub(r"\x1b\[[0-9;]*m", "", str(failure)).strip()  # IPython colours its tracebacks

    result = Executed(notebook.with_suffix(".executed.ipynb"), notebook.with_suffix(".html"), error)
    _write(result.notebook, nbformat.writes(content).encode())
    _write(result.page, _page(content, notebook.stem).encode())
    return result


def _page(content: Any, title: str) -> str:
    """The notebook as one HTML page that asks no other machine for anything."""
    from nbconvert import HTMLExporter

    exporter = HTMLExporter(
        embed_images=True, mathjax_url="", require_js_url="", jquery_url="", raw_template=_TEMPLATE
    )
    page, _ = exporter.from_notebook_node(content, resources={"metadata": {"name": title}})
    return str(page)


_TEMPLATE = """\
{%- extends 'lab/index.html.j2' -%}
{%- block input_group -%}
{%- if cell.metadata.get('jupyter', {}).get('source_hidden') -%}
<details><summary>{{ cell.source.splitlines()[0] | e }}</summary>{{ super() }}</details>
{%- else -%}{{ super() }}{%- endif -%}
{%- endblock input_group -%}
"""
"""nbconvert's page, with code that is folded in JupyterLab folded under its first line there, too."""


def quiet() -> None:
    """For the first cell of a notebook: nothing red about optional packages, no bar for what takes a second.

    transformers imports torchao where that is installed, which then tells of each of its parts that does not
    fit the machine. Errors are told as before; only this process is concerned.
    """
    import logging

    import torch.utils._pytree as pytree  # importing torch sets the levels of its loggers
    from transformers.utils import logging as of_transformers

    for name in ("torchao", pytree.__name__):
        logging.getLogger(name).setLevel(logging.ERROR)
    of_transformers.disable_progress_bar()


REAL = "MODLAB_SMOLLM2"
"""Environment variable: a folder with SmolLM2-135M-Instruct, or "hub"."""


RECENT = 128
"""Latest tokens that stay anyway in the notebooks: their texts are shorter than what long ones keep at 2x."""


def real_model() -> tuple[Any, Any] | None:
    """SmolLM2-135M with the routers that ship with modlab, and its tokenizer, for the notebooks' last cells.

    Returns:
        None where the environment variable REAL is not set, after a line that says what to do.
    """
    import torch

    import modlab

    base = os.environ.get(REAL)
    if not base:
        print(
            "No real model here. Get HuggingFaceTB/SmolLM2-135M-Instruct (270 MB), then, before this cell:\n"
            f'import os; os.environ["{REAL}"] = FOLDER    # or "hub", which gets it from the hub'
        )
        return None
    source = {} if base == "hub" else {"base": base}
    model, tokenizer = modlab.load("smollm2-kv", dtype=torch.float32, **source)  # bf16 is slow on a CPU
    modlab.set_keep_recent(model, RECENT)
    return model, tokenizer


LOCKERS = ("Ada", "Ben", "Cora", "Dan", "Ella", "Finn", "Gus", "Hana")


def locker_question() -> tuple[str, str]:
    """A text that asks for one of the eight numbers with which it begins, and the number.

    SmolLM2-135M, a small model, answers it with all tokens kept, and with its shipped routers with one in
    eight, not with one in twelve. A text with one number alone would show little: routers keep what is rare,
    and earlier ones still kept such a number with one token in 32.
    """
    numbers = [(i * i * 37 + i * 911 + 1234) % 9000 + 1000 for i in range(len(LOCKERS))]
    lines = [f"The locker of {LOCKERS[i]} opens with {number}.\n" for i, number in enumerate(numbers)]
    for i in range(12):
        lines.append(f"Shelf {i} holds {i * 7 % 40 + 3} boxes, and nobody has counted them since May.\n")
    return f"{''.join(lines)}The locker of Cora opens with", str(numbers[2])


def _prefer_this_python() -> None:
    """Let the kernel `python3` be this environment's, even if the user's home has another of that name."""
    os.environ.setdefault("JUPYTER_PREFER_ENV_PATH", "1")


def _write(path: Path, content: bytes) -> None:
    """Write a file whole or not at all: to a temporary file next to it, then moved into place."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)  # mkstemp's are for the owner only
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
