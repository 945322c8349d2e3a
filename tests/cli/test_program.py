"""The command line as a user meets it: real subprocesses of `python -m modlab` with a model made here."""

import dataclasses
import json
import os
import re
import shlex
import subprocess
import sys
import time
import urllib.error
import urllib.request
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

import modlab
from modlab import cli
from modlab.cli import flags, program
from modlab.recipes import TRAINED
from modlab.training.config import TrainConfig
from modlab.warn import ModlabWarning
from scripts.pages.commands import parsers
from tests.helpers.launch import python_path
from tests.helpers.models import tiny_config

HEAVY = {"torch", "transformers", "numpy", "pandas", "matplotlib", "plotly", "ipywidgets", "anywidget"}
COMMANDS = ("lab", "convert", "fit", "train", "eval", "probe", "sweep", "bench")
TEXT = "def add(first, second):\n    return first + second\n\n\nclass Stack:\n    items: list = []\n"


def modlab_process(
    *arguments: str | Path, cwd: Path, timeout: float = 240, **environment: str
) -> subprocess.CompletedProcess[str]:
    """`python -m modlab ARGUMENTS` in folder `cwd`, importing this checkout."""
    return subprocess.run(
        [sys.executable, "-m", "modlab", *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": python_path(), "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=timeout,
    )


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny dense model and a byte-level BPE tokenizer, as transformers saves them."""
    folder = tmp_path_factory.mktemp("models") / "dense"
    torch.manual_seed(0)
    LlamaForCausalLM(tiny_config(max_position_embeddings=64)).save_pretrained(folder)
    bpe = Tokenizer(models.BPE())
    bpe.decoder = decoders.ByteLevel()
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        [TEXT], trainers.BpeTrainer(vocab_size=400, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet)
    )
    PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A .jsonl file of many small documents, so that some are held out."""
    path = tmp_path_factory.mktemp("corpus") / "docs.jsonl"
    lines = [json.dumps({"text": f"{TEXT}value_{number} = {number}\n" * 4}) for number in range(200)]
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def converted(source: Path) -> Path:
    """The folder that `modlab convert` makes of `source`: layers 1 and 4 routed at p = 0.6 and 0.7."""
    target = source.parent / "mod"
    flags = ["--layers", "1,4", "--p", "1=0.6,4=0.7", "--skip", "attention", "--init-gate", "0.8"]
    done = modlab_process("convert", source, target, *flags, cwd=source.parent)
    assert done.returncode == 0, done.stderr
    assert "2 of 6 layers routed [1, 4]" in done.stdout
    return target


def test_distillation_fits_first_and_leaves_thresholds(source: Path, corpus: Path) -> None:
    heads, out = source.parent / "heads", source.parent / "distilled"
    flags = ["--layers", "all", "--gates", "kv_head", "--router-hidden", "4", "--keep-recent", "8"]
    assert modlab_process("convert", source, heads, *flags, cwd=source.parent).returncode == 0
    done = modlab_process(
        *("train", heads, "--out", out, "--data", corpus, "--objective", "distil", "--steps", "2"),
        *("--batch-size", "2", "--lengths", "32,64", "--keep-range", "0.1,0.8", "--keep-ratio", "0.4"),
        *("--fit-tokens", "480", "--heldout-tokens", "0", "--limit-tokens", "4096", "--num-workers", "0"),
        cwd=source.parent,
    )
    assert done.returncode == 0, done.stderr
    assert "Fit(tokens=" in done.stdout and "finished after 2 steps" in done.stdout
    # Of the savings of `CALIBRATED` those whose gates keep a ratio within `--keep-range`.
    assert set(json.loads((out / "thresholds.json").read_text())) == {"2", "3", "4"}
    model, _ = modlab.load(out / "model")
    assert model.mod.trained.method.startswith("distilled")


def test_fit_leaves_a_folder_that_keeps_what_was_asked(source: Path, corpus: Path) -> None:
    target = source.parent / "fitted"
    done = modlab_process(
        *("fit", source, target, "--data", corpus, "--context", "12", "--tokens", "960"),
        *("--kv-saving", "2.5"),
        cwd=source.parent,
    )
    assert done.returncode == 0, done.stderr
    assert re.search(r"fitted to 840 tokens in \d+ s, R² \S+, keep ratio 0\.4", done.stdout)
    model, _ = modlab.load(target)
    assert (model.mod.config.gates, model.mod.layers) == ("kv_head", list(range(6)))
    again = modlab_process(
        *("fit", target, target.with_name("no"), "--data", corpus, "--kv-saving", "2"), cwd=source.parent
    )
    assert again.returncode == 2 and "--keep-ratio" in again.stderr


def test_help_is_fast_and_names_every_command(tmp_path: Path) -> None:
    done = modlab_process("--help", cwd=tmp_path)
    assert done.returncode == 0
    for command in COMMANDS:
        assert re.search(rf"^    {command} ", done.stdout, re.M)
    # What makes it fast is what it does not import; a clock would measure the machine.
    told = modlab_process("--help", cwd=tmp_path, PYTHONPROFILEIMPORTTIME="1").stderr
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in told.splitlines()}
    assert "modlab" in imported
    assert not imported & HEAVY


