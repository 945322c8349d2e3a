"""Prompt tokens leave early: whoever goes on computes what it would have computed."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    MistralConfig,
    MistralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import modlab
from modlab.errors import ModlabError
from modlab.execution.leaving import ProjectedAttention
from modlab.execution.projections import PROJECTIONS
from modlab.families.tiny_models import tiny_model
from modlab.hf.names import given_cache
from modlab.measure import evaluate
from modlab.routing.state import masked_execution
from modlab.training.model import parameter_groups
from tests.helpers.models import dense_llama, scatter_gates, tiny_config
from tests.helpers.routing import IDS, MASK, inputs, positions
from tests.helpers.tokenizers import make_tokenizer
from tests.helpers.training import added, changes, learnt

SIZES = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 6}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0}


def make(kind: str) -> Any:
    torch.manual_seed(0)
    if kind == "qwen3":  # norms of queries and keys
        return Qwen3ForCausalLM(Qwen3Config(**SIZES, **HEADS, head_dim=24)).eval()
    if kind == "sliding":
        return MistralForCausalLM(MistralConfig(**SIZES, **HEADS, sliding_window=12)).eval()
    return dense_llama(attn_implementation="eager" if kind == "eager" else "sdpa")


KINDS = ["llama", "eager", "qwen3", "sliding"]


def converted(kind: str = "llama", scale: float = 0.2, **fields: Any) -> Any:
    """With projections that differ from the dense ones."""
    model = modlab.convert(make(kind), modlab.MoDConfig(skip="prompt", **fields))
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if ".mod_" in name:
            parameter.data += scale * torch.randn(parameter.shape, generator=generator) * 0.2
    return model.eval()


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.allclose(a, b, atol=2e-5)


def test_it_follows_the_specification() -> None:
    """Against code that shares none: the layers written out."""
    model = converted()
    decoder, first = model.model, 4
    assert model.mod.layers == [4, 5]
    x = decoder.embed_tokens(IDS)
    cos, sin = decoder.rotary_emb(x, torch.arange(IDS.shape[1])[None])

    def heads(y):
        return y.view(*y.shape[:2], -1, 16).transpose(1, 2)

    def turn(y):
        a, b = y.chunk(2, -1)
        return y * cos[:, None] + torch.cat([-b, a], -1) * sin[:, None]

    entered = None
    for index, layer in enumerate(decoder.layers):
        attention, own = layer.self_attn, layer.self_attn
        source = x
        if index >= first:
            entered = x if index == first else entered
            own, source = layer.get_submodule(PROJECTIONS), entered
        weight = {n: getattr(own, f"{n}_proj").weight for n in "qkv"}
        h, s = layer.input_layernorm(x), layer.input_layernorm(source)
        q, k, v = turn(heads(h @ weight["q"].T)), turn(heads(s @ weight["k"].T)), heads(s @ weight["v"].T)
        k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
        scores = (q @ k.mT / 4).masked_fill(torch.ones(40, 40).triu(1).bool(), -torch.inf)
        x = x + attention.o_proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
        x = x + layer.mlp(layer.post_attention_layernorm(x))
    assert close(model(IDS, use_cache=False).logits, model.lm_head(decoder.norm(x)))


@pytest.mark.parametrize("rank", [0, 4])
def test_it_converts_and_reverts(rank: int) -> None:
    dense = make("llama")
    want, names = dense(IDS).logits, set(dict(dense.named_parameters()))
    model = modlab.convert(dense, modlab.MoDConfig(skip="prompt", leave_after=0.5, leave_rank=rank))
    added = set(dict(model.named_parameters())) - names
    assert model.mod.layers == [3, 4, 5] and all(PROJECTIONS in name for name in added)
    assert not torch.allclose(model(IDS).logits, want), "keys come from another state: not the dense model"
    with modlab.routing_off(model):
        assert torch.equal(model(IDS).logits, want)
    modlab.revert(model)
    assert torch.equal(model(IDS).logits, want) and set(dict(model.named_parameters())) == names


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("padding", ["none", "left", "right", "one row"])
def test_leaving_changes_no_logit_that_is_asked_for(kind: str, padding: str) -> None:
    model = converted(kind)
    ids, mask = inputs(model, padding)
    given = {"attention_mask": mask, **positions(mask)}
    for asked in (1, 3):
        full = model(ids, use_cache=False, **given).logits[:, -asked:]
        some = model(ids, use_cache=False, logits_to_keep=asked, **given).logits
        held = model(ids, use_cache=True, logits_to_keep=asked, **given).logits
        with masked_execution(model):
            reference = model(ids, use_cache=False, logits_to_keep=asked, **given).logits
        real = torch.ones_like(ids).bool() if mask is None else mask.bool()
        for found in (some, held, reference):
            assert close(found[real[:, -asked:]], full[real[:, -asked:]])


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_that_leave_run_nothing_above(kind: str) -> None:
    model = converted(kind)
    rows: list[int] = []
    for layer in model.model.layers[4:]:
        layer.mlp.register_forward_hook(lambda module, args, output: rows.append(output[..., 0].numel()))
    with modlab.record_routing(model) as recording:
        model(IDS, attention_mask=MASK, logits_to_keep=1)
    assert rows == [3, 3]
    keep = recording.steps[0].keep
    assert list(keep) == [4, 5] and all(
        torch.equal(k, torch.arange(40).expand(3, -1) == 39) for k in keep.values()
    )
    rows.clear()
    model(IDS, attention_mask=MASK)
    assert rows == [120, 120], "all logits are asked for"


def test_each_rows_last_token_goes_on_wherever_padding_stands() -> None:
    model = converted()
    mask = torch.ones_like(IDS)
    mask[1, -9:], mask[2, :5] = 0, 0
    mask[2, -4:] = 0
    last = torch.tensor([39, 30, 35])
    given = {"attention_mask": mask, **positions(mask)}
    full = model.model(IDS, use_cache=False, **given)[0]
    with modlab.record_routing(model) as recording:
        some: dict[str, Any] = {}
        hook = model.model.register_forward_hook(lambda m, a, output: some.update(x=output[0]))
        model(IDS, use_cache=False, logits_to_keep=1, **given)
        hook.remove()
    for row, at in enumerate(last):
        assert recording.steps[0].keep[5][row].nonzero()[:, 0].tolist() == [at]
        assert close(some["x"][row, at], full[row, at])


def test_tokens_may_be_asked_for_by_their_places() -> None:
    model = converted()
    places = torch.tensor([3, 17])
    found = model(IDS, logits_to_keep=places, use_cache=False).logits
    assert close(found, model(IDS, use_cache=False).logits[:, places])


@pytest.mark.parametrize("places", [np.int64(3), [2, 9], slice(4, 30, 5), torch.arange(40) % 7 == 0, -36])
@pytest.mark.parametrize("skip", ["prompt", "kv+prompt"])
def test_places_may_have_any_form_that_the_dense_model_takes(skip: Any, places: Any) -> None:
    """A number of numpy's is a place to transformers, not how many of the latest."""
    model = converted() if skip == "prompt" else with_both()
    full, dense = model(IDS, use_cache=False).logits, dense_llama()
    numbers = torch.arange(40)[slice(-places, None) if type(places) is int else places]
    assert dense(IDS, logits_to_keep=places).logits.shape == full[:, numbers].shape
    for use_cache in (False, True):
        assert close(model(IDS, logits_to_keep=places, use_cache=use_cache).logits, full[:, numbers])


