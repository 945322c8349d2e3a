"""A skip is one file: two toys, written here, convert, train, generate, trace, save and benchmark without
another file being touched.

Between them they have what the protocol promises to hold: several gates a layer, two decisions a layer, a
decision by position, keys and values written for skipped tokens, trained weights of its own.
"""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

import modlab
from modlab import skips
from modlab.bench import command
from modlab.execution.routed import RoutedBranch, RoutedLayer, RoutedMLP
from modlab.measure import evaluate
from modlab.routing.record import Decision
from modlab.skips.base import Skip, Words
from tests.helpers.models import tiny_config
from tests.helpers.tokenizers import make_tokenizer
from tests.helpers.training import added, learnt

IDS = torch.randint(3, 500, (8, 24), generator=torch.Generator().manual_seed(0))
BLANK = "mod_blank"


class Sublayers(Skip):
    """Attention and MLP of a layer apart: two gates, two decisions."""

    name = "toy-sublayers"
    parts = ("attention", "mlp")
    several_gates = True
    words = Words(routed="attention and MLP apart", part="the layer's attention and its MLP, each on its own")

    def gates(self, facts, config) -> int:
        return 2

    def decision_for(self, part, decision: Decision) -> Decision:
        at = self.parts.index(part)
        return Decision(decision.logit[..., at], decision.gate[..., at], decision.keep[..., at])

    def mixin(self, part):
        return {"attention": RoutedBranch, "mlp": RoutedMLP}[part]


