"""The masked reference and packed execution, both held to an oracle that shares no code with them.

Over what a token skips, gate forms, padding wherever it stands, documents of one row, and sliding windows.
Shape letters: B rows, T tokens, V vocabulary.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import MistralConfig, MistralForCausalLM

import modlab
from modlab.execution import masks, packed, reference
from modlab.families import oracle as oracle_module
from modlab.families.oracle import Decisions, NotHidden, oracle_logits
from modlab.families.tiny_models import tiny_model
from modlab.routing.state import masked_execution
from tests.helpers.models import dense_llama, scatter_gates, tiny_config
from tests.helpers.routing import assert_same, random_routing

B, T, RECENT, WINDOW = 3, 25, 4, 7
DOCUMENTS = {"two": (9, 16), "three": (5, 1, 19), "one": (25,)}
BRANCHES = ("attention", "mlp", "written", "sublayers")
LEAVING = ("prompt", "kv+prompt")
SKIPS = ("layer", *BRANCHES, "kv", *LEAVING)
FORMS = [(s, g) for s in ("layer", "attention", "mlp") for g in ("straight-through", "fused", "paper")]
FORMS += [(s, g) for s in ("written", "sublayers") for g in ("straight-through", "fused")]
FORMS += [(s, "straight-through") for s in ("kv", *LEAVING)]


def dense(kind: str, attention: str) -> Any:
    """A tiny dense model whose layers all slide ("mistral"), or do not."""
    if kind == "mistral":
        torch.manual_seed(0)
        sizes = tiny_config().to_diff_dict()
        sizes = {name: sizes[name] for name in sizes if name.endswith(("size", "layers", "heads"))}
        model: Any = MistralForCausalLM(MistralConfig(**sizes, sliding_window=WINDOW)).eval()
    else:
        model = dense_llama()
    model.set_attn_implementation(attention)
    return model


def converted(model: Any, skip: Any, gate: Any = "straight-through") -> Any:
    """With trained projections unlike the base's where keys and values are projected from another state."""
    settings: dict[str, Any] = {"skip": skip, "gate": gate}
    if skip != "prompt":
        settings |= {"layers": [0, 2, 3, 5], "init_gate": 0.8, "keep_first": 2}
    if skip.startswith("kv"):
        settings["keep_recent"] = RECENT
    return scatter_gates(trained(modlab.convert(copy.deepcopy(model), modlab.MoDConfig(**settings))), 2.0)


