"""The routers' file holds all that conversion adds, finite floats alone, and belongs to its description."""

from __future__ import annotations

import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import modlab
from modlab.errors import ModlabError
from modlab.saving import fingerprint
from modlab.saving.routers import added_in, read_routers
from tests.helpers.models import routed_llama

ROUTERS = "modlab_router.safetensors"


def change(folder, make, hashed: bool) -> None:
    """Writes other routers; without `hashed` the description is of the first format, which had no hashes."""
    routers = load_file(folder / ROUTERS)
    save_file(make(routers), folder / ROUTERS)
    if not hashed:
        values = json.loads((folder / "modlab_config.json").read_text())
        first = {name: values[name] for name in ("config", "thresholds", "base_model", "base_trained")}
        (folder / "modlab_config.json").write_text(json.dumps(first))


def every(kind):
    return lambda routers: {name: kind(tensor) for name, tensor in routers.items()}


WRONG = {
    "not a number": every(lambda t: t * torch.nan),
    "infinite": every(lambda t: t + torch.inf),
    "int64": every(lambda t: t.long()),
    "bool": every(lambda t: t > 0),
    "one missing": lambda routers: dict([*routers.items()][1:]),
    "one too many": lambda routers: routers | {"model.layers.0.mod_router.weight": torch.zeros(64)},
    "foreign": lambda routers: routers | {"lm_head.weight": torch.zeros(64)},
    "another shape": every(lambda t: t[:1].expand(3).clone()),
    "none": lambda routers: {},
}


@pytest.mark.parametrize("hashed", [True, False])
@pytest.mark.parametrize("how", [*WRONG])
def test_wrong_routers_are_refused(saved, how, hashed) -> None:
    change(saved, WRONG[how], hashed)
    with pytest.raises(ModlabError, match=ROUTERS):
        modlab.load(saved)


@pytest.mark.parametrize("hashed", [True, False])
def test_a_file_larger_than_the_routers_can_be_is_refused_unread(saved, monkeypatch, hashed) -> None:
    """As one of zeros that takes no place on the disk."""
    header = json.dumps({"x": {"dtype": "F32", "shape": [2**34], "data_offsets": [0, 2**36]}}).encode()
    change(saved, every(lambda t: t), hashed)
    with (saved / ROUTERS).open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(2**36 + 8 + len(header))

    def read(*_: object) -> None:
        raise AssertionError("it was read")

    monkeypatch.setattr("modlab.saving.routers.load_file", read)
    monkeypatch.setattr("modlab.saving.routers.sha256_of", read)
    with pytest.raises(ModlabError, match="at most"):
        modlab.load(saved)


def test_routers_of_another_save_are_refused(saved, tmp_path) -> None:
    """Alike in all but their values: only the hash tells."""
    change(saved, every(lambda t: t + 1), hashed=True)
    with pytest.raises(ModlabError, match="mixes two savings"):
        modlab.load(saved)
    change(saved, every(lambda t: t), hashed=False)
    modlab.load(saved)


def test_routers_that_are_not_finite_are_not_saved(tiny_llama, tmp_path) -> None:
    """They could not be loaded."""
    with torch.no_grad():
        tiny_llama.model.layers[1].mod_router.weight[0] = torch.nan
    for save in (tiny_llama.save_pretrained, lambda at: modlab.save_routers(tiny_llama, at, "a/b")):
        with pytest.raises(ModlabError, match="diverged"):
            save(tmp_path / "x")
    assert not list(tmp_path.iterdir())


def test_weights_of_another_save_are_refused(saved) -> None:
    weights = load_file(saved / "model.safetensors")
    weights["model.norm.weight"] += 1e-3
    save_file(weights, saved / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModlabError, match="mixes two savings"):
        modlab.load(saved)
    values = json.loads((saved / "modlab_config.json").read_text())
    (saved / "modlab_config.json").write_text(json.dumps(values | {"weights": {}}))  # as the error advises
    assert torch.equal(modlab.load(saved)[0].model.norm.weight, weights["model.norm.weight"])


def test_large_weights_are_told_apart_by_samples(tmp_path, monkeypatch) -> None:
    """As training changes them: everywhere. Small ones are read as a whole: one bit is enough."""
    file, data = tmp_path / "model.safetensors", os.urandom(3_000_000)

    def of(content: bytes) -> str:
        file.write_bytes(content)
        return fingerprint.fingerprint(file)

    one_bit = data[:1_500_000] + bytes([data[1_500_000] ^ 1]) + data[1_500_001:]
    assert len({of(data), of(one_bit), of(data)}) == 2
    monkeypatch.setattr(fingerprint, "WHOLE", 2**20)
    trained = bytes(byte ^ 1 for byte in data)
    assert len({of(data), of(trained), of(data + b"\0"), of(data[:-1]), of(data)}) == 4


class WithWeights(nn.Module):
    """Stands for what a skip may add next to a router."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Linear(64, 8)
        self.register_buffer("scale", torch.full((3,), 0.5))


def test_all_that_conversion_adds_is_saved_and_loaded(tmp_path, monkeypatch) -> None:
    """A skip with weights of its own, not routers alone."""
    from modlab.saving import restore

    convert = restore.convert

    def convert_with_more(model, config):
        converted = convert(model, config)
        for layer in converted.mod.layers:
            converted.model.layers[layer].mod_projection = WithWeights()
        return converted

    model = routed_llama()
    for layer in model.mod.layers:
        model.model.layers[layer].mod_projection = WithWeights()
    with torch.no_grad():
        model.model.layers[3].mod_projection.scale += 1
    model.save_pretrained(tmp_path / "m")
    stored = load_file(tmp_path / "m" / ROUTERS)
    assert stored.keys() == {name for name in model.state_dict() if ".mod_" in name}
    assert sum("mod_projection" in name for name in stored) == 9
    assert not any("mod_" in name for name in load_file(tmp_path / "m" / "model.safetensors"))

    monkeypatch.setattr(restore, "convert", convert_with_more)
    from transformers import AutoModelForCausalLM

    again = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name


def test_names_that_peft_gave_are_taken_back() -> None:
    state = {
        "model.layers.1.mod_router.weight": torch.zeros(2),
        "model.layers.1.mod_projection.base_layer.weight": torch.ones(2),
        "model.layers.1.mod_projection.lora_A.default.weight": torch.ones(2),
        "model.layers.3.mod_router.original_module.weight": torch.zeros(2),
        "model.layers.3.mod_router.modules_to_save.default.weight": torch.ones(2),
        "model.norm.weight": torch.ones(2),
    }
    assert added_in(state).keys() == {
        "model.layers.1.mod_router.weight",
        "model.layers.1.mod_projection.weight",
    }


def test_what_is_no_file_of_routers(tmp_path) -> None:
    for content in (b"", b"junk", b"\xff" * 100, b"\2\0\0\0\0\0\0\0[]", b'\x08\0\0\0\0\0\0\0{"a":{}}'):
        (tmp_path / ROUTERS).write_bytes(content)
        with pytest.raises(ModlabError, match="corrupt"):
            read_routers(tmp_path / ROUTERS, "folder")
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "folder", tmp_path / "absent"):
        with pytest.raises(ModlabError, match="corrupt"):
            read_routers(path, "folder")