class Blank(nn.Module):
    """What a skipped token gets instead of the layer: a trained vector."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(hidden_size))


class BlankLayer(RoutedLayer):
    """Runs for every token, so that all keys and values are written; skipped ones come out as x + blank."""

    def run_layer(self, arguments, decision, args, kwargs):
        self.mod_plan.routing.require_call().ran.add((self.mod_plan.layer_idx, "layer"))
        y, rest = arguments.run(self.dense_forward(), {})
        skipped = arguments.hidden + self.mod_blank.weight.to(y.dtype)
        trace_of_router = 0.0 * decision.logit.sum().to(y.dtype)  # every parameter is in every step's graph
        return self.joined(torch.where(decision.keep[..., None], y, skipped) + trace_of_router, rest)


class Positions(Skip):
    """Every third token passes the layer, whatever its gate; the others leave with a trained vector."""

    name = "toy-positions"
    parts = ("layer",)
    words = Words(routed="layers by position", part="the layer")
    stores_all = True
    index_bytes = 0
    decides_itself = True

    def add_modules(self, layer, facts, config, device) -> None:
        super().add_modules(layer, facts, config, device)
        layer.add_module(BLANK, Blank(facts.hidden_size).to(device))

    def mixin(self, part):
        return BlankLayer

    def decide(self, gate, logit, call, layer_idx):
        return call.position_ids % 3 == 0


@pytest.fixture(autouse=True)
def toys(monkeypatch):
    """Registered for the length of a test."""
    monkeypatch.setattr(skips, "_REGISTERED", dict(skips._REGISTERED))
    for toy in (Sublayers(), Positions()):
        skips.register(toy)


def converted(make_llama, name: str) -> Any:
    model = modlab.convert(make_llama(), modlab.MoDConfig(skip=name, layers=[1, 3], keep_first=1))
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if ".mod_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * (parameter.numel() > 2) * 0.3
    return model.eval()


TOYS = ["toy-sublayers", "toy-positions"]


@pytest.mark.parametrize("name", TOYS)
def test_it_converts_and_reverts(make_llama, name: str) -> None:
    dense = make_llama()
    want = dense(IDS).logits
    names = set(dict(dense.named_parameters()))
    model = converted(make_llama, name)
    assert not torch.allclose(model(IDS).logits, want)
    modlab.revert(model)
    assert torch.equal(model(IDS).logits, want) and set(dict(model.named_parameters())) == names


def test_two_decisions_a_layer_are_taken_and_followed(make_llama) -> None:
    model = converted(make_llama, "toy-sublayers")
    ran = {"attention": 0, "mlp": 0}
    layer = model.model.layers[1]

    def count(name: str):
        def hook(module, args, output) -> None:
            ran[name] += output.numel()

        return hook

    layer.self_attn.o_proj.register_forward_hook(count("attention"))
    layer.mlp.down_proj.register_forward_hook(count("mlp"))
    with modlab.record_routing(model) as recording:
        model(IDS, use_cache=False)
    keep = recording.steps[0].keep[1]
    assert keep.shape == (8, 24, 2) and not torch.equal(keep[..., 0], keep[..., 1])
    D = model.config.hidden_size
    assert ran == {"attention": int(keep[..., 0].sum()) * D, "mlp": int(keep[..., 1].sum()) * D}


def test_a_decision_by_position_writes_all_keys(make_llama) -> None:
    model = converted(make_llama, "toy-positions")
    with modlab.record_routing(model) as recording, torch.no_grad():
        output = model(IDS, use_cache=True)
    keep = recording.steps[0].keep[3]
    assert torch.equal(keep, (torch.arange(24) % 3 == 0).expand(8, -1))
    assert model(IDS, use_cache=True) and modlab.KVTracker  # the dense cache layers serve it
    cache = next(value for value in output.values() if hasattr(value, "kept_tokens"))
    assert cache.kept_tokens.eq(24).all()


@pytest.mark.parametrize("name", TOYS)
def test_it_generates_as_it_reads(make_llama, name: str) -> None:
    model = converted(make_llama, name)
    made = model.generate(IDS, max_new_tokens=6, do_sample=False, pad_token_id=0, eos_token_id=None)
    logits = model(made, use_cache=False).logits
    assert torch.equal(logits[:, 23:-1].argmax(-1), made[:, 24:])
    modlab.enable_fast_generation(model)
    again = model.generate(IDS, max_new_tokens=6, do_sample=False, pad_token_id=0, eos_token_id=None)
    assert torch.equal(again, made)
    last = modlab.fast_generation_report(model)["last"]
    assert not last["fast"] and name in last["why"]


@pytest.mark.parametrize("name", TOYS)
def test_it_trains(make_llama, name: str) -> None:
    model = converted(make_llama, name)
    changed = learnt(model, IDS)
    assert changed and changed <= added(model)
    own = "mod_blank" if name == "toy-positions" else "mod_router"
    assert any(own in n for n in changed), "the skip's own weights learn"


@pytest.mark.parametrize("name", TOYS)
def test_it_is_saved_and_loaded(make_llama, name: str, tmp_path) -> None:
    model = converted(make_llama, name)
    model.save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    again, _ = modlab.load(tmp_path / "model")
    assert torch.equal(again(IDS).logits, model(IDS).logits)
    assert skips.named(name).words.routed in (tmp_path / "model" / "README.md").read_text()


@pytest.mark.parametrize("name", TOYS)
def test_it_is_traced_measured_and_calibrated(make_llama, name: str, word_tokenizer) -> None:
    model = converted(make_llama, name)
    trace = modlab.trace(model, word_tokenizer, "w1 w2 w3 w4 w5 w6 w7 w8 w9")
    rows = 2 if name == "toy-sublayers" else 1
    assert trace.layers == [layer for layer in (1, 3) for _ in range(rows)]
    assert (trace.kv_saving == 1) == (name == "toy-positions")
    assert trace.to_html() and replace(trace, model="other")
    found = evaluate(model, [{"input_ids": IDS}])
    assert 0 < found.keep_ratio < 1
    if name == "toy-sublayers":
        reached = modlab.calibrate(model, [{"input_ids": IDS}], keep_ratio=0.5, tolerance=0.05)
        assert reached.keep_ratio == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize("name", TOYS)
def test_it_is_benchmarked(name: str, tmp_path) -> None:
    flags = "--shape tiny --repeats 1 --context 40 --ratios 0.25 --decode-tokens 5"
    assert command.main(["prefill", "decode", "--skip", name, *flags.split(), "--out", str(tmp_path)]) == 0
    rows = [row for file in tmp_path.glob("*.json") for row in json.loads(file.read_text())["rows"]]
    assert {row["case"] for row in rows} == {"prefill", "decode"}
    assert all(row["skip"] == name and row["mod_ms"] > 0 for row in rows)


def test_names_that_nobody_registered_are_refused() -> None:
    with pytest.raises(modlab.ModlabError, match="skip='nothing': choose one of kv, layer, attention, mlp"):
        modlab.MoDConfig(skip="nothing")
    assert tiny_config().vocab_size == 512
