"""Bad input at the command line: a few lines that say what to do, status 2, nothing left behind."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import LlamaForCausalLM, MambaConfig, MambaForCausalLM, PreTrainedTokenizerFast

from modlab import cli
from modlab.errors import ModlabError
from tests.helpers.launch import python_path
from tests.helpers.models import tiny_config


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "dense"
    torch.manual_seed(0)
    LlamaForCausalLM(tiny_config(num_hidden_layers=2, max_position_embeddings=64)).save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def save_tokenizer(folder: Path) -> None:
    words = {f"w{number}": number for number in range(512)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="w1", eos_token="w2").save_pretrained(
        folder
    )


@pytest.fixture
def refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> object:
    """Runs modlab in an empty folder, wants status 2 and a short message, and returns the message."""
    monkeypatch.chdir(tmp_path)

    def run(*words: object, leaves: tuple[str, ...] = ()) -> str:
        capfd.readouterr()
        assert cli.main([str(word) for word in words]) == cli.BAD_INPUT
        captured = capfd.readouterr()
        message = captured.err[captured.err.index("modlab: error: ") :]
        assert "Traceback" not in captured.err
        assert len(message) < 1200 and message.count("\n") <= 12, "fits on one screen"
        assert sorted(p.name for p in tmp_path.iterdir()) == sorted(leaves), "nothing half-written"
        return message

    return run


def test_folder_without_weights(refused, dense, tmp_path) -> None:
    shutil.copytree(dense, tmp_path / "hollow", ignore=shutil.ignore_patterns("*.safetensors"))
    assert "no weights" in refused("convert", "hollow", "out", leaves=("hollow",))


def test_folder_without_a_model(refused, tmp_path) -> None:
    (tmp_path / "empty").mkdir()
    assert "config.json" in refused("eval", "empty", "--data", "python", leaves=("empty",))


def test_corrupt_weights(refused, dense, tmp_path) -> None:
    shutil.copytree(dense, tmp_path / "torn")
    weights = tmp_path / "torn" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    assert "'torn'" in refused("convert", "torn", "out", leaves=("torn",))


def test_unknown_layer(refused, dense) -> None:
    message = refused("convert", dense, "out", "--layers", "0,7")
    assert "layer 7" in message and "0 to 1" in message


@pytest.mark.parametrize("p", ["1", "1.5", "-0.2", "nan"])
def test_threshold_outside_its_range(refused, dense, p: str) -> None:
    assert "at least 0 and below 1" in refused("convert", dense, "out", f"--p={p}")


def test_model_without_routable_layers(refused, tmp_path) -> None:
    config = MambaConfig(vocab_size=512, hidden_size=32, num_hidden_layers=2, state_size=4)
    MambaForCausalLM(config).save_pretrained(tmp_path / "mamba")
    save_tokenizer(tmp_path / "mamba")
    assert "no routable layers" in refused("convert", "mamba", "out", leaves=("mamba",))


@pytest.mark.parametrize("text", ["", "  \n "])
def test_empty_text(refused, dense, text: str) -> None:
    assert "empty" in refused("sweep", dense, "--text", text)


def test_empty_and_missing_and_binary_text_files(refused, dense, tmp_path) -> None:
    (tmp_path / "empty.txt").touch()
    assert "empty" in refused("sweep", dense, "--text-file", "empty.txt", leaves=("empty.txt",))
    assert "nothere.txt" in refused("sweep", dense, "--text-file", "nothere.txt", leaves=("empty.txt",))
    (tmp_path / "empty.txt").write_bytes(b"\xff\xfe\x00")
    assert "UTF-8" in refused("sweep", dense, "--text-file", "empty.txt", leaves=("empty.txt",))


def test_nothing_to_measure_on(refused, dense) -> None:
    assert "--data" in refused("sweep", dense)
    assert "not both" in refused("sweep", dense, "--text", "w5", "--data", "python")


def test_sweep_of_a_dense_model(refused, dense) -> None:
    assert "modlab.convert" in refused("sweep", dense, "--text", "w3", "--thresholds", "0.5")


def test_sweep_refuses_an_unwritable_result_before_the_work(refused, dense) -> None:
    assert "no folder" in refused("sweep", dense, "--text", "w5", "--csv", "nowhere/out.csv")


def test_unknown_data_and_too_long_rows(refused, dense) -> None:
    assert "nothere.jsonl" in refused("eval", dense, "--data", "nothere.jsonl")
    assert "2 to 64" in refused("eval", dense, "--data", "python", "--seq-len", "65")


def test_bad_training_settings_are_refused_before_the_model_is_loaded(refused, monkeypatch) -> None:
    import modlab

    monkeypatch.setattr(modlab, "load", lambda *_a, **_k: pytest.fail("loaded the model"))
    train = ("train", "whatever", "--data", "python", "--out", "run")
    assert "keep_ratio=3.0" in refused(*train, "--steps", "5", "--keep-ratio", "3")
    assert "steps, tokens or max_minutes" in refused(*train)
    assert "--teacher" in refused(*train, "--steps", "5", "--kl", "1")


def test_unknown_device(refused, dense) -> None:
    assert "--device quantum" in refused("convert", dense, "out", "--device", "quantum")


def test_unknown_benchmark(refused) -> None:
    assert "prefill" in refused("bench", "nonsense")


def test_lab_into_a_file(refused, tmp_path) -> None:
    (tmp_path / "file").write_text("mine")
    assert "is a file" in refused("lab", "file", leaves=("file",))
    assert (tmp_path / "file").read_text() == "mine"


def test_full_disk_while_saving(refused, dense, monkeypatch) -> None:
    def full(*_a: object, **_k: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(PreTrainedTokenizerFast, "save_pretrained", full)
    assert "No space left" in refused("convert", dense, "out")


def test_hub_id_without_network_in_a_real_process(tmp_path: Path) -> None:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    done = subprocess.run(
        [sys.executable, "-m", "modlab", "convert", "nobody/no-such-model", "out"],
        cwd=tmp_path,
        # a closed port of this machine: the same answer with and without a network
        env=environment
        | {
            "PYTHONPATH": python_path(),
            "HF_ENDPOINT": "http://127.0.0.1:9",
            "HF_HOME": str(tmp_path / "hf"),
        },
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2
    assert "nobody/no-such-model" in done.stderr and "network" in done.stderr
    assert "Traceback" not in done.stderr and len(done.stderr.splitlines()) <= 12
    assert not (tmp_path / "out").exists()


def test_wrong_flags_are_argparse_errors_with_status_2(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["convert"], ["nonsense"], ["train", "m"], ["convert", "a", "b", "--p", "1=x"], []):
        with pytest.raises(SystemExit) as stop:
            cli.main(words)
        assert stop.value.code == 2
        assert "usage: modlab" in capsys.readouterr().err


def test_traceback_shows_where_it_came_from(tmp_path: Path) -> None:
    for words in (["--traceback", "bench", "nonsense"], ["bench", "nonsense", "--traceback"]):
        with pytest.raises(ModlabError, match="nonsense"):
            cli.main(words)


def test_errors_of_modlab_itself_are_not_dressed_up_as_the_users(monkeypatch: pytest.MonkeyPatch) -> None:
    from modlab import lab

    def bug(*_a: object, **_k: object) -> None:
        raise KeyError(json.dumps({"a": 1}))

    monkeypatch.setattr(lab, "copy_notebooks", bug)
    with pytest.raises(KeyError):
        cli.main(["lab"])


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("eval", "DENSE", "--data", "python-stdlib", "--limit-tokens", "-1"), "--limit-tokens=-1"),
        (("eval", "DENSE", "--data", "python-stdlib", "--limit-tokens", "0"), "--limit-tokens=0"),
        (("eval", "DENSE", "--data", ""), "--data SOURCE or --tasks NAME"),
        (("eval", "DENSE", "--tasks", ""), "--data SOURCE or --tasks NAME"),
        (("probe", "DENSE", "--data", ""), "source is empty"),
        (("sweep", "DENSE", "--text", "\udce9 w1 w2"), "half a surrogate pair"),
        (("eval", "DENSE", "--data", "python-stdlib", "--device", "nosuch"), "--device nosuch"),
        (("eval", "DENSE", "--data", "python-stdlib", "--device", "meta"), "--device meta"),
        (("bench", "decode", "--decode-tokens", "0"), "--decode-tokens 0"),
        (("bench", "prefill", "--layers", "0"), "--layers 0"),
        (("bench", "prefill", "--ratios", "nan"), "--ratios nan"),
        (("bench", "--plot", "absent.json"), "absent.json"),
    ],
)
def test_values_that_mean_nothing(refused, dense, tmp_path, words, says: str) -> None:
    """Each ends in a sentence that names the flag; nothing is read as 0, as the default or as `.`."""
    if "sweep" in words:  # of a converted model
        assert cli.main(["convert", str(dense), str(tmp_path / "mod")]) == 0
        assert says in refused("sweep", "mod", *words[2:], leaves=("mod",))
        return
    assert says in refused(*(dense if word == "DENSE" else word for word in words))


def test_sweep_of_a_dense_model_fails_before_its_data_are_read(refused, dense, monkeypatch) -> None:
    monkeypatch.setattr("modlab.cli.sweep.rows_of", None)
    assert "is dense: call modlab.convert" in refused("sweep", dense, "--data", "python")
