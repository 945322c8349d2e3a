"""Notebooks in a real JupyterLab in a real headless Chromium; a failure is what a person would see as one.

    with JupyterLab() as lab:                                  # a server and a browser, kept warm
        with lab.open("notebooks/quickstart.ipynb") as nb:
            nb.run_all()                                       # raises NotebookFailure with the traceback
            nb.drag(".modlab-threshold", 0.7)                  # with the mouse
            nb.wait_idle()
            nb.check()                                         # callbacks that raised, widgets that broke
            nb.screenshot("artefacts/quickstart")              # quickstart-01.png, -02.png, ... top to bottom

What it does to the notebook: a copy with its outputs cleared is opened in a temporary folder, so the
original is never written to; the kernel still runs with the original's folder as working directory.
Nothing under ~/.jupyter, ~/.local or ~/.ipython is read or written.

Needs jupyterlab and playwright in this Python, ipykernel in the kernel's, and Chromium on the machine
(Debian: apt-get install chromium).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

# --no-sandbox: Chromium refuses to run as root with its sandbox. --disable-gpu: there is none.
# --disable-dev-shm-usage: containers have a small /dev/shm.
# The rest keeps it from calling home on a closed network.
CHROMIUM_FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--force-color-profile=srgb",
]

# JupyterLab settings, written into a private settings folder.
LAB_SETTINGS = {
    # Put every cell in the page: other modes hide or skip cells off the screen ("full" detaches them), and a
    # hidden plotly figure or canvas has size 0.
    "@jupyterlab/notebook-extension/tracker": {
        "windowingMode": "none",
        "scrollPastEnd": False,
        "maxNumberOutputs": 1000,
    },
    # No pop-up that asks about Jupyter news over the notebook, no calls home.
    "@jupyterlab/apputils-extension/notification": {
        "fetchNews": "false",
        "checkForUpdates": False,
        "doNotDisturbMode": True,
    },
    # Saved copies carry the widgets' state, so a viewer without a kernel can draw them.
    "@jupyter-widgets/jupyterlab-manager/plugin": {"saveState": True},
    "@jupyterlab/docmanager-extension/plugin": {"autosave": False},
}

# Text that JupyterLab or ipywidgets put where a widget should have been.
BROKEN_WIDGET_TEXT = [
    r"Loading widget\.\.\.",
    r"Error displaying widget",
    r"Error creating widget",
    r"Error rendering",
    r"Click to show javascript error",
    r"Javascript Error:",
    r"Failed to load model class",
    r"\[anywidget\] Failed",
]

ANSI = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")

AGENT = Path(__file__).with_name("page_agent.js").read_text(encoding="utf-8")


class NotebookFailure(AssertionError):
    """Something in the notebook failed; .problems holds one dict (kind, cell, text) for each."""

    def __init__(self, notebook: str, problems: list[dict]):
        self.notebook, self.problems = notebook, problems
        lines = [f"{notebook}: {len(problems)} problem(s)"]
        for p in problems:
            where = "" if p.get("cell") is None else f" in cell {p['cell']} (counting from 0)"
            times = f" ({p['times']} times)" if p.get("times", 1) > 1 else ""
            lines += [f"--- {p['kind']}{where}{times}", ANSI.sub("", str(p["text"])).rstrip()]
        super().__init__("\n".join(lines))


class HarnessError(RuntimeError):
    """The harness itself could not do its work (no browser, no server): says nothing about the notebook."""


def find_chromium() -> str:
    for name in (os.environ.get("CHROMIUM"), "chromium", "chromium-browser", "google-chrome"):
        path = name and shutil.which(name)
        if path:
            return path
    raise HarnessError("no Chromium found: 'apt-get install chromium', or set CHROMIUM to its path")


class JupyterLab:
    """A private JupyterLab on a free loopback port, with a token, and a headless Chromium next to it."""

    module = "jupyterlab"
    flags = (
        "--LabApp.news_url=None",
        "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate",
        "--LabApp.extension_manager=readonly",  # the default one asks PyPI
        "--LabApp.expose_app_in_browser=True",  # window.jupyterapp, which AGENT_JS needs
    )

    def __init__(
        self,
        *,
        kernel_python: str = sys.executable,
        chromium: str | None = None,
        viewport: tuple[int, int] = (1280, 900),
        settings: dict | None = None,
        env: dict | None = None,
        start_timeout: float = 90,
        browser=None,  # of another JupyterLab: a process can start Playwright once
    ):
        # Absolute, as the kernel starts elsewhere; not resolved, as a virtual environment's is a symlink.
        self.kernel_python = os.path.abspath(shutil.which(str(kernel_python)) or str(kernel_python))
        self.viewport, self.start_timeout = viewport, start_timeout
        self.chromium_path, self.browser = chromium, browser
        self.settings = {**LAB_SETTINGS, **(settings or {})}
        self.extra_env = env or {}
        self._stack = contextlib.ExitStack()
        self._opened = 0

    def __enter__(self) -> JupyterLab:
        self._check_kernel_python()
        try:
            self.tmp = Path(
                self._stack.enter_context(
                    tempfile.TemporaryDirectory(prefix="notebook-browser-", ignore_cleanup_errors=True)
                )
            )
            self._start_server()
            if self.browser is None:
                self._start_browser()
            return self
        except BaseException:
            self._stack.close()
            raise

    def __exit__(self, *exc) -> None:
        self._stack.close()

    def _check_kernel_python(self) -> None:
        try:
            done = subprocess.run(
                [self.kernel_python, "-c", "import ipykernel"], capture_output=True, text=True, timeout=60
            )
        except OSError as e:
            raise HarnessError(f"cannot run the kernel's Python: {e}") from e
        if done.returncode:
            raise HarnessError(
                f"{self.kernel_python} cannot be a kernel: {done.stderr.strip().splitlines()[-1]}"
            )

    def _start_server(self) -> None:
        tmp, root = self.tmp, self.tmp / "root"
        root.mkdir()
        for name, values in self.settings.items():
            file = tmp / "settings" / f"{name}.jupyterlab-settings"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(values))
        # page_config: no check whether the application wants rebuilding (prebuilt extensions never do).
        labconfig = tmp / "config" / "labconfig"
        labconfig.mkdir(parents=True)
        (labconfig / "page_config.json").write_text(
            json.dumps({"buildCheck": False, "buildAvailable": False, "exposeAppInBrowser": "true"})
        )
        # A kernel of our own: KERNEL_PYTHON, working in the folder that the notebook really lives in.
        spec = tmp / "data" / "kernels" / "notebook-browser"
        spec.mkdir(parents=True)
        code = (
            "import os, pathlib; p = pathlib.Path('.kernel-cwd'); p.exists() and os.chdir(p.read_text()); "
            "from ipykernel.kernelapp import launch_new_instance as go; go()"
        )
        (spec / "kernel.json").write_text(
            json.dumps(
                {
                    "argv": [self.kernel_python, "-c", code, "-f", "{connection_file}"],
                    "display_name": "Python 3 (ipykernel)",
                    "language": "python",
                    "interrupt_mode": "signal",
                }
            )
        )
        self.token = secrets.token_hex(24)
        env = {k: v for k, v in os.environ.items() if not k.startswith(("JUPYTER", "IPYTHON"))}
        env.update(
            JUPYTER_TOKEN=self.token,  # not on the command line, where ps shows it
            JUPYTER_CONFIG_DIR=str(tmp / "config"),
            JUPYTER_DATA_DIR=str(tmp / "data"),
            JUPYTER_RUNTIME_DIR=str(tmp / "runtime"),
            IPYTHONDIR=str(tmp / "ipython"),
            JUPYTERLAB_SETTINGS_DIR=str(tmp / "settings"),
            JUPYTERLAB_WORKSPACES_DIR=str(tmp / "workspaces"),
            JUPYTER_PLATFORM_DIRS="1",
            PYDEVD_DISABLE_FILE_VALIDATION="1",
            **self.extra_env,
        )
        self.log_path = tmp / "lab.log"
        log = self._stack.enter_context(self.log_path.open("wb"))
        self.server = subprocess.Popen(
            [
                sys.executable,
                "-m",
                self.module,
                "--allow-root",
                "--no-browser",
                "--ip=127.0.0.1",
                "--ServerApp.port=0",
                f"--ServerApp.root_dir={root}",
                *self.flags,
                "--ServerApp.terminals_enabled=False",
            ],
            env=env,
            cwd=root,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        self._stack.callback(self._stop_server)
        # With port 0 the server picks a free port itself and tells it in its runtime file: no race.
        info_file, deadline = (
            tmp / "runtime" / f"jpserver-{self.server.pid}.json",
            time.monotonic() + self.start_timeout,
        )
        while True:
            if self.server.poll() is not None or time.monotonic() > deadline:
                raise HarnessError(f"JupyterLab did not start:\n{self.log()[-4000:]}")
            with contextlib.suppress(OSError, ValueError, urllib.error.URLError):
                self.url = json.loads(info_file.read_text())["url"]
                request = urllib.request.Request(
                    self.url + "api/status", headers={"Authorization": f"token {self.token}"}
                )
                urllib.request.urlopen(request, timeout=2).close()
                return
            time.sleep(0.05)

    def _stop_server(self) -> None:
        # SIGTERM lets the server shut its kernels down; a kernel whose server is gone ends by itself.
        for sig, wait in ((signal.SIGTERM, 20), (signal.SIGKILL, 10)):
            if self.server.poll() is None:
                self.server.send_signal(sig)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self.server.wait(wait)

    def _start_browser(self) -> None:
        try:
            from playwright.sync_api import sync_playwright
        except ImportError as e:
            raise HarnessError("playwright is not installed: pip install playwright") from e
        playwright = self._stack.enter_context(sync_playwright())
        self.browser = playwright.chromium.launch(
            executable_path=self.chromium_path or find_chromium(), headless=True, args=CHROMIUM_FLAGS
        )
        self._stack.callback(self.browser.close)

    def log(self) -> str:
        """What the server and its kernels printed (a kernel crash's last words are here)."""
        with contextlib.suppress(OSError):
            return self.log_path.read_text(errors="replace")
        return ""

    def _place(self, folder: str, name: str) -> str:
        """The address of a notebook. A workspace of its own: the server would reopen the default one's
        notebooks."""
        return f"lab/workspaces/{folder}/tree/{folder}/{name}"

    @contextlib.contextmanager
    def open(
        self,
        notebook,
        *,
        timeout: float = 180,
        cwd=None,
        ignore_console=(),
        allow_external: bool = False,
        keep_outputs: bool = False,
    ):
        """Open a copy of the notebook in a fresh browser profile; yields a Notebook.

        The copy's outputs are cleared, so that whatever shows was made now. keep_outputs=True leaves them, to
        look at what a reader sees who opens the committed file and has run nothing.
        """
        source = Path(notebook).resolve()
        content = json.loads(source.read_text())
        if not keep_outputs:
            for cell in content["cells"]:
                if cell["cell_type"] == "code":
                    cell["outputs"], cell["execution_count"] = [], None
            content["metadata"].pop("widgets", None)
        content["metadata"]["kernelspec"] = {
            "name": "notebook-browser",
            "display_name": "Python 3 (ipykernel)",
            "language": "python",
        }
        self._opened += 1
        folder = self.tmp / "root" / f"n{self._opened}"
        folder.mkdir()
        (folder / ".kernel-cwd").write_text(str(Path(cwd).resolve() if cwd else source.parent))
        (folder / source.name).write_text(json.dumps(content))
        context = self.browser.new_context(viewport={"width": self.viewport[0], "height": self.viewport[1]})
        try:
            nb = Notebook(
                self,
                context.new_page(),
                source,
                folder / source.name,
                timeout,
                [re.compile(p) for p in ignore_console],
                allow_external,
            )
            nb._load(self.url + self._place(folder.name, urllib.request.pathname2url(source.name)))
            try:
                yield nb
            finally:
                nb._shutdown_kernel()
        finally:
            context.close()


class Notebook7(JupyterLab):
    """The same with Jupyter Notebook, which shows one notebook a page; needs the package `notebook`."""

    module = "notebook"
    flags = (
        "--JupyterNotebookApp.news_url=None",
        "--JupyterNotebookApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate",
        "--JupyterNotebookApp.extension_manager=readonly",
        "--JupyterNotebookApp.expose_app_in_browser=True",
    )

    def _place(self, folder: str, name: str) -> str:
        return f"notebooks/{folder}/{name}"


class Notebook:
    """One notebook, open in the browser. .page is Playwright's page, for what this class does not offer."""

    def __init__(self, lab, page, source, copy, timeout, ignore_console, allow_external):
        self.lab, self.page, self.source, self.copy, self.timeout = lab, page, source, copy, timeout
        self.ignore_console, self.allow_external = ignore_console, allow_external
        self.console: list[str] = []  # every console line, "type: text"
        self.timings: dict[str, float] = {}  # seconds, by step
        self._browser_problems: list[dict] = []
        page.set_default_timeout(min(timeout, 60) * 1000)
        page.on("console", self._on_console)
        page.on(
            "pageerror",
            lambda e: self._browser_problem("javascript error", getattr(e, "stack", "") or str(e)),
        )
        page.on("crash", lambda: self._browser_problem("browser crash", "the page crashed"))
        page.on("request", self._on_request)

    def _browser_problem(self, kind: str, text: str) -> None:
        if not any(p.search(text) for p in self.ignore_console):
            self._browser_problems.append({"kind": kind, "cell": None, "text": text})

    def _on_console(self, message) -> None:
        self.console.append(f"{message.type}: {message.text}")
        if message.type == "error":
            self._browser_problem("console error", f"{message.text}\n  at {message.location.get('url', '')}")

    def _on_request(self, request) -> None:
        if (
            not self.allow_external
            and request.url.startswith(("http", "ws"))
            and not request.url.startswith((self.lab.url, self.lab.url.replace("http", "ws", 1)))
        ):
            self._browser_problem("external request", f"the notebook asks the network for {request.url}")

    @contextlib.contextmanager
    def _timed(self, name):
        start = time.monotonic()
        try:
            yield
        finally:
            self.timings[name] = round(time.monotonic() - start, 2)

    def _load(self, url: str) -> None:
        from playwright.sync_api import Error as PlaywrightError

        try:
            self._open_page(url)
        except PlaywrightError as e:
            raise self._failure("notebook did not open", f"{e}\n{self.lab.log()[-1500:]}") from e

    def _open_page(self, url: str) -> None:
        with self._timed("load"):
            self.page.goto(f"{url}?token={self.lab.token}")
            self.page.wait_for_selector(
                ".jp-NotebookPanel .jp-Notebook .jp-Cell", timeout=self.timeout * 1000
            )
            self.page.wait_for_function(
                "() => { const w = window.jupyterapp && window.jupyterapp.shell.currentWidget;"
                " return w && w.sessionContext && w.sessionContext.isReady; }",
                timeout=self.timeout * 1000,
            )
            # The sidebars are no part of a notebook: give it the whole width.
            self.page.evaluate(
                "async () => { const s = window.jupyterapp.shell; s.collapseLeft && s.collapseLeft();"
                " s.collapseRight && s.collapseRight();"
                " await s.currentWidget.revealed; await s.currentWidget.sessionContext.ready; }"
            )
            self.page.evaluate(f"() => {{ {AGENT} window.nbInstall(); }}")
        with self._timed("kernel start"):
            self.wait_idle()

    def _shutdown_kernel(self) -> None:
        with contextlib.suppress(Exception):
            self.page.evaluate(
                "() => Promise.race([window.jupyterapp.shell.currentWidget.sessionContext.shutdown(),"
                " new Promise(r => setTimeout(r, 8000))])"
            )

    def run_all(self, *, check: bool = True) -> None:
        """Run All Cells, wait until kernel and page are at rest; NotebookFailure if a problem shows."""
        with self._timed("run all"):
            self.page.evaluate(
                "() => { window.__nb.run = 'running';"
                " window.jupyterapp.commands.execute('notebook:run-all-cells')"
                ".then(() => { window.__nb.run = 'done'; }, e => { window.__nb.run = 'failed: ' + e; }); }"
            )
            self.wait_idle()
        if check:
            self.check()

    def wait_idle(self, *, timeout: float | None = None, quiet: float = 0.3) -> None:
        """Wait until no cell runs, the kernel has worked off every message, and the page is still."""
        timeout = timeout or self.timeout
        deadline, still_by = time.monotonic() + timeout, None
        while True:
            s = self.page.evaluate("window.nbState()")
            if s["dead"] or s["dialog"]:
                self.page.wait_for_timeout(300)
                self.check()
                raise self._failure("dialog", s["dialog"] or "kernel died")
            rested = (
                s["run"] != "running"
                and not s["pending"]
                and not s["running"]
                and not s["loading"]
                and s["kernel"] == "idle"
                and s["quiet"] >= quiet * 1000
            )
            if rested:  # a page that never stops moving (an animation) is given two seconds, not for ever
                still_by = still_by or time.monotonic() + 2
                if s["still"] >= 150 or time.monotonic() > still_by:
                    self.page.evaluate(
                        "() => new Promise(r => requestAnimationFrame(() => requestAnimationFrame(r)))"
                    )
                    return
            else:
                still_by = None
            if time.monotonic() > deadline:
                problems = self.problems()
                cells = [
                    {
                        "kind": "timeout",
                        "cell": r["cell"],
                        "text": f"still running after {timeout:.0f} s:\n{r['source']}",
                    }
                    for r in s["running"]
                ] or [{"kind": "timeout", "cell": None, "text": f"not idle after {timeout:.0f} s: {s}"}]
                raise NotebookFailure(
                    self.source.name, cells + [p for p in problems if p["kind"] != "not executed"]
                )
            self.page.wait_for_timeout(50)

    def _failure(self, kind: str, text: str) -> NotebookFailure:
        return NotebookFailure(self.source.name, [{"kind": kind, "cell": None, "text": text}])

    def problems(self) -> list[dict]:
        """All that is wrong now: errors and cells not run, broken widgets, callback and script errors."""
        found = (
            self.page.evaluate("broken => window.nbProblems(broken)", BROKEN_WIDGET_TEXT)
            + self._browser_problems
        )
        # A callback that raises does so once for each step of a drag: tell it once, with the number of times.
        unique: dict[tuple, dict] = {}
        for p in found:
            text = (
                p["text"].strip().rpartition("\n")[0] if p["kind"] == "widget callback error" else p["text"]
            )
            first = unique.setdefault((p["kind"], p["cell"], text), {**p, "times": 0})
            first["times"] += 1
        # After an error or a dead kernel nothing else runs: that is one problem, not one for each cell.
        skipped = [p for p in unique.values() if p["kind"] == "not executed"]
        unique = [p for p in unique.values() if p["kind"] != "not executed"]
        if skipped:
            cells = ", ".join(str(p["cell"]) for p in skipped)
            unique.append(
                {
                    "kind": "not executed",
                    "cell": skipped[0]["cell"],
                    "text": f"cells {cells}; the first:\n{skipped[0]['text']}",
                }
            )
        if any(p["kind"] == "kernel died" for p in unique):
            unique.append({"kind": "server log", "cell": None, "text": self.lab.log()[-1500:]})
        return unique

    def check(self) -> None:
        problems = self.problems()
        if problems:
            raise NotebookFailure(self.source.name, problems)

    def text(self, selector: str = ".jp-OutputArea") -> str:
        """What a reader can read in the outputs (or in any part of the page)."""
        return "\n".join(self.page.locator(f".jp-Notebook {selector}").all_inner_texts())

    def pixels(self, selector: str, index: int = 0) -> str:
        """A hash of how an element looks: differs when what a person sees differs, whatever drew it."""
        return hashlib.sha256(
            self.page.locator(f".jp-Notebook {selector}").nth(index).screenshot()
        ).hexdigest()

    def expect(self, selector: str, *, count: int = 1) -> None:
        """At least `count` elements match, and each has a size on the screen."""
        found = self.page.locator(f".jp-Notebook {selector}")
        sized = sum(
            1
            for i in range(found.count())
            if all(
                (found.nth(i).bounding_box() or {"width": 0, "height": 0})[k] > 0 for k in ("width", "height")
            )
        )
        if sized < count:
            raise self._failure("not on the screen", f"{selector}: {sized} visible, {count} expected")

    def screenshot(self, path) -> list[Path]:
        """The whole notebook from top to bottom, one screenful a file: PATH-01.png, PATH-02.png, ..."""
        base = Path(path)
        base.parent.mkdir(parents=True, exist_ok=True)
        self.page.mouse.move(2, 2)
        self.page.evaluate("() => { document.activeElement && document.activeElement.blur(); }")
        outer = ".jp-NotebookPanel:not(.lm-mod-hidden) .jp-WindowedPanel-outer"
        measure = (
            f"() => {{ const o = document.querySelector('{outer}');"
            " const r = o.getBoundingClientRect();"
            " return {top: o.scrollTop, height: o.scrollHeight, view: o.clientHeight,"
            " x: r.x, y: r.y, width: r.width}; }"
        )
        scroll = (
            f"y => {{ document.querySelector('{outer}').scrollTop = y;"
            " return new Promise(r => requestAnimationFrame(() => requestAnimationFrame(r))); }"
        )
        start, files, shown = self.page.evaluate(measure)["top"], [], 0
        while True:
            self.page.evaluate(scroll, shown)
            self.page.wait_for_timeout(120)
            m = self.page.evaluate(measure)
            skip = shown - m["top"]  # the last screenful overlaps the one before: cut the overlap off
            file = base.with_name(f"{base.name}-{len(files) + 1:02d}.png")
            self.page.screenshot(
                path=str(file),
                clip={
                    "x": m["x"],
                    "y": m["y"] + skip,
                    "width": m["width"],
                    "height": max(1, m["view"] - skip),
                },
            )
            files.append(file)
            shown = m["top"] + m["view"]
            if shown >= m["height"] - 1 or len(files) >= 60:
                break
        self.page.evaluate(scroll, start)
        return files

    def drag(self, selector: str, value: float, *, release: bool = True, steps: int = 12) -> float:
        """Drag the handle of an <input type=range> with the mouse; returns the value that it then has."""
        slider = self.page.locator(f".jp-Notebook {selector}").first
        slider.scroll_into_view_if_needed()
        box = slider.bounding_box()
        low, high, now = slider.evaluate("e => [e.min, e.max, e.value].map(Number)")
        # The middle of the handle stays half its width inside of the track's ends.
        inset = box["height"] * 0.35

        def at(v: float) -> float:
            return box["x"] + inset + (box["width"] - 2 * inset) * (v - low) / (high - low)

        y = box["y"] + box["height"] / 2
        self.page.mouse.move(at(now), y)
        self.page.mouse.down()
        self.page.mouse.move(at(value), y, steps=steps)
        if release:
            self.page.mouse.up()
        return slider.evaluate("e => Number(e.value)")

    def python(self, code: str) -> str:
        """Run code in the notebook's kernel, in no cell; returns what it printed, fails if it raised."""
        said = self.page.evaluate("code => window.nbPython(code)", code)
        if said["error"]:
            raise self._failure("python", ANSI.sub("", said["error"]))
        return said["text"]

    def theme(self, name: str) -> None:
        """Change JupyterLab's theme, as its Settings menu does."""
        self.page.evaluate(
            "theme => window.jupyterapp.commands.execute('apputils:change-theme', {theme})", name
        )
        light = "false" if "Dark" in name else "true"
        self.page.wait_for_selector(f"body[data-jp-theme-light='{light}']", state="attached")
        self.wait_idle()

    def save(self, path) -> Path:
        """Save the notebook as it stands, with outputs and widget state, and copy it to `path`."""
        self.page.evaluate("() => window.jupyterapp.shell.currentWidget.context.save()")
        content = json.loads(self.copy.read_text())
        content["metadata"]["kernelspec"] = {
            "name": "python3",
            "display_name": "Python 3 (ipykernel)",
            "language": "python",
        }
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")
        return Path(path)
