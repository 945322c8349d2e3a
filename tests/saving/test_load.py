"""What is loaded is what was saved; all that is damaged, missing or hostile ends in a ModlabError."""

from __future__ import annotations

import contextlib
import json
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import modlab
from modlab.errors import ModlabError
from modlab.saving import load as loading
from tests.helpers.models import alternate_layers, dense_llama, scatter_gates
from tests.helpers.routing import IDS


def test_folder_of_an_earlier_version_loads_with_modlab_load(tiny_llama, saved) -> None:
    """Without the marker in config.json (and the base model in modlab_config.json)."""
    for name, key in (("config.json", "quantization_config"), ("modlab_config.json", "base_model")):
        values = json.loads((saved / name).read_text())
        del values[key]
        (saved / name).write_text(json.dumps(values))
    model, _ = modlab.load(saved)
    assert torch.equal(model(IDS).logits, tiny_llama(IDS).logits)
    assert not modlab.is_converted(AutoModelForCausalLM.from_pretrained(saved))


def damage(folder: Path, how: str) -> None:
    if how == "no weights":
        (folder / "model.safetensors").unlink()
    elif how == "corrupt weights":
        (folder / "model.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0not json at all")
    elif how == "truncated weights":
        whole = (folder / "model.safetensors").read_bytes()
        (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    elif how == "no routers":
        (folder / "modlab_router.safetensors").unlink()
    elif how == "corrupt routers":
        (folder / "modlab_router.safetensors").write_bytes(b"junk")
    elif how == "corrupt config":
        (folder / "modlab_config.json").write_text("{")
    elif how == "no config":
        (folder / "config.json").unlink()


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ("no weights", "holds no weights"),
        ("corrupt weights", "corrupt"),
        ("truncated weights", "corrupt"),
        ("no routers", "copy the whole folder"),
        ("corrupt routers", "corrupt"),
        ("corrupt config", "cannot be read"),
        ("no config", "holds no config.json"),
    ],
)
def test_damaged_folders_say_what_is_wrong(saved, how, says) -> None:
    damage(saved, how)
    with pytest.raises(ModlabError, match=says):
        modlab.load(saved)


def test_names_that_are_no_model(tmp_path) -> None:
    with pytest.raises(ModlabError, match="is not a folder"):
        modlab.load(tmp_path / "absent")
    with pytest.raises(ModlabError, match="neither a local folder nor"):
        modlab.load("modlab-test/does-not-exist")


@pytest.mark.parametrize("wrong", [None, 5, b"folder", torch.nn.Linear(1, 1), "a" * 5000])
def test_what_is_no_name_is_no_model(saved, wrong) -> None:
    with pytest.raises(ModlabError, match="name"):
        modlab.load(wrong)
    if wrong is not None:
        with pytest.raises(ModlabError, match="name"):
            modlab.load("smollm2-kv", base=wrong)


def test_a_file_that_names_what_no_system_has_is_refused(tiny_llama, tmp_path) -> None:
    modlab.save_routers(tiny_llama, tmp_path, base_model="some/base")
    described = json.loads((tmp_path / "modlab_config.json").read_text())
    described["base_model"] = "a" * 5000
    (tmp_path / "modlab_config.json").write_text(json.dumps(described))
    with pytest.raises(ModlabError, match="names no folder and no model"):
        modlab.load(tmp_path)


@torch.no_grad()
def test_third_party_weights(data_dir, tmp_path) -> None:
    for name in ("stories260K", "babyllama-tok105"):
        model, tokenizer = modlab.load(data_dir / "models" / name)
        ids = tokenizer("Once upon a time there was a little girl", return_tensors="pt").input_ids
        logits = model(ids).logits
        assert not modlab.is_converted(model)
        modlab.convert(model)
        assert torch.equal(model(ids).logits, logits)
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
        again, _ = modlab.load(tmp_path / name)
        assert torch.equal(again(ids).logits, logits)


def test_a_folder_that_lacks_tensors_is_refused(saved, tmp_path) -> None:
    """transformers would fill them with random values, and say so in a log line."""
    weights = load_file(saved / "model.safetensors")
    dense = tmp_path / "dense"
    dense_llama().save_pretrained(dense)
    AutoTokenizer.from_pretrained(saved).save_pretrained(dense)
    assert not modlab.is_converted(modlab.load(dense)[0])
    del weights["model.layers.2.mlp.up_proj.weight"]
    for folder in (dense, saved):
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ModlabError, match="lack 1 of the model's tensors|mixes two savings"):
            modlab.load(folder)
        with pytest.raises(ModlabError, match="holds no weights"):
            (folder / "model.safetensors").unlink()
            modlab.load(folder)


