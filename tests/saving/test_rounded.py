"""Keys and values in fewer bits in folders: ranges are saved with the routers, and taken over as they are."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import modlab
from modlab.cache.dtypes import RANGES
from modlab.conversion import ranges
from modlab.errors import ModlabError
from modlab.saving.files import CONFIG_FILE, ROUTER_FILE
from tests.helpers.models import alternate_layers, dense_llama, leaving_llama, scatter_gates

IDS = torch.randint(3, 500, (2, 40), generator=torch.Generator().manual_seed(0))


def converted(model: Any, dtype: Any = "int8") -> Any:
    config = alternate_layers(skip="kv", keep_recent=4, kv_cache_dtype=dtype)
    return scatter_gates(modlab.convert(model, config), 4.0).eval()


def odd(model: Any) -> Any:
    """Ranges that no measuring would give: what is loaded has to be what was saved."""
    for found in model.mod.ranges.values():
        found.key_shift += 0.25
        found.value_step *= 2
    return model


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    found: torch.Tensor = model(IDS).logits
    return found


def same_ranges(one: Any, other: Any) -> bool:
    pairs = zip(one.mod.ranges.items(), other.mod.ranges.items(), strict=True)
    return all(
        i == j and all(map(torch.equal, a.buffers(), b.buffers())) for (i, a), (j, b) in pairs
    ) and bool(one.mod.ranges)


@pytest.mark.parametrize("alone", [False, True], ids=["whole", "routers alone"])
@pytest.mark.parametrize("dtype", RANGES)
def test_a_folder_is_loaded_with_the_ranges_it_was_saved_with(
    base, tmp_path, alone: bool, dtype: str
) -> None:
    model = odd(converted(modlab.load(base)[0], dtype))
    if alone:
        modlab.save_routers(model, tmp_path / "saved", base_model=str(base))
    else:
        model.save_pretrained(tmp_path / "saved")
        modlab.load(base)[1].save_pretrained(tmp_path / "saved")
    before = torch.get_rng_state()
    loaded, _ = modlab.load(tmp_path / "saved")
    assert torch.equal(before, torch.get_rng_state())
    assert same_ranges(model, loaded) and torch.equal(logits(model), logits(loaded))
    assert loaded.mod.config == model.mod.config and loaded.mod.config.kv_cache_dtype == dtype
    held = load_file(tmp_path / "saved" / ROUTER_FILE)
    assert sum("mod_int8_range" in name for name in held) == 3 * 3
    halves, _ = modlab.load(tmp_path / "saved", dtype=torch.bfloat16)
    assert same_ranges(model, halves)
    modlab.revert(loaded)
    dense = modlab.load(base)[0]
    assert (
        torch.equal(logits(loaded), logits(dense)) and loaded.state_dict().keys() == dense.state_dict().keys()
    )


def test_a_folder_is_loaded_in_other_bits_with_the_ranges_it_has(base, tmp_path) -> None:
    model = odd(converted(modlab.load(base)[0]))
    modlab.save_routers(model, tmp_path / "saved", base_model=str(base))
    loaded, _ = modlab.load(tmp_path / "saved", kv_cache_dtype="k6v4")
    assert loaded.mod.config.kv_cache_dtype == "k6v4"
    assert same_ranges(model, loaded) and not torch.equal(logits(model), logits(loaded))
    modlab.set_kv_cache_dtype(loaded, "int8")
    assert torch.equal(logits(model), logits(loaded))


def test_loading_measures_no_whole_text(base, tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    modlab.save_routers(converted(modlab.load(base)[0]), tmp_path / "saved", base_model=str(base))
    lengths: list[int] = []
    real = ranges._measured
    monkeypatch.setattr(
        ranges, "_measured", lambda model, dtype, tokens: lengths.append(tokens) or real(model, dtype, tokens)
    )
    modlab.load(tmp_path / "saved")
    assert lengths == [ranges.FEW_TOKENS]


def test_above_the_point_of_leaving(tmp_path) -> None:
    model = leaving_llama()
    modlab.set_kv_cache_dtype(model, "int8")
    odd(model).save_pretrained(tmp_path / "saved")
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert same_ranges(model, loaded) and torch.equal(logits(model), logits(loaded))


def test_a_folder_from_before_loads_in_the_models_own_type(base, tmp_path) -> None:
    modlab.save_routers(converted(modlab.load(base)[0], "auto"), tmp_path / "saved", base_model=str(base))
    described = json.loads((tmp_path / "saved" / CONFIG_FILE).read_text())
    del described["config"]["kv_cache_dtype"]
    (tmp_path / "saved" / CONFIG_FILE).write_text(json.dumps(described))
    loaded, _ = modlab.load(tmp_path / "saved")
    assert loaded.mod.config.kv_cache_dtype == "auto" and not loaded.mod.ranges


def test_ranges_that_are_missing_are_found_out(base, tmp_path) -> None:
    modlab.save_routers(converted(modlab.load(base)[0]), tmp_path / "saved", base_model=str(base))
    file, described = tmp_path / "saved" / ROUTER_FILE, tmp_path / "saved" / CONFIG_FILE
    save_file({n: t for n, t in load_file(file).items() if "int8" not in n}, file)
    said = json.loads(described.read_text()) | {"routers": None}
    described.write_text(json.dumps(said))
    with pytest.raises(ModlabError, match="mod_int8_range"):
        modlab.load(tmp_path / "saved")


@pytest.mark.parametrize("there", ["auto", "int8"])
@pytest.mark.parametrize("here", ["auto", "int8"])
def test_a_start_takes_routers_and_leaves_ranges(tmp_path, here: Any, there: Any) -> None:
    source = converted(dense_llama(), there)
    odd(source).save_pretrained(tmp_path / "saved")
    model = modlab.convert(dense_llama(), alternate_layers(skip="kv", keep_recent=4, kv_cache_dtype=here))
    before = {i: found.key_shift.clone() for i, found in model.mod.ranges.items()}
    taken = modlab.start_from(model, tmp_path / "saved")
    assert taken and not any("int8" in name for name in taken)
    assert model.mod.config.kv_cache_dtype == here
    assert all(torch.equal(model.mod.ranges[i].key_shift, shift) for i, shift in before.items())


def test_adapters_travel_with_ranges(base, tmp_path) -> None:
    peft = pytest.importorskip("peft")
    from modlab.integrations.peft import load_adapter, lora_config, save_adapter

    inner = odd(converted(modlab.load(base)[0]))
    model = peft.get_peft_model(inner, lora_config(inner, r=2)).eval()
    save_adapter(model, tmp_path / "adapter")
    loaded, _ = load_adapter(tmp_path / "adapter", base=str(base))
    assert same_ranges(model, loaded) and torch.equal(logits(model), logits(loaded))