def trained(model: Any) -> Any:
    """Trained projections, where there are any, become other ones than the base's; returns the model."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "mod_projections" in name:
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data.add_(noise * parameter.shape[-1] ** -0.5)
    return model


def batch(kind: str) -> dict[str, Tensor]:
    """Three rows: padded as it says, or each of several documents ("two", "three")."""
    ids = torch.randint(3, 500, (B, T), generator=torch.Generator().manual_seed(0))
    if kind in DOCUMENTS:
        lengths = [DOCUMENTS[kind], DOCUMENTS["two"], DOCUMENTS["one"]]
        places = [torch.cat([torch.arange(n) for n in row]) for row in lengths]
        return {"input_ids": ids, "position_ids": torch.stack(places)}
    mask = torch.ones_like(ids)
    if kind == "left":
        mask[1, :6], mask[2, :17] = 0, 0
    elif kind == "right":
        mask[1, -6:], mask[2, -17:] = 0, 0
    elif kind == "inside":
        mask[0, 8:15], mask[1, 1:3], mask[1, 20:24], mask[2, :4], mask[2, 9:12] = 0, 0, 0, 0, 0
    return {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}


def real(inputs: dict[str, Tensor]) -> Tensor:
    return inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).bool()


@torch.no_grad()
def hold(model: Any, oracle: Any, inputs: dict[str, Tensor], cached: bool = True) -> Tensor:
    """Holds the masked reference, packed execution, and that with a cache to the oracle; its logits."""
    forms = {}
    with modlab.record_routing(model) as recording:
        forms["packed"] = model(**inputs, use_cache=False).logits
        with masked_execution(model):
            forms["masked"] = model(**inputs, use_cache=False).logits
        if cached:
            forms["cached"] = model(**inputs, use_cache=True).logits
        last = {form: model(**inputs, use_cache=form == "cached", logits_to_keep=1).logits for form in forms}
    expected: Tensor = oracle_logits(oracle, Decisions.recorded(model, recording.steps[0]), **inputs)
    for name, logits in forms.items():
        torch.testing.assert_close(
            logits[real(inputs)],
            expected[real(inputs)],
            rtol=1e-4,
            atol=2e-5,
            msg=lambda m, n=name: f"{n}: {m}",
        )
        ends = real(inputs)[:, -1]  # whoever of a prompt goes on when the others leave
        torch.testing.assert_close(last[name][ends], expected[ends, -1:], rtol=1e-4, atol=2e-5)
    return expected


@pytest.mark.parametrize("padding", ["none", "left", "right", "inside"])
@pytest.mark.parametrize(("skip", "gate"), FORMS)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_paddings(attention: str, skip: str, gate: str, padding: str) -> None:
    oracle = dense("llama", attention)
    inputs = batch(padding)
    expected = hold(converted(oracle, skip, gate), oracle, inputs)
    with torch.no_grad():
        unrouted = oracle(**inputs, use_cache=False).logits
    assert (unrouted - expected)[real(inputs)].abs().max() > 1e-2, "nothing was skipped: no proof"


@pytest.mark.parametrize("padding", ["none", "left", "right"])
@pytest.mark.parametrize("skip", [skip for skip in SKIPS if skip != "mlp"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_sliding_windows(attention: str, skip: str, padding: str) -> None:
    oracle = dense("mistral", attention)
    hold(converted(oracle, skip), oracle, batch(padding))


@pytest.mark.parametrize("documents", ["two", "three"])
@pytest.mark.parametrize("kind", ["llama", "mistral"])
@pytest.mark.parametrize("skip", SKIPS)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_documents_of_one_row(attention: str, skip: str, kind: str, documents: str) -> None:
    """Told apart by positions that start again, as padding-free training packs them."""
    oracle = dense(kind, attention)
    hold(converted(oracle, skip), oracle, batch(documents), cached=False)


@pytest.mark.parametrize("skip", [skip for skip in SKIPS if skip != "mlp"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@torch.no_grad()
def test_a_document_is_what_it_is_alone(attention: str, skip: str) -> None:
    """Logits and decisions, those about its own first tokens included."""
    model = converted(dense("llama", attention), skip)
    inputs = batch("two")
    with modlab.record_routing(model) as recording:
        together = model(**inputs, use_cache=False).logits[0]
        for part in inputs["input_ids"][0].split(DOCUMENTS["two"]):
            model(part[None], use_cache=False)
            at = slice(0, 9) if len(part) == 9 else slice(9, T)
            for layer, keep in recording.steps[-1].keep.items():
                assert torch.equal(recording.steps[0].keep[layer][0, at], keep[0])
            torch.testing.assert_close(together[at], model(part[None], use_cache=False).logits[0])


@pytest.mark.parametrize("what_if", [True, False], ids=["what-if", "packed"])
@pytest.mark.parametrize("skip", ["layer", *BRANCHES, "prompt"])
@pytest.mark.parametrize("kind", ["left", "inside", "two"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_training_forwards_have_its_values(
    request, attention: str, kind: str, skip: str, what_if: bool
) -> None:
    """What-if passes differ in gradient alone (but where keys are routed, which weighs keys by chance)."""
    oracle = dense("llama", attention)
    model = converted(oracle, skip).train()
    model.mod.what_if = what_if
    hold(model, oracle, batch(kind), cached=False)


@torch.no_grad()
def test_forced_routing_that_keeps_all_or_nothing() -> None:
    oracle = dense("llama", "sdpa")
    inputs = batch("inside")
    for skip in SKIPS:
        model = converted(oracle, skip)
        for share in (0.0, 0.05, 1.0):
            with modlab.routing_override(model, random_routing(share)):
                expected = hold(model, oracle, inputs)
        if skip not in LEAVING:
            assert_same(oracle(**inputs, use_cache=False).logits, expected, inputs["attention_mask"])


@pytest.mark.parametrize("rank", [0, 3])
@pytest.mark.parametrize("skip", LEAVING)
def test_trained_copies_of_projections_whole_and_of_low_rank(skip: Any, rank: int) -> None:
    oracle = dense("llama", "sdpa")
    settings: dict[str, Any] = {"skip": skip, "leave_after": 0.3, "leave_rank": rank}
    if skip == "kv+prompt":
        settings |= {"gates": "kv_head", "router_hidden": 4, "init_gate": 0.8, "keep_recent": RECENT}
    config = modlab.MoDConfig(**settings)
    hold(scatter_gates(trained(modlab.convert(copy.deepcopy(oracle), config)), 2.0), oracle, batch("left"))


@torch.no_grad()
def test_a_prompt_that_leaves_leaves_with_the_state_that_it_had() -> None:
    """Said by hand, not read off a recording: who is no row's last token passes the upper layers by."""
    oracle = dense("llama", "sdpa")
    model, inputs = converted(oracle, "prompt"), batch("right")
    states = {}

    def note(_module: Any, _args: Any, output: Any) -> None:
        states["got"] = (output[0] if isinstance(output, tuple) else output).clone()

    handle = model.model.layers[-1].register_forward_hook(note)
    with modlab.record_routing(model) as recording:
        model(**inputs, use_cache=True)
        everybody = model(**inputs, use_cache=False).logits
        model(**inputs, use_cache=True, logits_to_keep=torch.tensor([3]))
    handle.remove()
    decisions = Decisions.recorded(model, recording.steps[0])
    here = real(inputs)
    goes_on = torch.zeros_like(here)
    goes_on[torch.arange(B), here.long().cumsum(1).argmax(1)] = True
    goes_on[:, 3] = True
    decisions.keep = dict.fromkeys(decisions.keep, goes_on & here)
    logits = oracle_logits(oracle, decisions, **inputs)
    got = oracle.lm_head(oracle.model.norm(states["got"]))
    torch.testing.assert_close(got[here], logits[here], rtol=1e-4, atol=2e-5)
    torch.testing.assert_close(got[goes_on & here], everybody[goes_on & here], rtol=1e-4, atol=2e-5)
    assert (got - everybody)[here & ~goes_on].abs().max() > 1e-2


