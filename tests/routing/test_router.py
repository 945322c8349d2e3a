"""The router: fp32 whatever the model's dtype, open after conversion."""

import pytest
import torch

import modlab
from modlab import skips
from modlab.errors import ModlabError
from modlab.families.tiny_models import tiny_model
from modlab.routing.router import HiddenRouter, Router
from modlab.skips.layer import LayerSkip


def test_gate_starts_open_and_equal_for_every_token() -> None:
    gate = torch.sigmoid(Router(16, init_gate=0.88)(torch.randn(2, 5, 16)))
    torch.testing.assert_close(gate, torch.full((2, 5), 0.88))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_stay_fp32_when_the_model_is_cast(dtype: torch.dtype) -> None:
    router = Router(16, init_gate=0.7)
    torch.nn.init.normal_(router.weight)
    before = router.weight.detach().clone()
    router.to(dtype)
    assert router.weight.dtype == router.bias.dtype == torch.float32
    assert torch.equal(router.weight, before)  # not merely cast there and back


def test_logit_is_fp32_under_autocast() -> None:
    router = Router(64, init_gate=0.7)
    torch.nn.init.normal_(router.weight)
    x = torch.randn(1, 7, 64)
    with torch.autocast("cpu", torch.bfloat16):
        inside = router(x)
    assert inside.dtype == torch.float32
    assert torch.equal(inside, router(x))


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"p": 1.0}, "at least 0 and below 1"),
        ({"p": 1.5}, "at least 0 and below 1"),
        ({"p": {1: -0.2}}, "at least 0 and below 1"),
        ({"operator": "best"}, "threshold, topk"),
        ({"skip": "head"}, "layer, attention, mlp"),
        ({"gate": "none"}, "straight-through"),
        ({"layers": "odd"}, "alternate"),
        ({"layers": []}, "at least one layer"),
        ({"capacity": 0.0}, "(0, 1]"),
        ({"keep_first": -1}, "0 or more"),
        ({"init_gate": 1.0}, "(0, 1)"),
    ],
)
def test_bad_settings_are_refused_by_name(settings: dict, says: str) -> None:
    with pytest.raises(ModlabError, match=r".*") as caught:
        modlab.MoDConfig(**settings)
    assert says in str(caught.value)


def test_config_round_trip() -> None:
    config = modlab.MoDConfig(layers=[1, -1], p={1: 0.3}, skip="attention", gate="fused", keep_first=2)
    assert modlab.MoDConfig.from_dict(config.to_dict()) == config
    with pytest.raises(ModlabError, match="newer modlab"):
        modlab.MoDConfig.from_dict({"layers": "all", "future": 1})


def test_named_layers() -> None:
    assert modlab.MoDConfig().resolve_layers(6) == [2, 3, 4]
    assert modlab.MoDConfig().resolve_layers(5) == [0, 1, 2, 3, 4]
    assert modlab.MoDConfig(layers="alternate").resolve_layers(6) == [1, 3, 5]
    assert modlab.MoDConfig(layers="all").resolve_layers(3) == [0, 1, 2]
    assert modlab.MoDConfig(layers=[-1, 0]).resolve_layers(4) == [0, 3]
    with pytest.raises(ModlabError, match="names layer 9, but the model has 4"):
        modlab.MoDConfig(layers=[9]).resolve_layers(4)


class TwoLayers(Router):
    """A router form: a hidden layer before the linear map. Zero weights behind it: open after conversion."""

    in_kernels = False

    def __init__(self, hidden_size: int, init_gate: float) -> None:
        super().__init__(hidden_size, init_gate)
        self.inner = torch.nn.Linear(hidden_size, hidden_size, dtype=torch.float32)

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        return super().forward(torch.tanh(self.inner(x_BTD.float())))


def test_another_router_form_is_one_class_and_the_kernels_do_not_read_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        "modlab.routing.router.make_router",
        lambda config, hidden_size, gates, device: TwoLayers(hidden_size, config.init_gate),
    )
    model = tiny_model("llama")
    ids = torch.arange(3, 27)[None]
    dense = model(ids).logits
    modlab.convert(model, modlab.MoDConfig(skip="layer", layers="all", init_gate=0.6))
    assert torch.equal(model(ids).logits, dense)
    with modlab.record_routing(model, detach=False) as recording:
        model(ids)
    sum(gate.sum() for gate in recording.steps[0].gate.values()).backward()
    assert model.model.layers[0].mod_router.weight.grad.any()
    with pytest.raises(ModlabError, match=r"layer 0: .* do not know its router \(TwoLayers\)"):
        modlab.enable_fast_generation(model, compile=False)
    modlab.revert(model)
    assert not [name for name, _ in model.named_parameters() if "mod_" in name]
    assert Router(8, 0.5).in_kernels and Router(8, 0.5, gates=2).in_kernels
    assert HiddenRouter(8, 0.5, hidden=3).in_kernels


class EveryOther(LayerSkip):
    """A whole layer, decided by position; it says nothing about fast generation."""

    name = "every-other"
    decides_itself = True

    def decide(self, gate, logit, call, layer_idx):
        return (call.position_ids % 2 == 0).expand_as(gate)


def test_a_rule_that_the_kernels_do_not_know_is_not_run_by_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(skips._REGISTERED, "every-other", EveryOther())
    model = modlab.convert(tiny_model("llama"), modlab.MoDConfig(skip="every-other", layers="all"))
    inputs = {"input_ids": torch.arange(3, 23)[None], "max_new_tokens": 6, "do_sample": False}
    want = model.generate(**inputs)
    modlab.enable_fast_generation(model, compile=False)
    assert torch.equal(model.generate(**inputs), want)
    last = modlab.fast_generation_report(model)["last"]
    assert not last["fast"] and last["why"]
