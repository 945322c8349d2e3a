"""Checkpoints hold what a run changes, and a run goes on with the rest that it began with alone."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import LlamaForCausalLM, TorchAoConfig

import modlab
from modlab.config import MoDConfig
from modlab.errors import ModlabError
from modlab.routing.router import is_router
from modlab.training.checks import check_saved
from modlab.training.loop import TrainConfig, train
from modlab.training.weights import BLOCK, Weights, digest
from tests.helpers.models import alternate_layers, routed_llama, tiny_config
from tests.helpers.steps import adapted
from tests.helpers.training import same_weights, settings

KINDS: dict[str, dict[str, Any]] = {
    "frozen": {"freeze_base": True, "keep_ratio": 0.4, "what_if": 0.5, "ramp": 0.5},
    "frozen, budget": {"freeze_base": True, "objective": "budget", "keep_ratio": 0.4, "ramp": 0.5},
    "distil": {"objective": "distil", "keep_range": (0.4, 0.9), "ramp": 0.5},
    "adapters": {"keep_ratio": 0.4, "what_if": 0.5, "ramp": 0.5},
}


@pytest.fixture
def model_for(make: Callable[..., Any]) -> Callable[[str], Any]:
    """A fresh model for a kind of run; its base is the same each time, its routers are not."""

    def model_for(kind: str, router_seed: int = 0) -> Any:
        mod = {"skip": "kv", "keep_recent": 4} if kind == "distil" else {"init_gate": 0.6}
        model = make(mod=alternate_layers(**mod), attention_dropout=0.2)
        generator = torch.Generator().manual_seed(router_seed)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if is_router(name):
                    parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        return adapted(model) if kind == "adapters" else model

    return model_for


def run(model: Any, rows: torch.Tensor, out: Path, kind: str, **more: Any) -> Any:
    config = settings(steps=6, save_every=3, keep_last=9, **KINDS[kind])
    return train(model, rows, TrainConfig(out=out, **config | more))


def weights_in(out: Path, step: int = 3) -> Path:
    return out / "checkpoints" / f"step_{step}" / "model.safetensors"


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_with_a_frozen_base_goes_on_exactly_from_what_it_trained(
    model_for: Callable[..., Any], rows: torch.Tensor, tmp_path: Path, kind: str
) -> None:
    """Six steps are three and three, bit for bit, though the checkpoint has nothing of the base; and from one
    that has all of it, as they were once written."""
    whole = run(model_for(kind), rows, tmp_path / "whole", kind)
    saved = load_file(weights_in(tmp_path / "whole"))
    assert saved and all(is_router(name) or ".lora_" in name for name in saved)
    of_all = sum(p.nbytes for p in whole.model.parameters())
    assert weights_in(tmp_path / "whole").stat().st_size < 0.25 * of_all
    older = shutil.copytree(tmp_path / "whole", tmp_path / "older")
    as_written_before(older / "checkpoints" / "step_3", model_for(kind))
    for out in ("whole", "older"):
        path = tmp_path / out / "checkpoints" / "step_3"
        resumed = run(model_for(kind, router_seed=1), rows, tmp_path / f"from {out}", kind, resume=path)
        assert same_weights(whole.model, resumed.model)
        keys = [c for c in whole.history if c not in ("tokens_per_s", "seconds")]
        assert resumed.history[keys].equals(whole.history[keys].iloc[3:].reset_index(drop=True))


def as_written_before(checkpoint: Path, model: Any) -> None:
    """The checkpoint of a base, in the format that held all weights."""
    state = json.loads((checkpoint / "state.json").read_text())
    weights = checkpoint / "model.safetensors"
    saved = load_file(weights)
    base = {name: value for name, value in model.state_dict().items() if name in state["unchanged"]}
    save_file(saved | base, weights)
    assert base and state.pop("unchanged").keys() == base.keys()
    state["format"] = 1
    state["files"]["model.safetensors"] = hashlib.sha256(weights.read_bytes()).hexdigest()
    (checkpoint / "state.json").write_text(json.dumps(state))


def test_a_base_that_is_trained_is_saved_whole(
    make: Callable[..., Any], rows: torch.Tensor, tmp_path: Path
) -> None:
    model = make(mod=alternate_layers())
    train(model, rows, TrainConfig(out=tmp_path, **settings(steps=3, save_every=3)))
    assert load_file(weights_in(tmp_path)).keys() == dict(model.named_parameters()).keys()
    state = json.loads((weights_in(tmp_path).parent / "state.json").read_text())
    assert state["unchanged"] == {}


@pytest.mark.parametrize("older", [False, True], ids=["as written", "as written before"])
@pytest.mark.parametrize("kind", ["frozen", "distil", "adapters"])
def test_another_base_is_refused(
    model_for: Callable[..., Any], rows: torch.Tensor, tmp_path: Path, kind: str, older: bool
) -> None:
    """By a single number; the model and the folder are then as they were."""
    run(model_for(kind), rows, tmp_path / "run", kind)
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step_6")
    if older:
        as_written_before(tmp_path / "run" / "checkpoints" / "step_3", model_for(kind))
    model = model_for(kind, router_seed=1)
    name = next(n for n in dict(model.named_parameters()) if "layers.2.mlp.up_proj" in n and "lora" not in n)
    with torch.no_grad():
        model.get_parameter(name)[3, 5] += 1e-3
    before = {n: value.clone() for n, value in model.state_dict().items()}
    files = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    with pytest.raises(
        ModlabError, match=rf"step_3 goes with another base.*{name} is .*\(was .*Load the base"
    ):
        run(model, rows, tmp_path / "run", kind, resume="auto")
    assert all(torch.equal(before[n], value) for n, value in model.state_dict().items())
    assert {path: path.read_bytes() for path in files} == files


def test_a_base_in_another_dtype_is_refused(
    model_for: Callable[..., Any], rows: torch.Tensor, tmp_path: Path
) -> None:
    run(model_for("frozen").to(torch.bfloat16), rows, tmp_path / "run", "frozen")
    with pytest.raises(ModlabError, match=r"is float32 \[.*\(was bfloat16 \[.*in the same dtype"):
        run(model_for("frozen"), rows, tmp_path / "run", "frozen", resume="auto", steps=8)


@pytest.mark.parametrize("damage", ["cut", "a bit flipped"])
def test_weights_without_the_base_are_watched_as_others_are(
    model_for: Callable[..., Any], rows: torch.Tensor, tmp_path: Path, damage: str
) -> None:
    run(model_for("frozen"), rows, tmp_path / "run", "frozen")
    path = weights_in(tmp_path / "run", 6)
    data = path.read_bytes()
    path.write_bytes(data[:-9] if damage == "cut" else data[:-9] + bytes([data[-9] ^ 1]) + data[-8:])
    with pytest.raises(ModlabError, match="Could not load the checkpoint .*step_6.*damaged"):
        run(model_for("frozen"), rows, tmp_path / "run", "frozen", resume="auto", steps=8)


class Counts(nn.Module):
    """Stands in for a layer that learns statistics: counts its forwards and adds them, and has a constant."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.register_buffer("seen", torch.zeros(()))
        self.register_buffer("constant", torch.ones(32))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen += self.training
        return self.inner(x) + 1e-3 * self.seen * self.constant