def test_defaults_are_told_as_one_gives_them() -> None:
    """128,1024 and not (128, 1024); nothing for an empty list; no sixteen digits of two thirds."""
    for name, _, parser in parsers():
        told = " ".join(parser.format_help().split())
        assert not re.search(r"default: [(\[]", told), name
        assert not re.search(r"default: \d*\.\d{5,}\)", told), name


def test_the_recipes_stand_one_below_the_other() -> None:
    (train,) = (parser for name, _, parser in parsers() if name == "train")
    for recipe in TRAINED:
        assert re.search(rf"^ +- {recipe}: ", train.format_help(), re.M)


def test_own_warnings_come_without_the_line_that_raised_them() -> None:
    before = warnings.formatwarning
    with program._warnings_in_words():
        own = warnings.formatwarning("No threshold for 16x.", ModlabWarning, "any.py", 7, None)
        others = warnings.formatwarning("slow", UserWarning, "/somewhere/else.py", 7, None)
    assert own == "modlab: warning: No threshold for 16x.\n"
    assert "/somewhere/else.py:7: UserWarning: slow" in others
    assert warnings.formatwarning is before


def test_version(tmp_path: Path) -> None:
    assert modlab_process("--version", cwd=tmp_path).stdout.strip() == f"modlab {modlab.__version__}"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main([command, "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert f"modlab {command}" in text and len(text) > 200


def test_train_has_a_flag_with_a_text_for_every_setting() -> None:
    docs = flags.attribute_docs(TrainConfig)
    options = cli.build_parser().parse_args(["train", "m", "--data", "d", "--out", "o", "--no-compile"])
    assert flags.given_flags(options, TrainConfig) == {"out": Path("o"), "compile": False}
    train = next(a for a in cli.build_parser()._actions if a.dest == "COMMAND" or a.choices)
    dests = {action.dest for action in train.choices["train"]._actions}  # type: ignore[union-attr]
    for field in dataclasses.fields(TrainConfig):
        assert field.name in dests
        assert len(docs[field.name]) > 5, f"TrainConfig's docstring does not explain {field.name}"


def test_flags_are_read_with_the_types_of_the_fields() -> None:
    words = "train m --data d --out o --steps 7 --lr 1e-3 --betas 0.8,0.9 --per-layer --objective load"
    options = cli.build_parser().parse_args([*words.split(), "--resume", "auto"])
    given = flags.given_flags(options, TrainConfig)
    assert given == {
        "out": Path("o"),
        "steps": 7,
        "lr": 1e-3,
        "betas": (0.8, 0.9),
        "per_layer": True,
        "objective": "load",
        "resume": "auto",
    }
    TrainConfig(**given).check()


def test_convert_saves_what_the_flags_say(converted: Path) -> None:
    model, tokenizer = modlab.load(converted)
    assert model.mod.layers == [1, 4]
    assert model.mod.thresholds == {1: 0.6, 4: 0.7}
    assert (model.mod.config.skip, model.mod.config.init_gate) == ("attention", 0.8)
    assert (
        tokenizer.decode(tokenizer("return first")["input_ids"], skip_special_tokens=True) == "return first"
    )


def test_convert_presets(source: Path, tmp_path: Path) -> None:
    assert (
        cli.main(["convert", str(source), str(tmp_path / "a"), "--preset", "paper", "--layers", "all"]) == 0
    )
    config = modlab.load(tmp_path / "a")[0].mod.config
    assert (config.gate, config.init_gate, config.layers) == ("paper", 0.5, "all")
    assert (
        cli.main(["convert", str(source), str(tmp_path / "b"), "--preset", "topk", "--capacity", "0.5"]) == 0
    )
    config = modlab.load(tmp_path / "b")[0].mod.config
    assert (config.operator, config.capacity, config.gate) == ("topk", 0.5, "fused")


def test_convert_never_mixes_two_models(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "mod"
    target.mkdir()
    (target / "notes.txt").write_text("mine")
    assert cli.main(["convert", str(source), str(target)]) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert [p.name for p in target.iterdir()] == ["notes.txt"]
    assert cli.main(["convert", str(source), str(target), "--overwrite"]) == 0
    assert modlab.is_converted(modlab.load(target)[0])
    assert (target / "notes.txt").read_text() == "mine"


def test_no_more_tokens_are_measured_than_were_asked_for(
    converted: Path, corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["eval", str(converted), "--data", str(corpus), "--json"]
    assert cli.main([*words, "--limit-tokens", "40"]) == 0
    assert json.loads(capsys.readouterr().out)["predicted_tokens"] == 39
    assert cli.main([*words, "--limit-tokens", "40", "--seq-len", "64"]) == 2
    assert "limit_tokens=40 is less than one row (seq_len=64)" in capsys.readouterr().err


def test_eval_prints_a_table_and_the_same_as_json(
    converted: Path, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["eval", str(converted), "--data", str(corpus), "--limit-tokens", "1024"]
    as_json = modlab_process(*words, "--json", cwd=tmp_path)
    assert as_json.returncode == 0, as_json.stderr
    facts = json.loads(as_json.stdout)
    assert cli.main(words) == 0
    table = capsys.readouterr().out
    model, tokenizer = modlab.load(converted)
    assert facts["loss"] == pytest.approx(6.2, abs=0.5)  # a random model of 512 tokens: ln 512 = 6.24
    assert facts["perplexity"] == pytest.approx(torch.tensor(facts["loss"]).exp().item(), rel=1e-4)
    assert [row["layer"] for row in facts["layers"]] == model.mod.layers
    assert [row["threshold"] for row in facts["layers"]] == [0.6, 0.7]
    assert facts["kv_saving"] == pytest.approx(facts["dense_kv_bytes"] / facts["kv_bytes"])
    assert f"{facts['loss']:,.4f}" in table
    for key in ("device_name", "dtype", "versions", "date", "command"):
        assert facts[key]


def test_sweep_writes_table_and_page(converted: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    done = modlab_process(
        *("sweep", converted, "--text-file", "text.txt", "--thresholds", "0", "0.5", "0.9"),
        *("--repeats", "0", "--csv", "out.csv", "--plot", "out.html"),
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    import pandas

    rows = pandas.read_csv(tmp_path / "out.csv")
    assert list(rows.threshold) == [0, 0.5, 0.9]
    assert rows.keep_ratio.is_monotonic_decreasing
    assert rows.keep_ratio.iloc[0] == 1 and rows.keep_ratio.iloc[-1] < 1  # gates stand at 0.8
    page = (tmp_path / "out.html").read_text(encoding="utf-8")
    assert "p = 0.9" in page
    assert not re.search(r'<script[^>]+src="http', page), "the page must not need a network"


def test_train_converts_a_dense_model_and_resumes(source: Path, corpus: Path, tmp_path: Path) -> None:
    words = ["train", source, "--data", corpus, "--out", "run", "--batch-size", "2", "--log-every", "1"]
    words += ["--heldout-tokens", "512", "--recipe", "layers", "--kv-saving", "1.5", "--steps", "4"]
    words += ["--save-every", "2", "--no-calibrate"]
    done = modlab_process(*words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "by the recipe layers, routed layers [2, 3, 4], keep ratio 0.333" in done.stdout
    assert "finished after 4 steps" in done.stdout
    following = re.search(r"^next: modlab (eval .*)$", done.stdout, re.M)
    assert following and modlab_process(*shlex.split(following[1]), cwd=tmp_path).returncode == 0
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert log[-1]["step"] == 4 and log[-1]["eval_loss"] > 0
    model, tokenizer = modlab.load(tmp_path / "run" / "model")
    assert model.mod.layers == [2, 3, 4] and tokenizer is not None
    assert model.mod.config.skip == "layer"
    assert "\n# model\n" in (tmp_path / "run" / "model" / "README.md").read_text()

    again = modlab_process(*words, cwd=tmp_path)
    assert again.returncode == 2 and "already holds a run" in again.stderr


def test_bench_lists_its_cases_and_has_its_own_help(tmp_path: Path) -> None:
    listed = modlab_process("bench", cwd=tmp_path)
    assert listed.returncode == 0
    assert re.search(r"^prefill ", listed.stdout, re.M)
    assert list(tmp_path.iterdir()) == []


def test_bench_passes_its_flags_on(tmp_path: Path) -> None:
    words = "bench prefill --shape tiny --context 64 --ratios 0.5 --repeats 1 --out results"
    done = modlab_process(*words.split(), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (result,) = (tmp_path / "results").glob("prefill_cpu_*.json")
    assert json.loads(result.read_text())["rows"][0]["keep_ratio"] == 0.5


def test_lab_copies_notebooks_and_keeps_changed_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from modlab import lab

    origin = tmp_path / "package"
    (origin / "pictures").mkdir(parents=True)
    (origin / ".ipynb_checkpoints").mkdir()
    (origin / lab.QUICKSTART).write_text("one")
    (origin / "pictures" / "a.png").write_bytes(b"\x89PNG")
    (origin / ".ipynb_checkpoints" / "old.ipynb").write_text("old")
    monkeypatch.setattr(lab, "notebook_source", lambda: origin)
    target = tmp_path / "mine"

    first = lab.copy_notebooks(target)
    assert sorted(first.copied) == [str(Path("pictures/a.png")), lab.QUICKSTART]
    assert not (target / ".ipynb_checkpoints").exists()
    assert lab.copy_notebooks(target) == lab.CopyReport(), "nothing to do the second time"

    (target / lab.QUICKSTART).write_text("my work")
    kept = lab.copy_notebooks(target)
    assert kept.kept == [lab.QUICKSTART] and (target / lab.QUICKSTART).read_text() == "my work"
    assert any("--overwrite" in line for line in kept.lines(target))

    replaced = lab.copy_notebooks(target, overwrite=True)
    assert replaced.replaced == [lab.QUICKSTART] and (target / lab.QUICKSTART).read_text() == "one"
    assert [p.name for p in target.iterdir() if p.name.startswith(".")] == [], "no temporary file is left"


def test_lab_command_stays_on_this_machine_and_passes_arguments_on(tmp_path: Path) -> None:
    from modlab import lab

    command = lab.jupyter_command(tmp_path, browser=False, extra=["--port=9999"])
    assert command[:2] == [sys.executable, "-c"]
    assert "--ServerApp.ip=127.0.0.1" in command and "--no-browser" in command
    assert command[-1] == "--port=9999"
    assert f"--ServerApp.root_dir={tmp_path}" in command
    assert "--LabApp.default_url=/lab/tree/quickstart.ipynb" in command
    other = lab.jupyter_command(tmp_path, notebook="2_train.ipynb")
    assert "--LabApp.default_url=/lab/tree/2_train.ipynb" in other
    own, passed_on = cli.split_passed_on(["lab", "--no-browser", "--", "--port=9999"])
    assert (own, passed_on) == (["lab", "--no-browser"], ["--port=9999"])
    assert cli.build_parser().parse_args(own).folder == Path("modlab-notebooks")


def test_lab_runs_no_file_of_the_current_folder(tmp_path: Path) -> None:
    """A folder that somebody sent may hold modules named as JupyterLab's own, or as one that it imports."""
    from modlab import lab

    for name in ("jupyterlab", "jupyter_server", "traitlets", "tornado"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('code of the folder ran')")
    command = [*lab.jupyter_command(tmp_path, browser=False), "--version"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "code of the folder" not in done.stdout + done.stderr
    assert done.stdout.strip().startswith(version("jupyterlab").split(".")[0])


def test_lab_lists_the_notebooks_and_finds_one_by_name_or_number(capsys: pytest.CaptureFixture[str]) -> None:
    from modlab import lab

    assert cli.main(["lab", "--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("quickstart ") and [line[0] for line in lines[1:]] == list("1234567")
    assert all(len(line.split(None, 1)[1]) > 40 for line in lines), "each says what it shows"
    for word in ("2", "train", "2_train", "2_train.ipynb", "2-train", "Train"):
        assert lab.find_guide(word).file == "2_train.ipynb"
    with pytest.raises(
        modlab.ModlabError, match="no notebook is called 'nothing'; choose one of quickstart, 1_"
    ):
        lab.find_guide("nothing")
    with pytest.raises(modlab.ModlabError, match="several notebooks are called 't'"):
        lab.find_guide("t")


def answer_of(url: str, server: subprocess.Popen[bytes]) -> Any:
    """What a server answers that has written down its address, and may not listen yet."""
    while True:
        try:
            return urllib.request.urlopen(url, timeout=30)
        except urllib.error.HTTPError:
            raise
        except urllib.error.URLError:
            if server.poll() is not None:
                raise
            time.sleep(0.1)


def test_lab_opens_the_quickstart_in_a_real_jupyterlab(tmp_path: Path) -> None:
    environment = {
        **os.environ,
        "PYTHONPATH": python_path(),
        "JUPYTER_TOKEN": "secret",
        "JUPYTER_RUNTIME_DIR": str(tmp_path / "runtime"),
        "JUPYTER_CONFIG_DIR": str(tmp_path / "config"),
    }
    command = [sys.executable, "-m", "modlab", "lab", "nb", "--no-browser", "--", "--ServerApp.port=0"]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(
            command, cwd=tmp_path, env=environment, stdout=log, stderr=subprocess.STDOUT
        )
    try:
        address = ""
        for _ in range(600):
            if files := list((tmp_path / "runtime").glob("jpserver-*.json")):
                address = json.loads(files[0].read_text())["url"]
                break
            assert process.poll() is None, (tmp_path / "log").read_text()
            time.sleep(0.1)
        assert address.startswith(("http://127.0.0.1:", "http://localhost:")), (tmp_path / "log").read_text()
        with answer_of(f"{address}?token=secret", process) as answer:
            assert answer.url.split("?")[0].endswith("/lab/tree/quickstart.ipynb")
        with urllib.request.urlopen(f"{address}api/contents?token=secret", timeout=30) as answer:
            names = {entry["name"] for entry in json.load(answer)["content"]}
        assert "quickstart.ipynb" in names
    finally:
        process.terminate()
        process.wait(30)


def write_notebook(path: Path, *sources: str) -> Path:
    import nbformat

    cells = [nbformat.v4.new_markdown_cell("# A notebook"), *map(nbformat.v4.new_code_cell, sources)]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), path)
    return path


def test_execute_writes_notebook_and_page_and_leaves_the_original(tmp_path: Path) -> None:
    from modlab import lab

    original = write_notebook(
        tmp_path / "quickstart.ipynb", "import os, sys", "print(os.getcwd(), sys.prefix)"
    )
    before = original.read_bytes()
    done = lab.execute(original, timeout_s=120, progress=False)
    assert done.error is None
    assert original.read_bytes() == before
    output = json.loads(done.notebook.read_text())["cells"][-1]["outputs"][0]["text"]
    assert f"{tmp_path} {sys.prefix}" in "".join(output), "runs in its own folder, in this environment"
    page = done.page.read_text(encoding="utf-8")
    assert str(tmp_path) in page
    assert not re.search(r'<(script|link)[^>]+(src|href)="http', page), "the page must not need a network"


def test_folded_code_is_folded_in_the_page_too(tmp_path: Path) -> None:
    from modlab import lab

    path = write_notebook(tmp_path / "quickstart.ipynb", "# A <long> text\nx = 1", "print('seen', 2)")
    cells = json.loads(path.read_text())
    cells["cells"][1]["metadata"] = {"jupyter": {"source_hidden": True}}
    path.write_text(json.dumps(cells))
    page = lab.execute(path, timeout_s=120, progress=False).page.read_text(encoding="utf-8")
    assert page.count("<details><summary># A &lt;long&gt; text</summary>") == page.count("<details") == 1
    assert page.index("</details>") < page.index("seen 2")


def test_a_notebook_is_quiet_about_optional_packages(tmp_path: Path) -> None:
    code = (
        "from modlab import lab; lab.quiet()\n"
        "import logging, torch\n"
        "for name in ('torchao.x', 'torch.utils._pytree'): logging.getLogger(name).warning('HEARD')\n"
        "logging.getLogger('torchao').error('AN ERROR')\n"
        "import modlab; modlab.load('demo-kv')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0 and done.stderr.strip() == "AN ERROR"


def test_the_real_model_of_the_notebooks(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from modlab import lab

    asked: list[object] = []
    monkeypatch.setattr("modlab.load", lambda *args, **more: asked.append((args, more)) or ("model", "words"))
    recent: list[object] = []
    monkeypatch.setattr("modlab.set_keep_recent", lambda *given: recent.append(given))
    monkeypatch.delenv(lab.REAL, raising=False)
    assert lab.real_model() is None and lab.REAL in capsys.readouterr().out and not asked
    for given, base in (("some/folder", {"base": "some/folder"}), ("hub", {})):
        monkeypatch.setenv(lab.REAL, given)
        assert lab.real_model() == ("model", "words")
        args, more = asked[-1]
        assert args == ("smollm2-kv",) and {**more, "dtype": None} == {**base, "dtype": None}
        assert recent[-1] == ("model", lab.RECENT)


def test_execute_keeps_what_ran_before_a_failing_cell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from modlab import lab

    origin = tmp_path / "origin"
    origin.mkdir()
    write_notebook(
        origin / "quickstart.ipynb", "print('so far')", "raise ValueError('too small')", "print('never')"
    )
    monkeypatch.setattr(lab, "notebook_source", lambda: origin)
    assert cli.main(["lab", "--execute", str(tmp_path / "nb")]) == 1
    captured = capfd.readouterr()
    assert "ValueError: too small" in captured.err
    cells = json.loads((tmp_path / "nb" / "quickstart.executed.ipynb").read_text())["cells"]
    assert "so far" in json.dumps(cells) and "never" not in json.dumps(
        [cell.get("outputs") for cell in cells]
    )
    assert "too small" in (tmp_path / "nb" / "quickstart.html").read_text(encoding="utf-8")


def test_execute_all_goes_on_after_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from modlab import lab

    origin = tmp_path / "origin"
    origin.mkdir()
    write_notebook(origin / "quickstart.ipynb", "raise ValueError('the first one')")
    write_notebook(origin / "1_next.ipynb", "print('the second one')")
    monkeypatch.setattr(lab, "notebook_source", lambda: origin)
    target = tmp_path / "nb"
    assert cli.main(["lab", str(target), "--execute", "--notebook", "all"]) == 1
    assert "a cell of quickstart.ipynb failed" in capfd.readouterr().err
    assert "the second one" in (target / "1_next.executed.ipynb").read_text()
    assert cli.main(["lab", str(target), "--execute", "--notebook", "next"]) == 0