@pytest.mark.parametrize("change", [{"num_hidden_layers": 10**8}, {"text_config": {"n_layer": 10**8}}])
def test_a_model_of_impossible_depth_is_refused_before_it_is_built(saved, monkeypatch, change) -> None:
    values = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps(values | change))

    def build(*_: object, **__: object) -> None:
        raise AssertionError("transformers was asked to build it")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", build)
    with pytest.raises(ModlabError, match="100,000,000.* tensors"):
        modlab.load(saved)


@pytest.mark.parametrize(
    "values",
    [
        {"thresholds": {"1": 0.5, "3": 0.5}},
        {"thresholds": {"1": 0.5, "3": 0.5, "5": 0.5, "100000000": 0.5}},
        {"config": {"skip": "layer", "layers": [10**8]}},
        {"config": {"skip": "layer", "layers": [0, 1]}},
        {"config": {"skip": "layer", "layers": [0, 2, 4]}},
    ],
)
def test_layers_other_than_those_of_the_model_are_refused(saved, values) -> None:
    described = json.loads((saved / "modlab_config.json").read_text())
    (saved / "modlab_config.json").write_text(json.dumps(described | values))
    with pytest.raises(ModlabError, match="layer"):
        modlab.load(saved)


def describe_base(folder: Path, base: str) -> None:
    values = json.loads((folder / "modlab_config.json").read_text())
    (folder / "modlab_config.json").write_text(json.dumps(values | {"base_model": base, "weights": {}}))


def test_routers_that_name_each_other(saved, tmp_path) -> None:
    """And themselves, and each other in a ring with adapters."""
    model, _ = modlab.load(saved)
    folders = [tmp_path / name for name in ("a", "b", "c")]
    for folder in folders:
        modlab.save_routers(model, folder, base_model="somebody/base")
    for folder, base in zip(folders, [*folders[1:], folders[0]], strict=True):
        describe_base(folder, str(base))
    with pytest.raises(ModlabError, match="names itself as its base model by way of"):
        modlab.load(folders[0])
    describe_base(folders[0], str(folders[0] / ".." / "a"))
    with pytest.raises(ModlabError, match="names itself as its base model"):
        modlab.load(folders[0])
    (tmp_path / "adapter").mkdir()
    adapter = {"peft_type": "LORA", "base_model_name_or_path": str(folders[1])}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(adapter))
    describe_base(folders[1], str(tmp_path / "adapter"))
    with pytest.raises(ModlabError, match="names itself|peft"):
        modlab.load(folders[1])


@pytest.fixture
def hostile(tmp_path) -> Path:
    """A model whose files bring code along; it leaves a file where it ran."""
    folder = tmp_path / "hostile"
    dense_llama().save_pretrained(folder)
    modlab.load("demo-dense")[1].save_pretrained(folder)
    (folder / "own.py").write_text(
        f"open({str(tmp_path / 'it ran')!r}, 'w').close()\n"
        "from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast\n"
        "class OwnConfig(LlamaConfig):\n    model_type = 'own'\n"
        "class OwnModel(LlamaForCausalLM):\n    config_class = OwnConfig\n"
        "class OwnTokenizerFast(PreTrainedTokenizerFast):\n    pass\n"
    )
    for name, values in (
        ("config.json", {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}),
        ("tokenizer_config.json", {"AutoTokenizer": [None, "own.OwnTokenizerFast"]}),
    ):
        described = json.loads((folder / name).read_text()) | {"auto_map": values}
        described |= (
            {"model_type": "own"} if name == "config.json" else {"tokenizer_class": "OwnTokenizerFast"}
        )
        (folder / name).write_text(json.dumps(described))
    return folder


def test_code_is_run_for_what_the_user_named_alone(hostile, tmp_path, monkeypatch) -> None:
    """Not for a base that routers or adapters name, and never without being asked for; nobody is asked."""
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("a question was asked"))
    routers, adapter = tmp_path / "routers", tmp_path / "adapter"
    model = modlab.convert(dense_llama(), alternate_layers())
    modlab.save_routers(model, routers, base_model=str(hostile))
    adapter.mkdir()
    named = {"peft_type": "LORA", "base_model_name_or_path": str(hostile)}
    (adapter / "adapter_config.json").write_text(json.dumps(named))
    for source, trust in ((hostile, {}), (routers, {"trust_remote_code": True}), (routers, {})):
        with pytest.raises(ModlabError, match="trust_remote_code|custom code"):
            modlab.load(source, **trust)
        assert not (tmp_path / "it ran").exists()
    with pytest.raises(ModlabError, match="trust_remote_code|custom code|peft"):
        modlab.load(adapter, trust_remote_code=True)
    assert not (tmp_path / "it ran").exists()
    model, tokenizer = modlab.load(hostile, trust_remote_code=True)
    assert (tmp_path / "it ran").exists() and type(model).__name__ == "OwnModel"
    assert type(tokenizer).__name__ == "OwnTokenizerFast"