def with_both() -> Any:
    config = modlab.MoDConfig(skip="kv+prompt", gates="kv_head", keep_recent=5, layers="all")
    return scatter_gates(modlab.convert(dense_llama(), config), 4.0).eval()


@pytest.mark.parametrize("skip", ["prompt", "kv+prompt"])
def test_a_forward_that_is_stopped_asks_nothing_of_the_next(skip: Any) -> None:
    """Torch calls no hook at a module's end where Ctrl-C ends it."""
    model = converted() if skip == "prompt" else with_both()
    want = model.model(IDS).last_hidden_state

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    handle = model.model.layers[5].mlp.register_forward_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        model(IDS, attention_mask=MASK, logits_to_keep=1)
    handle.remove()
    assert close(model.model(IDS).last_hidden_state, want), "all hidden states are wanted of the decoder"


def generated(model: Any, ids: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    return model.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0, eos_token_id=None, **kwargs)


@pytest.mark.parametrize("kind", ["gemma2", "gpt_oss", "opt", "mixtral", "diffllama", "cohere2"])
def test_other_architectures_leave_as_exactly(kind: str) -> None:
    """Softcaps, sinks, learned positions, experts, halves of heads, sliding layers."""
    model = modlab.convert(tiny_model(kind), modlab.MoDConfig(skip="prompt", leave_after=0.5)).eval()
    for name, parameter in model.named_parameters():
        if ".mod_" in name:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    ids, mask = IDS[:2, :17] % 50 + 3, torch.ones(2, 17, dtype=torch.long)
    mask[1, :4] = 0
    full = model(ids, attention_mask=mask, use_cache=False).logits[:, -1:]
    assert close(model(ids, attention_mask=mask, use_cache=True, logits_to_keep=1).logits, full)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", ["greedy", "beams", "chunks", "left"])
