"""Routers that ship with modlab: small, and only for the base that they were trained on."""

from __future__ import annotations

import pytest
import torch

import modlab
from modlab.errors import ModlabError
from modlab.saving.base_check import check_base, describe_base, read_base
from modlab.saving.bits import packed, unpack_routers, unpacked
from modlab.saving.card import plain
from modlab.saving.demos import ROUTER_FOLDER, ROUTERS, folder_named
from modlab.saving.description import read_description
from modlab.saving.files import CONFIG_FILE
from tests.helpers.models import dense_llama, scatter_gates

MEASURED_BEST = {"coder-1.5b-kv": {3.0: 512}}
"""Recent tokens that do better than those that go with the saving; tests/scripts holds them to records."""


def description(name: str):
    return read_description(ROUTER_FOLDER / name / CONFIG_FILE, name)


@pytest.mark.parametrize("name", ROUTERS)
def test_they_are_small_and_say_what_they_were_trained_on(name) -> None:
    folder = folder_named(name)
    assert sum(file.stat().st_size for file in folder.iterdir()) < (600_000 if "1.5b" in name else 310_000)
    said = description(name)
    assert said.trained is not None and said.trained.range == (2.0, 16.0)
    assert "4-bit" in said.trained.weights and said.trained.tokens > 10**6
    (p,) = set(said.thresholds.values())
    assert p == pytest.approx(said.trained.savings[2.0], rel=1e-12), "loaded at the safe saving"
    assert said.config.keep_recent == said.trained.recent_for(2.0), "and with its recent tokens"
    card = (folder / "README.md").read_text()
    assert plain(said.trained.weights) in card and plain(said.trained.results) in card


@pytest.mark.parametrize("name", ROUTERS)
def test_they_keep_more_recent_tokens_at_a_smaller_saving(name) -> None:
    said = description(name)
    assert said.trained is not None
    assert {2.0, 4.0, 8.0, 16.0} <= said.trained.recent.keys()
    by_rule = {saving: round(2048 / saving) for saving in said.trained.savings}
    assert said.trained.recent == by_rule | MEASURED_BEST.get(name, {})
    card = (folder_named(name) / "README.md").read_text()
    assert f"2x at p = {said.trained.savings[2.0]:.4g} with the latest 1,024, " in card


@pytest.mark.parametrize("bits", [2, 5, 8])
def test_bits_come_back_within_half_a_step_and_in_their_shape(bits) -> None:
    weights = torch.randn(3, 128, generator=torch.Generator().manual_seed(0))
    planes, scales = packed(weights, bits)
    assert planes.numel() == weights.numel() * bits / 8 and scales.shape == (3, 2)
    missed = (unpacked(planes, scales) - weights).abs().unflatten(-1, (-1, 64))
    assert (missed <= 0.51 * scales.float()[..., None]).all()


@pytest.mark.parametrize("break_it", ["no scales", "other scales", "floats", "one plane"])
def test_bits_without_their_scales_are_refused(break_it) -> None:
    planes, scales = packed(torch.randn(3, 128), 5)
    stored = {"a.planes": planes, "a.scales": scales}
    if break_it == "no scales":
        del stored["a.scales"]
    elif break_it == "other scales":
        stored["a.scales"] = scales[:2]
    elif break_it == "floats":
        stored["a.planes"] = planes.float()
    else:
        stored["a.planes"] = planes[:1]
    with pytest.raises(ModlabError, match="do not belong together"):
        unpack_routers(stored)


@pytest.fixture
def routers(make_llama, tmp_path):
    """Routers alone on a hub id that nobody can reach, and their base as a folder."""
    _, tokenizer = modlab.load("demo-dense")
    make_llama().save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    model = modlab.convert(modlab.load(tmp_path / "base")[0], modlab.MoDConfig(layers="all", keep_recent=4))
    scatter_gates(model)
    modlab.save_routers(model, tmp_path / "routers", base_model="somebody/base")
    return model.eval(), tmp_path / "routers", tmp_path / "base"


@torch.no_grad()
def test_a_base_that_is_given_is_used(routers, tmp_path) -> None:
    model, folder, base = routers
    ids = torch.randint(3, 500, (1, 30))
    loaded, _ = modlab.load(folder, base=base)
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    modlab.save_routers(loaded, tmp_path / "again")
    assert modlab.load(tmp_path / "again")[0].mod_base_model == str(base)
    assert modlab.load(folder, base=base, dtype=torch.bfloat16)[0].dtype == torch.bfloat16


def test_another_base_is_refused(routers, make_llama, tmp_path) -> None:
    _, folder, base = routers
    modlab.load(base)[1].save_pretrained(tmp_path / "other")
    make_llama(seed=5).save_pretrained(tmp_path / "other")
    with pytest.raises(ModlabError, match="trained on other weights than this base's"):
        modlab.load(folder, base=tmp_path / "other")
    make_llama(num_hidden_layers=4).save_pretrained(tmp_path / "other")
    with pytest.raises(ModlabError, match="num_hidden_layers=6, and this base has 4"):
        modlab.load(folder, base=tmp_path / "other")
    with pytest.raises(ModlabError, match="is for routers alone"):
        modlab.load(base, base=tmp_path / "other")


def test_rounding_to_four_bits_is_no_other_base() -> None:
    model = dense_llama()
    said = describe_base(model)
    weight = model.get_input_embeddings().weight.data
    groups = weight.unflatten(-1, (-1, 32))
    step = groups.abs().amax(-1, keepdim=True).clamp(min=1e-9) / 7
    weight.copy_(((groups / step).round() * step).flatten(-2))
    check_base(model, said, "routers")
    check_base(model.to(torch.float16), said, "routers")
    model.resize_token_embeddings(600)  # padded for a tensor core
    check_base(model, said, "routers")
    weight = model.get_input_embeddings().weight.data
    weight.copy_(weight.flip(0))
    with pytest.raises(ModlabError, match="other weights"):
        check_base(model, said, "routers")


@pytest.mark.parametrize(
    "wrong",
    [[], {"surprise": 1}, {"model_type": 3}, {"model_type": "llama", "hidden_size": -1},
     {"model_type": "llama", "embedding": [1.0]}, {"model_type": "llama", "embedding": [float("nan")] * 256}],
)  # fmt: skip
def test_a_damaged_description_of_the_base_is_refused(wrong) -> None:
    with pytest.raises(ModlabError, match="base"):
        read_base(wrong)
