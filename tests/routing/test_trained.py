"""What is known of routers: thresholds by KV saving, set and saved, and what lies beyond them."""

from __future__ import annotations

import json
import math
import warnings
from pathlib import Path

import pytest

import modlab
from modlab.errors import ModlabError
from modlab.routing.trained import Trained
from modlab.saving.description import read_description
from modlab.saving.files import CONFIG_FILE
from tests.helpers.models import routed_llama

KNOWN = Trained(savings={2.0: 0.1, 8.0: 0.9}, seq_len=8192, tokens=10, weights="some", data="texts")


def test_a_saving_between_two_known_ones_lies_between_their_logits() -> None:
    assert KNOWN.threshold_for(2) == pytest.approx(0.1)
    assert KNOWN.threshold_for(8) == pytest.approx(0.9)
    assert KNOWN.threshold_for(4) == pytest.approx(0.5)  # half-way, by the logarithm
    assert Trained(savings={3.0: 0.2}).threshold_for(3) == 0.2


@pytest.mark.parametrize("saving", [1.9, 8.1, 0, -1])
def test_a_saving_outside_the_range_is_refused_and_nothing_changes(saving) -> None:
    model = routed_llama(skip="kv")
    model.mod.trained = KNOWN
    before = dict(model.mod.thresholds)
    with pytest.raises(ModlabError, match="know thresholds for 2x to 8x"):
        modlab.set_kv_saving(model, saving)
    assert model.mod.thresholds == before
    assert modlab.set_kv_saving(model, 4) == pytest.approx(0.5)
    assert set(model.mod.thresholds.values()) == {KNOWN.threshold_for(4)}


def test_recent_tokens_go_with_a_saving() -> None:
    known = Trained(savings={2.0: 0.1, 8.0: 0.9}, recent={2.0: 1024, 8.0: 256})
    assert [known.recent_for(saving) for saving in (2, 4, 8)] == [1024, 512, 256]
    assert KNOWN.recent_for(4) is None
    assert Trained.from_dict(known.to_dict()) == known
    model = routed_llama(skip="kv")
    model.mod.trained = known
    assert modlab.set_kv_saving(model, 4) == pytest.approx(0.5) and model.mod.recent == 512
    model.mod.trained = KNOWN
    modlab.set_kv_saving(model, 8)
    assert model.mod.recent == 512


def test_routers_that_know_nothing_say_what_to_do() -> None:
    with pytest.raises(ModlabError, match=r"modlab.calibrate\(model, texts, keep_ratio"):
        modlab.set_kv_saving(routed_llama(skip="kv"), 2)


def test_only_a_threshold_beyond_the_largest_saving_is_warned_of() -> None:
    assert "beyond 0.9, that of 8x" in KNOWN.warning_for(0.95)
    assert not KNOWN.warning_for(0.9) and not KNOWN.warning_for(0.01) and not Trained().warning_for(0.99)


REACHED = Trained(savings={2.0: 0.1, 8.0: 0.9, 16.0: 0.95}, reached=8.0)


def test_a_known_threshold_may_lie_beyond_the_training() -> None:
    """It is known, and warned of; what the training came to is not."""
    assert REACHED.range == (2.0, 16.0) and REACHED.trained_to == 8.0 and REACHED.largest == 0.9
    assert "beyond 0.9, that of 8x" in REACHED.warning_for(0.95) and not REACHED.warning_for(0.9)
    assert KNOWN.trained_to == 8.0 and Trained().trained_to == math.inf


@pytest.mark.parametrize("saving", [9, 16])
def test_setting_a_saving_beyond_the_training_is_warned_of_and_done(saving: float) -> None:
    model = routed_llama(skip="kv")
    model.mod.trained = REACHED
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for within in (2, 4, 8):
            modlab.set_kv_saving(model, within)
    with pytest.warns(UserWarning, match=f"^kv_saving={saving}: threshold .* beyond 0.9, that of 8x") as said:
        p = modlab.set_kv_saving(model, saving)
    assert set(model.mod.thresholds.values()) == {p} == {REACHED.threshold_for(saving)} and p > 0.9
    assert said[0].filename == __file__


@pytest.mark.parametrize("name", ["coder-0.5b-kv", "coder-1.5b-kv", "smollm2-kv"])
def test_routers_that_ship_say_that_16x_lies_beyond_their_training(name: str) -> None:
    folder = Path(modlab.__file__).parent / "routers" / name
    known = read_description(folder / CONFIG_FILE, name).trained
    assert known is not None and known.trained_to == 8.0 and known.range == (2.0, 16.0)
    assert known.warning_for(known.savings[16.0]) and not known.warning_for(known.savings[8.0])
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert f"16x at p = {known.savings[16.0]:.4g} with" in card
    assert card.count("(beyond the training)") == 1 and "latest 128 (beyond the training);" in card


@pytest.mark.parametrize("known", [KNOWN, REACHED])
def test_it_comes_back_from_its_dict(known: Trained) -> None:
    assert Trained.from_dict(known.to_dict()) == known


@pytest.mark.parametrize(
    "wrong",
    [None, {"surprise": 1}, {"savings": [2]}, {"savings": {"two": 0.5}}, {"savings": {"2": 1.5}},
     {"savings": {"0.5": 0.5}}, {"savings": {"nan": 0.5}}, {"savings": {"2": 0.5, "4": 0.4}},
     {"tokens": -1}, {"tokens": True}, {"weights": 3}, {"savings": {"2": math.inf}},
     {"recent": [2]}, {"recent": {"2": 8}}, {"savings": {"2": 0.5}, "recent": {"4": 8}},
     {"savings": {"2": 0.5}, "reached": 4.0}, {"savings": {"2": 0.5}, "reached": "2"}, {"reached": [2]},
     {"savings": {"1": 0.5}, "reached": True}, {"savings": {"2": 0.5}, "reached": math.nan},
     {"savings": {"2": 0.5}, "recent": {"2": 0}}, {"savings": {"2": 0.5}, "recent": {"2": 8.5}}],
)  # fmt: skip
def test_what_cannot_be_is_refused(wrong) -> None:
    with pytest.raises(ModlabError):
        Trained.from_dict(wrong)


def test_what_was_reached_is_written_as_the_savings_are() -> None:
    trained = Trained(savings={2.0: 0.1, 20 / 3: 0.5, 10.0: 0.9}, reached=20 / 3)
    again = Trained.from_dict(json.loads(json.dumps(trained.to_dict())))
    assert again.reached in again.savings and again.reached == pytest.approx(20 / 3, rel=1e-5)
    assert again.warning_for(0.6) and not again.warning_for(0.4)
