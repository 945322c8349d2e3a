"""KV saving where fewer bits save a part of it: what routing is asked for, and what is said of it."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import modlab
from modlab.errors import ModlabError
from modlab.routing.kv_saving import Rounding, known_of, rounding, rounding_of, threshold_for
from modlab.routing.trained import Trained
from modlab.saving.description import read_description
from modlab.saving.files import CONFIG_FILE
from tests.helpers.models import dense_llama, routed_llama, scatter_gates

KNOWN = Trained(
    savings={2.0: 0.1, 3.0: 0.2, 8.0: 0.9, 16.0: 0.95}, recent={2.0: 64, 3.0: 48, 8.0: 16, 16.0: 8},
    seq_len=8192, reached=8.0,
)  # fmt: skip
FACTOR = 2 * 16 * 2 * 2 / (2 * 16 * 2 + 2 * 2 * 2)
"""Of the tiny model in bf16: two heads of 16, K and V; a step of two bytes for each of them."""


def in_int8(
    layers: str = "all",
    known: Trained | None = KNOWN,
    dtype: torch.dtype = torch.bfloat16,
    kv_cache_dtype: Any = "int8",
):
    config = modlab.MoDConfig(layers=layers, kv_cache_dtype=kv_cache_dtype)
    model = modlab.convert(dense_llama().to(dtype), config)
    model.mod.trained = known
    return scatter_gates(model)


def test_routing_is_asked_for_what_eight_bits_leave() -> None:
    model = in_int8()
    assert rounding_of(model).smaller == pytest.approx(FACTOR)
    for saving in (2.0, 3.0, 4.0, 8.0):
        assert modlab.set_kv_saving(model, saving * FACTOR) == pytest.approx(KNOWN.threshold_for(saving))
        assert model.mod.recent == KNOWN.recent_for(saving)
    modlab.set_kv_cache_dtype(model, "auto")
    assert modlab.set_kv_saving(model, 4) == pytest.approx(KNOWN.threshold_for(4.0))
    assert model.mod.trained is KNOWN, "what is known stays that of routing alone"


def test_of_six_and_four_bits_routing_is_asked_for_less() -> None:
    model = in_int8(kv_cache_dtype="k6v4")
    factor = 2 * 16 * 2 * 2 / (2 * (12 + 8) + 2 * 2 * 2)
    assert rounding_of(model).smaller == pytest.approx(factor)
    assert modlab.set_kv_saving(model, 3 * factor) == pytest.approx(KNOWN.threshold_for(3.0))
    modlab.set_kv_cache_dtype(model, "int8")
    assert modlab.set_kv_saving(model, 3 * FACTOR) == pytest.approx(KNOWN.threshold_for(3.0))


@pytest.mark.parametrize(("H", "left"), [(64, 16 / 3.05), (128, 16 / 3.12)])
def test_of_sixteen_times_less_routing_has_a_third_to_do(H: int, left: float) -> None:
    assert rounding("k6v4", (2, H, H), 2).routed(16) == pytest.approx(left, rel=0.002)
    assert rounding("auto", (2, H, H), 2).routed(16) == 16


def test_of_what_is_stored_in_single_precision_eight_bits_save_twice_as_much() -> None:
    assert rounding_of(in_int8(dtype=torch.float32)).smaller == pytest.approx(2 * FACTOR)


def test_layers_that_are_not_routed_stay_as_they_are() -> None:
    """Half of the layers: three dense ones and three halves of `smaller` times less."""
    found = rounding_of(in_int8("alternate"))
    assert found.elsewhere == 0.5
    assert found.total(1.0) == pytest.approx(6 / (3 + 3 / FACTOR))
    assert found.total(1.5) == pytest.approx(6 / (3 + 3 * (1 / 3) / FACTOR)), "a third of their keys stay"
    for saving in (1.0, 1.3, 1.7, 1.99):
        assert found.routed(found.total(saving)) == pytest.approx(saving)
    with pytest.raises(ModlabError, match="less than 2x can be saved"):
        found.routed(2.0)
    assert Rounding().total(7.0) == Rounding().routed(7.0) == 7.0


@pytest.mark.parametrize("saving", [1, 1.5, FACTOR])
def test_up_to_what_eight_bits_save_alone_everything_is_kept(saving: float) -> None:
    model = in_int8()
    modlab.set_keep_recent(model, 5)
    assert modlab.set_kv_saving(model, saving) == 0 and set(model.mod.thresholds.values()) == {0.0}
    assert model.mod.recent == 5, "nothing is dropped, so none has to be held"


def test_below_the_smallest_saving_known_the_threshold_is_estimated() -> None:
    model = in_int8()
    asked = [FACTOR * saving for saving in (1.001, 1.2, 1.6, 1.999)]
    found = [threshold_for(model, saving) for saving in asked]
    thresholds = [p for p, _ in found]
    assert thresholds == sorted(thresholds) and 0 < thresholds[0] < 1e-4
    assert thresholds[-1] == pytest.approx(0.1, rel=0.01)
    assert {recent for _, recent in found} == {64}
    with pytest.raises(ModlabError, match="know thresholds for 2x"):
        modlab.set_kv_cache_dtype(model, "auto")
        modlab.set_kv_saving(model, 1.9)


@pytest.mark.parametrize("name", ["coder-0.5b", "coder-1.5b", "smollm2"])
def test_the_estimate_holds_between_savings_of_routers_that_ship(name: str) -> None:
    """As far as that can be seen: from 3x and 4x, 2x is found."""
    folder = Path(modlab.__file__).parent / "routers" / f"{name}-kv"
    known = read_description(folder / CONFIG_FILE, name).trained
    assert known is not None
    without = Trained(savings={saving: p for saving, p in known.savings.items() if saving > 2})
    found, right = without.threshold_below(2.0), known.savings[2.0]

    def logit(p: float) -> float:
        return math.log(p / (1 - p))

    assert abs(logit(found) - logit(right)) < 0.7
    assert found < known.savings[3.0]


def test_a_saving_that_nothing_gives_is_refused() -> None:
    model = in_int8()
    before = dict(model.mod.thresholds)
    for saving in (0.5, 17 * FACTOR, -1, "8"):
        with pytest.raises(ModlabError):
            modlab.set_kv_saving(model, saving)
    with pytest.raises(ModlabError, match=r"know thresholds for 3\.556x to 28\.44x"):
        modlab.set_kv_saving(model, 100)
    assert model.mod.thresholds == before
    with pytest.raises(ModlabError, match="know no thresholds by KV saving"):
        modlab.set_kv_saving(in_int8(known=None), 2)


def test_what_lies_beyond_the_training_is_told_by_both_savings() -> None:
    model = in_int8()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        modlab.set_kv_saving(model, 8 * FACTOR)
    with pytest.warns(UserWarning, match=r"^kv_saving=20: .* beyond 0\.9, that of 14\.22x"):
        modlab.set_kv_saving(model, 20)
    known = known_of(model)
    assert known.trained_to == pytest.approx(8 * FACTOR) and known.largest == 0.9
    plain = routed_llama(skip="kv")
    plain.mod.trained = KNOWN
    assert known_of(plain) is KNOWN


def test_what_is_saved_is_what_routing_saves_alone(tmp_path: Path) -> None:
    model = in_int8()
    model.save_pretrained(tmp_path)
    assert read_description(tmp_path / CONFIG_FILE, "it").trained == KNOWN
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "3.556x at p = 0.1" in card, "as set_kv_saving takes it there"