def test_buffers_that_change_are_saved_and_others_are_not(
    model_for: Callable[..., Any], rows: torch.Tensor, tmp_path: Path
) -> None:
    """A run in two calls, with a fresh model or the same, whose third call is again exact."""

    def fresh() -> Any:
        model = model_for("frozen")
        model.model.layers[0].mlp = Counts(model.model.layers[0].mlp)
        return model

    def steps(model: Any, out: str, steps: int) -> Any:
        more = {"min_lr_ratio": 1.0, "warmup": 0.0, "ramp": 0.0, "resume": "auto"}
        return run(model, rows, tmp_path / out, "frozen", steps=steps, **more)

    whole = steps(fresh(), "whole", 9).model
    name = "model.layers.0.mlp.seen"
    for step in (3, 6):
        saved = load_file(weights_in(tmp_path / "whole", step))
        assert saved[name] == step and all(is_router(other) for other in saved if other != name)
    model = steps(fresh(), "parts", 3).model
    steps(model, "parts", 6)
    assert same_weights(steps(fresh(), "parts", 9).model, whole)
    model = fresh()
    model.model.layers[0].mlp.constant[3] = 2
    with pytest.raises(ModlabError, match=r"layers.0.mlp.constant is .*\(was"):
        steps(model, "parts", 12)


