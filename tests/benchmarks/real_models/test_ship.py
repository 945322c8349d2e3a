"""Routers that ship: the study's gates, bit for bit, under the product's names, or a run's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import modlab
from benchmarks.real_models import pack
from benchmarks.real_models.gates import gate_values
from benchmarks.real_models.ship import renamed, ship_run, trained, with_measured
from modlab.errors import ModlabError
from modlab.routing.router import HiddenRouter
from modlab.routing.trained import Trained
from modlab.saving.files import ROUTER_FILE
from modlab.saving.routers import read_routers
from tests.helpers.models import dense_llama

GATES = Path(pack.__file__).parent / "gates"


@pytest.mark.parametrize("name", ["smollm2", "coder-0.5b"])
def test_gates_of_the_study_say_the_same_as_routers(name: str, tmp_path: Path) -> None:
    """Under the product's names, and unpacked by it, they decide alike of the same states."""
    theirs = pack.load(GATES / f"{name}.safetensors")
    shape = theirs.shape
    save_file(renamed(load_file(GATES / f"{name}.safetensors"), shape.D), tmp_path / ROUTER_FILE)
    routers = read_routers(tmp_path / ROUTER_FILE, name)
    x = torch.randn(2, 50, shape.D, generator=torch.Generator().manual_seed(0)) * 3
    for layer in (0, shape.L // 2, shape.L - 1):
        mine = HiddenRouter(shape.D, 0.9, 16, gates=shape.G)
        prefix = f"model.layers.{layer}.mod_router."
        mine.load_state_dict(
            {key.removeprefix(prefix): value for key, value in routers.items() if key.startswith(prefix)}
        )
        with torch.no_grad():
            torch.testing.assert_close(mine(x), gate_values(x, theirs.of(layer)).transpose(1, 2))


@pytest.mark.parametrize("name", ["smollm2", "coder-0.5b"])
def test_thresholds_of_a_gates_card_are_logits(name: str) -> None:
    card = json.loads((GATES / f"{name}.json").read_text())
    savings = trained(card).savings
    assert savings.keys() == {float(ratio) for ratio in card["thresholds"]}
    for ratio, z in card["thresholds"].items():
        assert torch.logit(torch.tensor(savings[float(ratio)], dtype=torch.float64)).item() == pytest.approx(
            z
        )


@pytest.mark.parametrize("name", ["smollm2", "coder-0.5b"])
def test_gates_are_packed_as_those_that_are_committed(name: str, tmp_path: Path) -> None:
    """Packed once more they have the same bits, and scales in the same line."""
    bits = json.loads((GATES / f"{name}.json").read_text())["bits"]["hidden"]
    pack.save(pack.load(GATES / f"{name}.safetensors"), tmp_path / "again.safetensors", {}, bits)
    committed, again = load_file(GATES / f"{name}.safetensors"), load_file(tmp_path / "again.safetensors")
    assert committed.keys() == again.keys()
    for key, tensor in committed.items():
        torch.testing.assert_close(again[key].view(tensor.shape), tensor, rtol=1e-3, atol=0, msg=key)
        assert again[key].dtype == tensor.dtype


def test_routers_of_a_run_are_packed(tmp_path: Path, word_tokenizer: Any) -> None:
    """Loaded again they have the run's thresholds, the card's words, and weights to half a step of 5 bits."""
    base, run, out = (tmp_path / name for name in ("base", "run", "packed"))
    model: Any = dense_llama()
    model.save_pretrained(base)
    word_tokenizer.save_pretrained(base)
    modlab.convert(model, modlab.MoDConfig(layers="all", gates="kv_head", router_hidden=16))
    modlab.save_routers(model, run, base_model=str(base))
    words = Trained(data="a text", tokens=1)
    with pytest.raises(ModlabError, match="nothing is known"):
        ship_run(run, base, "somebody/model", out, words)
    torch.nn.init.normal_(model.model.layers[1].mod_router.weight)
    model.mod.trained = Trained({2.0: 0.1, 4.0: 0.5}, seq_len=64, recent={2.0: 16, 4.0: 8}, tokens=1000)
    modlab.save_routers(model, run, base_model=str(base))
    ship_run(run, base, "somebody/model", out, words)
    assert "Their data, 1,000 tokens: a text" in (out / "README.md").read_text()
    again: Any = modlab.load(out, base=base)[0]
    assert again.mod.trained.savings == {2.0: 0.1, 4.0: 0.5} and again.mod.thresholds[0] == pytest.approx(0.1)
    assert again.mod.trained.recent == {2.0: 16, 4.0: 8} and again.mod.config.keep_recent == 16
    for name, value in model.named_parameters():
        if ".mod_router." in name:
            torch.testing.assert_close(
                again.get_parameter(name), value, rtol=1e-3, atol=value.abs().max().item() / 29
            )
    assert (out / ROUTER_FILE).stat().st_size < (run / ROUTER_FILE).stat().st_size
    ship_run(run, base, "somebody/model", out, words, before=500)
    assert "Their data, 1,500 tokens: a text" in (out / "README.md").read_text()


def test_measured_thresholds_take_the_place_of_a_runs(tmp_path: Path) -> None:
    """With their recent tokens, in order of the saving whatever the order of the files."""
    run = Trained({2.0: 0.1, 4.0: 0.5}, seq_len=64, recent={2.0: 8, 4.0: 4}, tokens=1000)
    with pytest.raises(ModlabError, match="has no threshold@SAVING.json"):
        with_measured(run, tmp_path)
    pieces = (("2", 0.2, 16), ("4", 0.6, 8), ("16", 0.9, 2), ("4_recent_2", 0.5, 2), ("3_recent_9", 0.4, 9))
    for name, p, recent in pieces:
        asked = float(name.split("_")[0])
        piece = {"asked": asked, "threshold": p, "recent": recent, "beyond_training": asked == 16}
        (tmp_path / f"threshold@{name}.json").write_text(json.dumps(piece))
    (tmp_path / "threshold@64.failed.json").write_text('{"error": "", "at": 1}')
    found = with_measured(run, tmp_path)
    assert list(found.savings.items()) == [(2.0, 0.2), (3.0, 0.4), (4.0, 0.6), (16.0, 0.9)]
    assert found.recent == {2.0: 16, 3.0: 9, 4.0: 8, 16.0: 2} and found.tokens == 1000
    assert found.reached == found.trained_to == 4.0, "16x lies beyond"
    (tmp_path / "origin.json").write_text('{"kv_cache_dtype": "int8"}')
    with pytest.raises(ModlabError, match="savings that are not routing's alone"):
        with_measured(run, tmp_path)
    (tmp_path / "origin.json").write_text('{"kv_cache_dtype": "auto"}')
    (tmp_path / "threshold@16.json").unlink()
    assert with_measured(run, tmp_path).reached == 0.0, "the training came to all of them"
    for file in tmp_path.glob("threshold@*[0-9].json"):
        piece = json.loads(file.read_text()) | {"beyond_training": True}
        file.write_text(json.dumps(piece))
    with pytest.raises(ModlabError, match="beyond the training"):
        with_measured(run, tmp_path)


def measured(folder: Path, *pieces: tuple[str, int]) -> Path:
    """Thresholds of 4x, each by its name with its recent tokens."""
    folder.mkdir()
    for name, recent in pieces:
        piece = {"asked": 4.0, "threshold": recent / 1000, "recent": recent, "beyond_training": False}
        (folder / f"threshold@{name}.json").write_text(json.dumps(piece))
    return folder


def test_of_several_numbers_of_recent_tokens_the_routers_own_is_taken(tmp_path: Path) -> None:
    """Not the fewest, which come first by name."""
    run = Trained({2.0: 0.1, 8.0: 0.5}, recent={2.0: 1024, 8.0: 256})
    several = measured(tmp_path / "several", ("4_recent_256", 256), ("4_recent_512", 512))
    assert with_measured(run, several).recent == {4.0: 512}
    assert with_measured(run, several).savings == {4.0: 0.512}
    moved = measured(tmp_path / "moved", ("4", 683), ("4_recent_512", 512))
    assert with_measured(run, moved).recent == {4.0: 512}, "the name says what was the routers' own then"
    assert with_measured(Trained({2.0: 0.1, 8.0: 0.5}), moved).recent == {4.0: 683}, "they know none"
    alone = measured(tmp_path / "alone", ("4_recent_300", 300))
    assert with_measured(run, alone).recent == {4.0: 300}
    none = measured(tmp_path / "none", ("4_recent_300", 300), ("4_recent_400", 400))
    with pytest.raises(ModlabError, match="4x was measured with 300, 400 recent tokens, .* know 512"):
        with_measured(run, none)
    with pytest.raises(ModlabError, match="the routers know none for it"):
        with_measured(Trained({2.0: 0.1, 3.0: 0.2}, recent={2.0: 9, 3.0: 8}), none)
