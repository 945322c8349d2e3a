"""What `modlab train` does between its flags and `modlab.train`."""

from __future__ import annotations

import inspect
import re
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import modlab
from modlab.cli.program import build_parser, main
from modlab.cli.train import _check_distils, _check_lengths, _checked, _distilled, _shares
from modlab.data import mixed_lengths, with_repeats
from modlab.errors import ModlabError
from modlab.saving.files import ROUTER_FILE
from modlab.training.config import TrainConfig
from tests.helpers.models import dense_llama, scatter_gates
from tests.helpers.tokenizers import make_tokenizer


def _options(*words: str, out: Path = Path("run")) -> Namespace:
    """Of a command as a user types it."""
    return build_parser().parse_args(["train", "m", "--data", "d", "--out", str(out), *words])


@pytest.mark.parametrize("skip", ["kv+prompt", "prompt"])
def test_projections_are_fitted_where_prompts_leave(
    skip: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = modlab.convert(dense_llama(), modlab.MoDConfig(skip=skip))  # type: ignore[arg-type]
    rows = torch.randint(3, 48, (8, 32))
    options = _options("--no-repeats", "--seq-len", "32", out=tmp_path)
    config = TrainConfig(steps=1, objective="distil")
    for tokens, taken, fitted in ((None, [], 1), (0, [], 0), (64, ["x.mod_projections.k_proj.weight"], 0)):
        options.fit_tokens = tokens
        assert _distilled(options, config, model, None, rows, taken) is rows
        assert capsys.readouterr().out.count("Projections above layer 4 are fitted") == fitted
    assert model.mod.trained is None


def test_what_has_no_fit_is_distilled_without(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = modlab.convert(dense_llama(), modlab.MoDConfig(skip="mlp"))
    options = _options("--no-repeats", out=tmp_path)
    rows = torch.randint(3, 48, (8, 32))
    assert _distilled(options, TrainConfig(steps=1, objective="distil"), model, None, rows, []) is rows
    assert "Nothing is fitted first" in capsys.readouterr().out


def test_leaving_is_trained_on_top_of_trained_routers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`--recipe speed --start` routers of K/V, as a user types it; and once more, to go on."""
    dense_llama().save_pretrained(tmp_path / "tiny")
    make_tokenizer().save_pretrained(tmp_path / "tiny")
    (tmp_path / "text.txt").write_text(" ".join(f"w{i * i % 90}" for i in range(4000)))
    config = modlab.MoDConfig(layers="all", gates="kv_head", router_hidden=16)
    trained = scatter_gates(modlab.convert(dense_llama(), config))
    modlab.save_routers(trained, tmp_path / "kv", str(tmp_path / "tiny"))
    words = ["train", str(tmp_path / "tiny"), "--recipe", "speed", "--start", str(tmp_path / "kv")]
    words += ["--data", str(tmp_path / "text.txt"), "--seq-len", "300", "--batch-size", "2"]
    words += [
        "--device",
        "cpu",
        "--heldout-tokens",
        "0",
        "--no-repeats",
        "--no-calibrate",
        "--out",
        str(tmp_path / "run"),
    ]
    words += ["--kv-saving", "8", "--lr", "1e-5", "--router-lr", "1e-6"]
    assert main([*words, "--steps", "2", "--save-every", "1"]) == 0
    said = capsys.readouterr().out
    assert "are the start" in said and "Projections above layer 4 are fitted" in said
    both = load_file(tmp_path / "run" / "model" / "modlab_router.safetensors")
    source = load_file(tmp_path / "kv" / "modlab_router.safetensors")
    assert any("mod_projections" in name for name in both)
    for name in source:
        below = int(name.split(".")[2]) < 4  # above, routers are fitted to the state that they read there
        if not name.endswith("bias") and (below or not name.endswith("weight")):
            torch.testing.assert_close(both[name], source[name], atol=0 if below else 1e-4, rtol=0)
    model, _ = modlab.load(tmp_path / "run" / "model")
    assert model.mod.config.keep_recent == 128, "those of 8x in 2,048 tokens, not the routers' own"
    assert main([*words, "--steps", "3", "--resume", "auto"]) == 0
    assert "are the start" not in capsys.readouterr().out


def test_rows_are_as_long_as_the_longest_of_the_lengths_that_are_cut_from_them() -> None:
    options = Namespace(lengths=[4096, 8192], seq_len=None)
    _check_lengths(options)
    assert options.seq_len == 8192
    with pytest.raises(ModlabError, match="--seq-len 4096 tokens.*at least 8192"):
        _check_lengths(Namespace(lengths=[4096, 8192], seq_len=4096))


def test_flags_given_with_a_recipe_are_checked_with_what_the_recipe_says() -> None:
    distil = Namespace(recipe="distil", start=None)
    _checked(distil, {"tokens": 9, "keep_range": (0.04, 0.2)})  # of an objective that the recipe names
    for given, said in (
        ({"keep_range": (0.5, 0.2)}, "keep_range"),
        ({"objective": "none"}, "keep_range needs"),
    ):
        with pytest.raises(ModlabError, match=said):
            _checked(distil, {"tokens": 9, **given})
    nothing = Namespace(recipe=None, start=None)  # a dense model takes the default recipe then, another none
    _checked(nothing, {"tokens": 9, "keep_range": (0.04, 0.67)})
    _checked(nothing, {"tokens": 9, "objective": "load"})
    for given, said in (({"keep_range": (0.5, 0.2)}, "keep_range"), ({"keep_ratio": 3.0}, "keep_ratio=3.0")):
        with pytest.raises(ModlabError, match=said):
            _checked(nothing, {"tokens": 9, **given})


def _tiny(folder: Path, tokens: int) -> list[str]:
    """A dense model and a text in a folder; the words of a run on them."""
    dense_llama().save_pretrained(folder / "tiny")
    make_tokenizer().save_pretrained(folder / "tiny")
    (folder / "text.txt").write_text(" ".join(f"w{i * i % 90}" for i in range(tokens)))
    words = ["train", str(folder / "tiny"), "--data", str(folder / "text.txt"), "--out", str(folder / "run")]
    return [*words, "--device", "cpu", "--heldout-tokens", "0", "--seq-len", "128", "--batch-size", "2"]


def test_without_a_recipe_a_dense_model_is_fitted_and_distilled(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*_tiny(tmp_path, 4000), "--steps", "2"]
    assert main([*words, "--fit-tokens", "1024"]) == 0
    said = capsys.readouterr()
    assert "converted by the recipe default" in said.out and "Fit(tokens=" in said.out
    assert "Fitting routers" in said.err and "tok/s" in said.err  # bars of the fit and of the run
    model, _ = modlab.load(tmp_path / "run" / "model")
    assert model.mod.trained.method.startswith("distilled") and 2.0 in model.mod.trained.savings
    assert model.mod.config.kv_cache_dtype == "int8" and "keep ratio 0.296, what is kept in eight" in said.out
    plain = [
        *words[: words.index("--out")],
        "--out",
        str(tmp_path / "plain"),
        *words[words.index("--device") :],
    ]
    assert main([*plain, "--kv-cache-dtype", "auto", "--fit-tokens", "0"]) == 0
    said = capsys.readouterr()
    assert "keep ratio 0.333" in said.out and "eight bits" not in said.out
    assert modlab.load(tmp_path / "plain" / "model")[0].mod.config.kv_cache_dtype == "auto"


def test_a_converted_model_has_no_recipe_and_is_told_what_only_one_would_allow(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = _tiny(tmp_path, 300)
    assert main([*words, "--objective", "target", "--steps", "1"]) == 2
    assert "'default' distils" in capsys.readouterr().err
    modlab.convert(dense_llama()).save_pretrained(tmp_path / "tiny")
    assert main([*words, "--keep-range", "0.04,0.67", "--steps", "1"]) == 2
    assert "keep_range needs objective" in capsys.readouterr().err


def test_nothing_is_fitted_for_a_run_without_held_out_text(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*_tiny(tmp_path, 300), "--heldout-tokens", "256", "--steps", "1"]) == 2
    said = capsys.readouterr()
    assert "heldout split" in said.err and "Fit" not in said.out + said.err


def test_nothing_is_fitted_where_another_run_lies_or_a_checkpoint_does(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*_tiny(tmp_path, 4000), "--fit-tokens", "1024"]
    (tmp_path / "run" / "model").mkdir(parents=True)
    for more, why in (([], "already holds a run"), (["--resume", "auto"], "already holds a finished run")):
        assert main([*words, "--steps", "2", *more]) == 2
        said = capsys.readouterr()
        assert why in said.err and "Fit" not in said.out + said.err and "converted" not in said.out
    words[words.index("--out") + 1] = str(tmp_path / "first")
    assert main([*words, "--steps", "2", "--save-every", "1"]) == 0
    assert "Fit(tokens=" in capsys.readouterr().out
    words[words.index("--out") + 1] = str(tmp_path / "second")  # taken up in another folder
    checkpoint = tmp_path / "first" / "checkpoints" / "step_1"
    assert main([*words, "--steps", "2", "--resume", str(checkpoint)]) == 0
    assert "Fit" not in capsys.readouterr().out
    one, other = (load_file(tmp_path / run / "model" / ROUTER_FILE) for run in ("first", "second"))
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["--freeze-below"], "no prompt token leaves"),
        (["--dense", "--objective", "distil"], "needs routers, but the model is dense"),
        (["--lengths", "64,128", "--batch-size", "900"], "too few for a batch"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_nothing_is_fitted_for_a_run_that_cannot_begin(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], why: str
) -> None:
    assert main([*_tiny(tmp_path, 4000), "--steps", "1", *words]) == 2
    said = capsys.readouterr()
    assert why in said.err and "Fit" not in said.out + said.err


def test_nothing_is_fitted_for_a_distillation_that_was_given_a_teacher(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = _tiny(tmp_path, 300)
    assert main([*words, "--steps", "1", "--kl", "1", "--teacher", str(tmp_path / "tiny")]) == 2
    said = capsys.readouterr()
    assert "train the plain form: `modlab convert" in said.err and "Fit" not in said.out + said.err
    plain = modlab.convert(dense_llama(), modlab.MoDConfig(keep_recent=16))
    plain.save_pretrained(tmp_path / "plain")
    make_tokenizer().save_pretrained(tmp_path / "plain")
    words[1] = str(tmp_path / "plain")
    assert main([*words, "--steps", "1", "--kl", "1", "--teacher", str(tmp_path / "tiny")]) == 0


def test_shares_of_rows_with_repeats_go_to_the_rows_and_to_batches_of_several_lengths() -> None:
    rows = torch.arange(1024).repeat(200, 1)
    config = TrainConfig(steps=1, batch_size=1, objective="distil")
    model = modlab.convert(dense_llama(), modlab.MoDConfig(skip="kv"))
    fixed = ("--fit-tokens", "0", "--lines", "0", "--passages")
    for share in ("0.25", "0.75"):
        made = _distilled(_options(*fixed, share), config, model, None, rows, [])
        assert torch.equal(made, with_repeats(rows, passages=float(share), lines=0.0))
        changed = float((made != rows).any(1).float().mean())
        assert abs(changed - float(share)) < 0.1
        of_lengths = _distilled(
            _options(*fixed, share, "--lengths", "512,1024", "--seq-len", "1024"),
            config,
            model,
            None,
            rows,
            [],
        )
        wanted = mixed_lengths(rows, lengths=(512, 1024), tokens=1024, passages=float(share), lines=0.0)
        assert all(torch.equal(*pair) for pair in zip(of_lengths, wanted, strict=True))
    assert _distilled(_options(*fixed, "0"), config, model, None, rows, []) is rows


def test_shares_that_are_not_given_are_those_of_with_repeats(capsys: pytest.CaptureFixture[str]) -> None:
    known = inspect.signature(with_repeats).parameters
    defaults = {name: known[name].default for name in ("passages", "lines", "near")}
    assert _shares(_options()) == defaults
    assert _shares(_options("--passages", "0.5")) == {**defaults, "passages": 0.5}
    assert _shares(_options("--no-repeats")) == {"passages": 0.0, "lines": 0.0, "near": 0.0}
    with pytest.raises(SystemExit):
        build_parser().parse_args(["train", "--help"])
    said = " ".join(capsys.readouterr().out.split())
    for name in ("passages", "lines"):
        wanted = rf"--{name} SHARE of the rows, in which [\w -]+ \(default: {defaults[name]}\)"
        assert re.search(wanted, said)
    assert defaults["near"] == 0
    assert re.search(r"--near SHARE of the repetitions, [\w -]+ \(default: 0,", said)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--no-repeats", "--passages", "0.5"), "--no-repeats leaves no rows for --passages 0.5: give one"),
        (("--no-repeats", "--lines", "0"), "--no-repeats leaves no rows for --lines 0: give one"),
        (("--near", "1", "--passages", "0", "--lines", "0"), r"near=1.0: passages=0 and lines=0 leave no"),
        (("--near", "1.5"), r"near=1.5: a share of the repetitions"),
        (("--no-repeats", "--near", "0.5"), "--no-repeats leaves no rows for --near 0.5: give one"),
        (("--passages", "1.5"), r"passages=1.5: a share of the rows"),
        (("--lines", "-1"), r"lines=-1.0: a share of the rows"),
        (("--passages", "0.9"), "passages=0.9 and lines=0.2 together are more than all rows"),
    ],
)
def test_shares_that_cannot_be_are_refused_before_a_model_is_loaded(
    words: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", "no/such/model", "--data", "d", "--out", "o", "--steps", "1", *words]) == 2
    assert re.search(said, capsys.readouterr().err)


@pytest.mark.parametrize(
    "words",
    [("--passages", "0.3"), ("--lines", "0"), ("--near", "0.5"), ("--lengths", "32"), ("--fit-tokens", "0")],
)
def test_flags_of_a_distillation_are_refused_for_another_objective(words: tuple[str, ...]) -> None:
    options = _options(*words)
    _check_distils(options, TrainConfig(steps=1, objective="distil"))
    with pytest.raises(ModlabError, match=f"{words[0]}: used with --objective distil only; .*'none'"):
        _check_distils(options, TrainConfig(steps=1, objective="none"))


def test_a_resumed_run_notices_other_shares_as_other_lengths(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Both change the rows, which a run is resumed with as they were."""
    dense_llama().save_pretrained(tmp_path / "tiny")
    make_tokenizer().save_pretrained(tmp_path / "tiny")
    (tmp_path / "text.txt").write_text(" ".join(f"w{i * i % 90}" for i in range(9000)))
    words = ["train", str(tmp_path / "tiny"), "--recipe", "distil", "--data", str(tmp_path / "text.txt")]
    words += ["--fit-tokens", "0", "--heldout-tokens", "0", "--no-calibrate", "--device", "cpu"]
    words += ["--seq-len", "300", "--batch-size", "2", "--save-every", "1", "--out", str(tmp_path / "run")]
    words += ["--kv-saving", "1.5", "--keep-range", "0.1,0.9", "--recent-range", "8,32"]
    assert main([*words, "--passages", "0.5", "--steps", "1"]) == 0
    again = [*words, "--steps", "2", "--resume", "auto"]
    capsys.readouterr()
    for other in (("--passages", "0.6"), (), ("--passages", "0.5", "--lines", "0.4"), ("--no-repeats",),
                  ("--passages", "0.5", "--near", "0.5"),
                  ("--passages", "0.5", "--lengths", "150,300")):  # fmt: skip
        assert main([*again, *other]) == 2, other
        assert re.search(r"needs the data and the settings.*data\.", capsys.readouterr().err), other
    assert main([*again, "--passages", "0.5"]) == 0


def test_routers_of_another_width_are_fitted_trained_and_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dense_llama().save_pretrained(tmp_path / "tiny")
    make_tokenizer().save_pretrained(tmp_path / "tiny")
    (tmp_path / "text.txt").write_text(" ".join(f"w{i * i % 90}" for i in range(9000)))
    words = ["train", str(tmp_path / "tiny"), "--data", str(tmp_path / "text.txt"), "--device", "cpu"]
    words += ["--router-hidden", "64", "--fit-tokens", "600", "--heldout-tokens", "0", "--no-calibrate"]
    words += ["--seq-len", "300", "--batch-size", "2", "--steps", "1", "--out", str(tmp_path / "run")]
    words += ["--kv-saving", "1.5", "--keep-range", "0.1,0.9", "--recent-range", "8,32", "--near", "0.5"]
    assert main(words) == 0, capsys.readouterr().err
    model = modlab.load(tmp_path / "run" / "model")[0]
    assert model.mod.config.router_hidden == 64
    into = [tensor for name, tensor in model.named_parameters() if name.endswith("mod_router.into")]
    assert into and all(tensor.shape == (64, model.config.hidden_size) for tensor in into)
    words[1], words[-2:] = str(tmp_path / "run" / "model"), []
    assert main([*words[:-6], "--out", str(tmp_path / "again")]) == 2
    assert "--router-hidden are for a dense MODEL" in capsys.readouterr().err