def test_what_conversion_added_is_saved_though_it_is_frozen() -> None:
    model = routed_llama().requires_grad_(False)
    assert set(Weights(model).parted()[0]) == {
        name for name, _ in model.named_parameters() if is_router(name)
    }


class Scaled(nn.Linear):
    """Has a tensor in its state that is neither parameter nor buffer, as quantized weights do."""

    def __init__(self, scale: torch.Tensor) -> None:
        super().__init__(2, 3)
        self.requires_grad_(False)
        self.scale = scale

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "scale"] = self.scale


def test_what_is_no_parameter_and_no_buffer_is_saved_from_when_it_is_changed() -> None:
    layer = Scaled(torch.full((3,), 2.0))
    weights = Weights(nn.Sequential(layer))
    assert weights.parted()[0] == {}
    before = weights.parted()[1]
    assert before.keys() == {"0.weight", "0.bias", "0.scale"}
    assert weights.differences({}, before) == []
    layer.scale[1] = 4
    (difference,) = weights.differences({}, before)
    assert difference == f"0.scale is {digest(layer.scale)} (was {before['0.scale']})"
    assert weights.parted()[0].keys() == {"0.scale"}
    assert weights.parted()[1].keys() == {"0.weight", "0.bias"}
    assert weights.differences({"0.scale": torch.ones(3)}, weights.parted()[1]) == []
    weights.restore({"0.scale": torch.full((3,), 2.0)})
    assert weights.parted()[0]["0.scale"].tolist() == [2, 2, 2]


def test_names_and_shapes_of_a_base_are_told_from_those_of_what_a_run_trains() -> None:
    """One says that the base is another, as it does of its numbers; the other is a ValueError."""
    base = Scaled(torch.ones(3))
    unchanged = Weights(nn.Sequential(base)).parted()[1]
    longer = Weights(nn.Sequential(Scaled(torch.ones(4))))
    assert any("0.scale is float32 [4] " in words for words in longer.differences({}, unchanged))
    others = {name: was for name, was in longer.parted()[1].items() if name != "0.scale"}
    assert longer.differences({"0.scale": torch.ones(3)}, others) == [
        "0.scale is float32 [4] (was float32 [3])"
    ]
    plain = nn.Sequential(nn.Linear(2, 3)).requires_grad_(False)
    plain.load_state_dict({"0.weight": base.weight, "0.bias": base.bias})
    assert Weights(plain).differences({}, unchanged) == ["0.scale is missing"]
    assert Weights(nn.Sequential(base)).differences({}, Weights(plain).parted()[1]) == ["0.scale is new"]

    plain[0].bias.requires_grad_()
    trained, rest = Weights(plain), Weights(plain).parted()[1]
    assert trained.differences({"0.bias": torch.ones(3)}, rest) == []
    with pytest.raises(ValueError, match=r"0.bias is float32 \[3\] \(was float32 \[4\]\)"):
        trained.differences({"0.bias": torch.ones(4)}, rest)
    for names in ([], ["0.bias", "0.more"]):
        with pytest.raises(ValueError, match=r"its weights are others: \['0\.(bias|more)'\]"):
            trained.differences({name: torch.ones(3) for name in names}, rest)
    assert trained.differences({}, {"0.gone": ""}) == ["0.gone is missing", "0.weight is new"]


def int8(model: Any) -> Any:
    quanto = pytest.importorskip("optimum.quanto")
    quanto.quantize(model, weights=quanto.qint8, exclude="lm_head")
    quanto.freeze(model)
    return model