@torch.no_grad()
def test_reading_while_the_folder_is_overwritten_gives_one_model_or_the_other(saved, tmp_path) -> None:
    """Savers and readers wait for each other; no reader sees weights of one and routers of the other."""
    models = []
    for seed in (0, 1):
        model = modlab.convert(dense_llama(seed), alternate_layers())
        models.append(modlab.set_threshold(scatter_gates(model, seed=seed), 0.3 + seed / 10) or model)
    states = [(model.state_dict(), model.mod.thresholds) for model in models]
    models[0].save_pretrained(saved)
    done = threading.Event()

    def overwrite() -> None:
        while not done.is_set():
            for model in models:
                model.save_pretrained(saved)

    thread = threading.Thread(target=overwrite)
    thread.start()
    try:
        for _ in range(8):
            found, _ = modlab.load(saved)
            state = found.state_dict()
            assert any(
                found.mod.thresholds == thresholds
                and all(torch.equal(state[n], t) for n, t in wanted.items())
                for wanted, thresholds in states
            )
    finally:
        done.set()
        thread.join()


def test_a_reader_that_nobody_waits_for_reads_again(saved, tiny_llama, monkeypatch) -> None:
    """Where there are no locks: a folder that was replaced meanwhile is loaded again, but not for ever."""
    monkeypatch.setattr("modlab.saving.locks.fcntl", None)
    load_once, times = loading._load_once, []

    def overtaken(often: int):
        def read(*arguments):
            result = load_once(*arguments)
            times.append(1)
            if len(times) <= often:
                tiny_llama.save_pretrained(saved)
            return result

        return read

    monkeypatch.setattr(loading, "_load_once", overtaken(2))
    modlab.load(saved)
    assert len(times) == 3
    monkeypatch.setattr(loading, "_load_once", overtaken(100))
    with pytest.raises(ModlabError, match="replaced each time"):
        modlab.load(saved)


def test_files_of_the_folder_that_anybody_damaged(saved) -> None:
    """Also those that transformers reads: whatever it raises, a ModlabError comes out."""
    for name in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        whole = (saved / name).read_bytes()
        for damaged in (b"", b"{", b"[]", b"null", b"\xff\xfe", whole[: len(whole) // 2], b"[" * 50_000):
            (saved / name).write_bytes(damaged)
            with contextlib.suppress(ModlabError):
                modlab.load(saved)
        (saved / name).write_bytes(whole)
    modlab.load(saved)


def test_how_keys_and_values_are_stored_is_said_while_loading(tmp_path: Path) -> None:
    model, _ = modlab.load("demo-kv", kv_cache_dtype="int8")
    assert model.mod.config.kv_cache_dtype == "int8" and set(model.mod.ranges) == set(model.mod.layers)
    modlab.save_routers(model, tmp_path / "routers", base_model="demo-dense")
    for asked, stored in ((None, "int8"), ("auto", "auto"), ("int8", "int8")):
        again, _ = modlab.load(tmp_path / "routers", kv_cache_dtype=asked)
        assert again.mod.config.kv_cache_dtype == stored
    for name, wrong, said in (("demo-dense", "int8", "is dense"), ("demo-kv", "int4", "auto, int8")):
        with pytest.raises(ModlabError, match=said):
            modlab.load(name, kv_cache_dtype=wrong)


def test_a_model_without_its_tokenizer_says_what_to_do(tmp_path) -> None:
    """As `model.save_pretrained` alone leaves a folder."""
    modlab.convert(dense_llama(), alternate_layers()).save_pretrained(tmp_path / "alone")
    with pytest.raises(ModlabError, match=r"tokenizer\.save_pretrained\('.*alone'\)"):
        modlab.load(tmp_path / "alone")
    modlab.load("demo-dense")[1].save_pretrained(tmp_path / "alone")
    model, _ = modlab.load(tmp_path / "alone")
    assert model.mod.layers