# The oracle can say no, and says what it cannot see.


@torch.no_grad()
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("skip", SKIPS)
def test_one_decision_turned_round_is_noticed(attention: str, skip: str) -> None:
    oracle = dense("llama", attention)
    model, inputs = converted(oracle, skip), batch("none")
    with modlab.record_routing(model) as recording:
        logits = model(**inputs, use_cache=False).logits
    decisions = Decisions.recorded(model, recording.steps[0])
    keep = decisions.keep[5].clone()
    keep[0, 5] = ~keep[0, 5]
    decisions.keep = {**decisions.keep, 5: keep}
    assert (oracle_logits(oracle, decisions, **inputs) - logits)[0].abs().max() > 1e-3


@torch.no_grad()
def test_a_mistake_that_reference_and_packed_execution_share_is_noticed(monkeypatch) -> None:
    """Masks rebuilt from columns once let documents see each other, in both of them alike."""

    def by_columns(given, queries, keys, window, attention):
        return masks.packed_mask(queries, keys, window)

    for taking in (reference, packed):
        monkeypatch.setattr(taking, "visible_mask", by_columns)
    oracle = dense("llama", "sdpa")
    model, inputs = converted(oracle, "layer"), batch("two")
    with modlab.record_routing(model) as recording:
        got = model(**inputs, use_cache=False).logits
        with masked_execution(model):
            assert_same(model(**inputs, use_cache=False).logits, got, None)
    expected = oracle_logits(oracle, Decisions.recorded(model, recording.steps[0]), **inputs)
    assert (got - expected).abs().max() > 1e-2