def nf4(model: Any) -> Any:
    bnb = pytest.importorskip("bitsandbytes")
    for module in list(model.model.layers.modules()):
        for name, linear in module.named_children():
            if type(linear) is nn.Linear:
                packed = bnb.nn.Linear4bit(
                    linear.in_features, linear.out_features, bias=False, compute_dtype=torch.float32
                )
                packed.weight = bnb.nn.Params4bit(linear.weight.data, requires_grad=False, quant_type="nf4")
                setattr(module, name, packed)
    return model.to("cpu")  # packs them


def torchao_int8(model: Any) -> Any:
    quantization = pytest.importorskip("torchao.quantization")
    config = TorchAoConfig(quantization.Int8WeightOnlyConfig())
    with tempfile.TemporaryDirectory() as folder:  # transformers knows what it has loaded so, and writes it
        model.save_pretrained(folder)
        return LlamaForCausalLM.from_pretrained(folder, quantization_config=config, dtype=torch.float32)


def as_it_is(model: Any) -> Any:
    return model


def on_a_quantized_base(quantized: Callable[[Any], Any], seed: int = 0) -> Any:
    torch.manual_seed(seed)
    model = quantized(LlamaForCausalLM(tiny_config()))
    return modlab.convert(model.requires_grad_(False), MoDConfig(keep_recent=4))


@pytest.mark.parametrize("quantized", [int8, torchao_int8, nf4])
def test_a_quantized_base_is_left_out_and_gone_on_with(
    rows: torch.Tensor, tmp_path: Path, quantized: Callable[[Any], Any]
) -> None:
    """Also one that has been used before, and the run's own. bitsandbytes rounds the scales of 4-bit weights
    each time that it lays them out for a CPU and back, to which a state is taken."""
    model = on_a_quantized_base(quantized)
    whole = run(model, rows, tmp_path, "distil")
    for step in (3, 6):
        saved = load_file(weights_in(tmp_path, step))
        assert saved and all(is_router(name) for name in saved)
    shutil.rmtree(weights_in(tmp_path, 6).parent)
    others = [on_a_quantized_base(quantized) for _ in range(2)]
    for _ in range(3):
        others[1](rows[:1])
        others[1].state_dict()
    for number, other in enumerate((*others, model)):
        again = tmp_path / str(number)
        shutil.copytree(weights_in(tmp_path).parent, again / "checkpoints" / "step_3")
        losses = run(other, rows, again, "distil", resume="auto").history["loss"].tolist()
        off = 1e-3 if quantized is nf4 else 0.0
        assert losses == pytest.approx(whole.history["loss"].tolist()[3:], rel=off, abs=0.0)


@pytest.mark.parametrize("quantized", [int8, torchao_int8, nf4])
def test_another_quantized_base_is_refused(
    rows: torch.Tensor, tmp_path: Path, quantized: Callable[[Any], Any]
) -> None:
    """By other numbers, or as it is not quantized; the checkpoint is not said to be damaged."""
    run(on_a_quantized_base(quantized), rows, tmp_path, "distil")
    for other in (on_a_quantized_base(quantized, seed=1), on_a_quantized_base(as_it_is)):
        before = {name: digest(value) for name, value in other.state_dict().items()}
        with pytest.raises(ModlabError, match="another (base|model)") as refused:
            run(other, rows, tmp_path, "distil", resume="auto")
        assert "delete it" not in str(refused.value)
        assert before == {name: digest(value) for name, value in other.state_dict().items()}


def test_what_goes_with_a_frozen_weight_counts_by_name() -> None:
    """Whatever was saved of it before; one more or less is another base."""

    class Packed(nn.Linear):
        scales = {"weight.scale": torch.ones(3), "weight.state.text": torch.ones(4)}

        def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
            super()._save_to_state_dict(destination, prefix, keep_vars)
            destination.update({prefix + name: value for name, value in self.scales.items()})

    model = nn.Sequential(Packed(4, 4, bias=False)).requires_grad_(False)
    weights = Weights(model)
    model[0].scales = {"weight.scale": torch.zeros(3), "weight.state.text": torch.ones(7)}
    changed, rest = weights.parted()
    assert not changed and list(rest) == ["0.weight", "0.weight.scale", "0.weight.state.text"]
    saved = {"0.weight.scale": torch.ones(3), "0.weight.state.text": torch.ones(4)}
    assert weights.differences(saved, rest) == [] == Weights(model).differences({}, rest)
    everything = {"0.weight": model[0].weight.detach(), **saved}
    assert weights.differences(everything, {}) == []  # of a run that wrote them all
    del everything["0.weight.scale"]
    assert weights.differences(everything, {}) == ["0.weight.scale is new"]
    with pytest.raises(ValueError, match=r"its weights are others: \['0\.weight\.more'\]"):
        weights.differences({"0.weight.more": torch.ones(3)}, rest)
    weights.restore(saved)
    assert model[0].scales["weight.scale"].sum() == 0
    model[0].scales = {"weight.scale": torch.zeros(3), "weight.more": torch.ones(4)}
    found = Weights(model).differences({}, rest)
    assert found == ["0.weight.state.text is missing", "0.weight.more is new"]