def test_it_generates_what_the_full_computation_says(kind: str, how: str) -> None:
    model = converted(kind)
    extra: dict[str, Any] = {"beams": {"num_beams": 3}, "chunks": {"prefill_chunk_size": 16}}.get(how, {})
    mask = MASK if how == "left" else torch.ones_like(MASK)
    made = generated(model, IDS, attention_mask=mask, **extra)
    if how == "beams":
        with torch.no_grad():
            full = generated(model, IDS, attention_mask=mask, use_cache=False, num_beams=3)
        assert torch.equal(made, full)
        return
    whole = torch.cat([mask, torch.ones(3, 8, dtype=mask.dtype)], 1)
    logits = model(made, attention_mask=whole, use_cache=False, **positions(whole)).logits
    assert torch.equal(logits[:, 39:-1].argmax(-1), made[:, 40:])


def test_a_prefill_goes_on() -> None:
    model = converted()
    first = model(IDS[:, :25], use_cache=True, logits_to_keep=1)
    cache = given_cache(first)
    assert cache.kept_tokens.eq(25).all()
    second = model(IDS[:, 25:], past_key_values=cache, logits_to_keep=2)
    assert close(second.logits, model(IDS, use_cache=False).logits[:, -2:])


def test_drafts_are_checked_as_they_are_read() -> None:
    model, assistant = converted(), dense_llama(num_hidden_layers=2)
    assert torch.equal(generated(model, IDS[:1], assistant_model=assistant), generated(model, IDS[:1]))


def test_an_override_says_who_goes_on() -> None:
    model = converted()
    with modlab.routing_override(model, lambda layer, gate, position: position % 2 == 0):
        found = model(IDS, use_cache=False).logits
        with masked_execution(model):
            assert close(found, model(IDS, use_cache=False).logits)
    full = model(IDS, use_cache=False).logits
    assert close(found[:, ::2], full[:, ::2]) and not close(found[:, 1::2], full[:, 1::2])
    with modlab.routing_override(model, lambda layer, gate, position: position < 0):
        nobody = model(IDS, use_cache=False, output_hidden_states=True)
    assert torch.equal(nobody.hidden_states[4], nobody.hidden_states[5])


def test_hidden_states_and_losses_are_those_of_all_tokens() -> None:
    model = converted()
    full = model(IDS, use_cache=False, output_hidden_states=True, logits_to_keep=1)
    assert not torch.equal(full.hidden_states[4][:, 0], full.hidden_states[5][:, 0])
    loss = model(IDS, labels=IDS, use_cache=False).loss
    logits = model(IDS, use_cache=False).logits
    by_hand = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())
    assert torch.allclose(loss, by_hand, atol=1e-5)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("rank", [0, 4])
def test_projections_learn_and_nothing_else(rank: int, checkpointing: bool) -> None:
    model = converted(leave_rank=rank)
    if checkpointing:
        model.gradient_checkpointing_enable()
    assert learnt(model, IDS) == added(model)


def test_no_gate_is_trained_or_calibrated() -> None:
    model, rows = converted(), [{"input_ids": row} for row in IDS]
    plan = {"steps": 1, "batch_size": 3, "num_workers": 0, "mixed_precision": "no"}
    modlab.train(model, rows, modlab.TrainConfig(freeze_base=True, **plan))
    with changes(model) as changed:
        modlab.train(model, rows, modlab.TrainConfig(objective="distil", **plan))
    assert changed == added(model)
    with pytest.raises(modlab.ModlabError, match="'target' does not fit skip='prompt', where no gate"):
        modlab.train(model, rows, modlab.TrainConfig(objective="target", **plan))


def test_a_distillation_asks_for_no_keep_ratio() -> None:
    """All tokens of training run all layers: nothing is late, and there is no target to be late for."""
    plan = {"steps": 8, "batch_size": 3, "num_workers": 0, "mixed_precision": "no", "log_every": 1}
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="The gates keep")
        result = modlab.train(
            converted(), [{"input_ids": row} for row in IDS], modlab.TrainConfig(objective="distil", **plan)
        )
    assert set(result.history["keep_ratio"]) == {1.0} and "target" not in result.history


def test_projections_learn_at_the_rate_of_the_base() -> None:
    model = modlab.convert(dense_llama(), modlab.MoDConfig(skip="kv+prompt"))
    groups = parameter_groups(model, modlab.TrainConfig(steps=1, lr=1e-4, router_lr=1e-2))
    own = dict(model.named_parameters())
    rates = {id(p): group for group in groups for p in group["params"]}
    for name, parameter in own.items():
        group = rates[id(parameter)]
        assert group["peak_lr"] == (1e-2 if "mod_router" in name else 1e-4)
        assert group["weight_decay"] == 0 or ".mod_" not in name