@torch.no_grad()
def test_open_gates_are_the_dense_model_itself() -> None:
    oracle = dense("llama", "sdpa")
    inputs = batch("left")
    everything = torch.ones(B, T, dtype=torch.bool)
    gate = torch.ones(B, T)
    decisions = Decisions(
        everything, dict.fromkeys(range(6), everything), dict.fromkeys(range(6), gate), "layer", "fused", 1
    )
    want = oracle(**inputs, use_cache=False).logits
    assert_same(oracle_logits(oracle, decisions, **inputs), want, inputs["attention_mask"])
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in oracle.modules())


@torch.no_grad()
def test_an_attention_that_it_cannot_look_into_is_said() -> None:
    """Weights by hand, without softmax: nothing is hidden, and nothing would be proven."""
    oracle = dense("llama", "eager")
    forward = oracle.model.layers[2].self_attn.forward
    oracle.model.layers[2].self_attn.forward = lambda hidden_states, **kw: (hidden_states, None)
    keep = torch.ones(B, T, dtype=torch.bool)
    decisions = Decisions(keep, {2: keep}, {2: keep.float()}, "layer", "straight-through", 1)
    with pytest.raises(NotHidden, match="layer 2 weighs its keys by no function that is known"):
        oracle_logits(oracle, decisions, input_ids=batch("none")["input_ids"])
    oracle.model.layers[2].self_attn.forward = forward


@torch.no_grad()
def test_keys_and_values_that_are_projected_by_nothing_known_are_said() -> None:
    oracle = dense("llama", "sdpa")
    model, inputs = converted(oracle, "prompt"), batch("none")
    with modlab.record_routing(model) as recording:
        model(**inputs, use_cache=False)
    oracle.model.layers[5].self_attn.forward = lambda hidden_states, **kw: (hidden_states, None)
    with pytest.raises(NotHidden, match="layer 5 projects no keys and values of its own"):
        oracle_logits(oracle, Decisions.recorded(model, recording.steps[0]), **inputs)


@torch.no_grad()
@pytest.mark.parametrize("skip", LEAVING)
@pytest.mark.parametrize("name", ["k_proj", "v_proj", "q_proj"])
def test_the_bases_projection_in_place_of_a_trained_one_is_noticed(skip: str, name: str) -> None:
    oracle = dense("llama", "sdpa")
    model, inputs = converted(oracle, skip), batch("none")
    with modlab.record_routing(model) as recording:
        logits = model(**inputs, use_cache=False).logits
    decisions = Decisions.recorded(model, recording.steps[0])
    base = oracle.model.layers[4].self_attn.get_submodule(name)
    decisions.copies[4][name].update(weight=base.weight)
    assert (oracle_logits(oracle, decisions, **inputs) - logits).abs().max() > 1e-3


def test_it_shares_no_code_with_execution() -> None:
    lines = Path(oracle_module.__file__).read_text(encoding="utf-8").splitlines()
    assert not [line for line in lines if "import" in line and "execution" in line]


@torch.no_grad()
def test_experts_that_return_their_tokens_in_one_row_and_the_papers_gate() -> None:
    """Llama 4: rows come out as they would alone."""
    oracle = tiny_model("llama4_text")
    inputs = {"input_ids": batch("none")["input_ids"] % 90 + 3}
    for gate in ("straight-through", "fused", "paper"):
        config = modlab.MoDConfig(skip="layer", layers="all", gate=gate, keep_first=1)
        model = modlab.convert(copy.deepcopy(oracle), config)
        with modlab.routing_override(model, random_routing(0.6)):
            hold(model, oracle, inputs)