def test_each_weight_that_torchao_has_packed_counts() -> None:
    """They lie at no place of their own; tied ones are one object."""
    quantization = pytest.importorskip("torchao.quantization")

    def of(seed: int) -> nn.Sequential:
        torch.manual_seed(seed)
        model = nn.Sequential(*(nn.Linear(32, 32, bias=False) for _ in range(3)))
        quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
        model[2].weight = model[0].weight
        return model.requires_grad_(False)

    changed, rest = Weights(of(0)).parted()
    assert not changed and list(rest) == ["0.weight", "1.weight"]
    other = of(0)
    other[1] = of(1)[1]
    assert Weights(of(0)).differences({}, rest) == []
    (found,) = Weights(other).differences({}, rest)
    assert found.startswith("1.weight is float32 [32, 32] ")


@pytest.mark.parametrize("adapters", [False, True])
def test_a_model_that_cannot_be_written_is_refused_before_it_is_trained(
    model_for: Callable[..., Any], rows: torch.Tensor, tmp_path: Path, adapters: bool
) -> None:
    """Not if only adapters are written, nor if nothing is."""
    model = model_for("adapters" if adapters else "distil")
    base = model.get_base_model() if adapters else model
    method = SimpleNamespace(quant_method="quanto")
    base.hf_quantizer = SimpleNamespace(is_serializable=lambda: False, quantization_config=method)
    config = TrainConfig(out=tmp_path / "run", **settings(steps=1))
    check_saved(dataclasses.replace(config, out=None), model)
    if adapters:
        check_saved(config, model)
        return
    with pytest.raises(ModlabError, match="quantised by quanto.*modlab.save_routers.*it was before it was"):
        train(model, rows, config)
    assert not (tmp_path / "run").exists()


class Stateless(nn.Linear):
    """A layer of which no state can be taken."""

    def _save_to_state_dict(self, *args: Any) -> None:
        raise NotImplementedError


def test_a_model_whose_state_cannot_be_taken_trains_without_a_folder(
    model_for: Callable[..., Any], rows: torch.Tensor
) -> None:
    model = model_for("distil")
    model.model.layers[0].mlp.up_proj.__class__ = Stateless
    config = settings(steps=2, **KINDS["distil"])
    assert train(model, rows, TrainConfig(**config)).steps == 2


def test_every_number_of_a_tensor_counts() -> None:
    for dtype in (torch.bfloat16, torch.float32, torch.float64, torch.uint8, torch.bool, torch.float8_e4m3fn):
        for length in (1, 7, 8 * BLOCK + 3):
            whole = torch.ones(length).to(dtype)
            for at in (0, length // 2, length - 1):
                changed = whole.float().clone()
                changed[at] = 0
                assert digest(whole) != digest(changed.to(dtype)), (dtype, length, at)
    numbers = torch.arange(40.0).view(5, 8)
    assert digest(numbers[1:, 1:]) == digest(numbers[1:, 1:].clone())
    assert digest(numbers.half()[:, 1]) == digest(numbers.half()[:, 1].clone())
    assert digest(numbers) != digest(numbers.T) != digest(numbers.T.contiguous().view(5, 8))
    assert digest(numbers[0, 3]).startswith("float32 [] ")
    assert digest(numbers[:0]) != digest(numbers[:0].half())
