"""calibrate: thresholds for a wanted keep ratio, or why there are none."""

import warnings

import pytest
import torch

import modlab
from modlab import measure
from modlab.errors import ModlabError
from modlab.routing.trained import Trained
from tests.helpers.models import alternate_layers
from tests.measure.models import dense_model


@pytest.mark.parametrize("per_layer", [False, True])
@pytest.mark.parametrize("wanted", [0.25, 0.6])
def test_calibrate_reaches_the_ratio(model, batches, wanted, per_layer):
    got = modlab.calibrate(model, batches, keep_ratio=wanted, per_layer=per_layer, tolerance=0.02)
    assert sorted(got) == model.mod.layers
    assert dict(got) == model.mod.thresholds
    result = measure.evaluate(model, batches)
    assert result.keep_ratio == pytest.approx(wanted, abs=0.02)
    assert got.keep_ratio == pytest.approx(result.keep_ratio)
    assert got.keep_ratio_by_layer == pytest.approx(result.keep_ratio_by_layer)
    if per_layer:
        assert all(ratio == pytest.approx(wanted, abs=0.02) for ratio in result.keep_ratio_by_layer.values())
    else:
        assert len(set(got.values())) == 1


def test_calibrate_counts_padding_out(model, batches):
    ids = torch.cat([torch.zeros(2, 60, dtype=torch.long), batches[0]], 1)
    mask = torch.cat([torch.zeros(2, 60, dtype=torch.long), torch.ones_like(batches[0])], 1)
    padded = modlab.calibrate(model, [{"input_ids": ids, "attention_mask": mask}], keep_ratio=0.4)
    plain = modlab.calibrate(model, batches[:1], keep_ratio=0.4)
    assert dict(padded) == pytest.approx(dict(plain), abs=1e-3)


@pytest.mark.parametrize("per_layer", [False, True])
def test_calibrate_says_when_gates_cannot_be_split(batches, per_layer):
    fresh = modlab.convert(dense_model(), alternate_layers())
    before = dict(fresh.mod.thresholds)
    with pytest.raises(ModlabError, match="not reachable.*\n.*train the routers"):
        modlab.calibrate(fresh, batches, keep_ratio=0.5, per_layer=per_layer)
    assert fresh.mod.thresholds == before


def test_calibrate_says_when_the_first_tokens_are_too_many(model):
    with pytest.raises(ModlabError, match="always kept, which is 0.400"):
        modlab.calibrate(model, torch.arange(10)[None], keep_ratio=0.1)


@pytest.mark.parametrize("wanted", [0.0, 1.0, -1, 25])
def test_calibrate_refuses_ratios_outside_the_unit_interval(model, batches, wanted):
    with pytest.raises(ModlabError, match=f"keep_ratio={wanted}"):
        modlab.calibrate(model, batches, keep_ratio=wanted)


def test_routers_as_conversion_made_them_are_refused_before_any_pass(batches, monkeypatch):
    fresh = modlab.convert(dense_model(), alternate_layers(skip="kv", gates="kv_head", router_hidden=4))
    monkeypatch.setattr(fresh.model, "forward", None)  # would fail at once
    with pytest.raises(ModlabError, match="as conversion made them.*\n.*train the routers"):
        modlab.calibrate(fresh, batches, keep_ratio=0.5)


def test_a_threshold_beyond_what_routers_were_trained_for_is_warned_of(model, batches):
    largest = next(iter(modlab.calibrate(model, batches, keep_ratio=0.5).values()))
    model.mod.trained = Trained(savings={2.0: largest / 2, 4.0: largest})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        modlab.calibrate(model, batches, keep_ratio=0.7, tolerance=0.02)
    with pytest.warns(UserWarning, match="beyond .*, that of 4x"):
        modlab.calibrate(model, batches, keep_ratio=0.3, tolerance=0.02)
    model.mod.trained = Trained(savings={2.0: largest / 4, 4.0: largest / 2, 8.0: largest}, reached=4.0)
    with pytest.warns(UserWarning, match="beyond .*, that of 4x"):  # 8x is known, and was not trained for
        modlab.calibrate(model, batches, keep_ratio=0.5)