def test_gradients_are_those_of_the_full_computation_under_checkpointing() -> None:
    def gradients(checkpointing: bool) -> dict[str, torch.Tensor]:
        model = converted().train()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model(IDS, labels=IDS).loss.backward()
        return {n: p.grad for n, p in model.named_parameters()}

    plain, checked = gradients(False), gradients(True)
    zeros = {n for n, g in plain.items() if g is None or not g.any()}
    assert zeros == {f"model.layers.{i}.self_attn.{p}_proj.weight" for i in (4, 5) for p in "qkv"}
    assert all(torch.allclose(g, checked[n], atol=1e-6) for n, g in plain.items() if n not in zeros)


@pytest.mark.parametrize("rank", [0, 4])
def test_it_is_saved_in_one_small_file_and_loaded(rank: int, tmp_path) -> None:
    model = converted(leave_rank=rank, leave_after=0.5)
    model.save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    again, _ = modlab.load(tmp_path / "model")
    assert torch.equal(again(IDS).logits, model(IDS).logits)
    card = (tmp_path / "model" / "README.md").read_text()
    assert "upper layers, by position" in card and "all but the last of each row" in card


def test_it_is_traced_and_measured(word_tokenizer) -> None:
    model = converted()
    trace = modlab.trace(model, word_tokenizer, "w1 w2 w3 w4 w5 w6 w7 w8 w9")
    assert trace.layers == [4, 5] and trace.kv_saving == 1 and trace.to_html()
    assert evaluate(model, [{"input_ids": IDS}]).keep_ratio == 1, "a loss needs all tokens"


def test_thresholds_mean_nothing_and_are_refused(tmp_path: Path) -> None:
    model, rows = converted(), torch.randint(3, 60, (2, 24))
    before = dict(model.mod.thresholds)
    for use in (
        lambda: modlab.set_threshold(model, 0.3),
        lambda: modlab.calibrate(model, rows, keep_ratio=0.5),
        lambda: modlab.sweep(model, None, rows, [0.3]),
    ):
        with pytest.raises(modlab.ModlabError, match="'prompt' no gate decides"):
            use()
    assert model.mod.thresholds == before
    model.save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    assert modlab.load(tmp_path)[0].mod.thresholds == before


def test_what_it_cannot_do_is_refused() -> None:
    with pytest.raises(modlab.ModlabError, match="q_proj, k_proj, v_proj apart"):
        modlab.convert(
            GPT2LMHeadModel(GPT2Config(n_layer=4, n_head=2, n_embd=32)), modlab.MoDConfig(skip="prompt")
        )
    with pytest.raises(modlab.ModlabError, match="computes the logits of all tokens of a prompt"):
        modlab.convert(tiny_model("trocr"), modlab.MoDConfig(skip="prompt"))
    for wrong in (
        *({"layers": [3]}, {"operator": "topk"}, {"gate": "fused"}),
        *({"p": 0.3}, {"keep_first": 0}, {"init_gate": 0.5}, {"router_hidden": 4}),
    ):
        with pytest.raises(modlab.ModlabError, match="leave_after"):
            modlab.MoDConfig(skip="prompt", **wrong)
    for wrong in ({"leave_after": 1.0}, {"leave_rank": -1}):
        with pytest.raises(modlab.ModlabError, match=next(iter(wrong))):
            modlab.MoDConfig(**wrong)
    for skip in ("kv", "layer", "attention", "mlp", "written", "sublayers"):
        for wrong in ({"leave_after": 0.5}, {"leave_rank": 2}):
            with pytest.raises(modlab.ModlabError, match="means nothing there, only with skip='prompt' or"):
                modlab.MoDConfig(skip=skip, **wrong)
    with pytest.raises(modlab.ModlabError, match="capacity is what operator='topk' keeps"):
        modlab.MoDConfig(capacity=0.5)
    one = dense_llama(num_hidden_layers=1)
    with pytest.raises(modlab.ModlabError, match="two decoder layers"):
        modlab.convert(one, modlab.MoDConfig(skip="prompt"))
    model = converted()
    attention = model.model.layers[5].self_attn
    assert isinstance(attention, ProjectedAttention) and tiny_config().num_hidden_layers == 6
    with pytest.raises(modlab.ModlabError, match="called past its layer"):
        attention(torch.zeros(1, 3, 64), position_embeddings=None, attention_mask=None)


@pytest.mark.parametrize("skip", ["prompt", "kv+prompt"])
def test_reentrant_checkpointing_is_refused(skip: Any) -> None:
    """Layers that share a state cannot go back one by one."""
    model = modlab.convert(make("llama"), modlab.MoDConfig(skip=skip)).train()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(ModlabError, match='"use_reentrant": False'):
        model(input_ids=IDS, labels=IDS, use_cache=False)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
    assert model.model.layers[-1].mod_projections.k_proj.weight.grad.any()
