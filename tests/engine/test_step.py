"""Tokens chosen inside the step, and the compiled parts of a step: the same tokens, with less to launch."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import nn
from transformers import MaxTimeCriteria
from transformers.generation.stopping_criteria import (
    EosTokenCriteria,
    MaxLengthCriteria,
    StoppingCriteriaList,
)
from transformers.generation.streamers import BaseStreamer

import modlab
from modlab.engine import engine as engine_module
from modlab.engine import step as step_module
from modlab.engine.branch import Branch
from modlab.engine.choice import MAX_ENDS, Choice, choose
from modlab.engine.compiled import Compiler, beside_layers
from modlab.errors import ModlabError
from modlab.families.tiny_models import tiny_model
from modlab.hf.anatomy import decoder_of
from tests.helpers.fast_generation import (
    DEVICE,
    NEW,
    both_ways,
    generated,
    llama_on_device,
    prompts,
)


class Collect(BaseStreamer):
    """Everything that a streamer is given; `after` pieces it interrupts."""

    def __init__(self, after: int | None = None) -> None:
        self.pieces: list[list[int]] = []
        self.ended, self.after = False, after

    def put(self, value: Any) -> None:
        if self.after is not None and len(self.pieces) == self.after:
            raise KeyboardInterrupt
        self.pieces.append(value.flatten().tolist())

    def end(self) -> None:
        self.ended = True


@pytest.mark.parametrize("rows", [1, 5])
def test_choosing_follows_the_loop_of_transformers(rows: int) -> None:
    """Against the lines of `GenerationMixin._sample`, over many steps of random logits."""
    generator = torch.Generator().manual_seed(rows)
    ends, pad = [3, 7, 11], 5
    choice = Choice.on(DEVICE, rows)
    for target, values in choice.rules(ends, pad):
        target.copy_(torch.tensor(values).view_as(target))
    unfinished = torch.ones(rows, dtype=torch.long, device=DEVICE)
    criterion = EosTokenCriteria(ends)
    for _ in range(200):
        logits = torch.randn(rows, 40, generator=generator).to(DEVICE)
        choose(logits, choice)
        want = logits.argmax(-1) * unfinished + pad * (1 - unfinished)
        unfinished = unfinished & ~criterion(want[:, None], None)  # type: ignore[arg-type]
        assert choice.token[:, 0].tolist() == want.tolist()
        assert choice.finished.tolist() == (unfinished == 0).tolist()
        assert choice.news.tolist() == [int(unfinished.max() == 0), *want.tolist()]
    assert not unfinished.any(), "every row should have ended"


@pytest.mark.parametrize("pad", [0, 9], ids=["pad-0", "pad-9"])
def test_rows_end_apart_by_several_end_tokens(pad: int) -> None:
    model, inputs = llama_on_device(), prompts(10, 5, 8)
    tokens = generated(model, inputs, eos_token_id=None)
    ends = [tokens[0][10 + 4], tokens[1][10 + 9], tokens[2][10 + 15], 511]
    want = generated(model, inputs, eos_token_id=ends, pad_token_id=pad)
    assert len({next(i for i in range(10, 50) if row[i] in ends) for row in want}) > 1, (
        "rows should end apart"
    )
    last = both_ways(model, inputs, eos_token_id=ends, pad_token_id=pad)
    assert last["tokens_chosen"] == "in the step"
    assert last["new_tokens"] == len(want[0]) - 10 < NEW


def test_an_end_token_that_is_the_padding() -> None:
    model, inputs = llama_on_device(), prompts(10, 5)
    end = generated(model, inputs, eos_token_id=None)[0][10 + 3]
    assert both_ways(model, inputs, eos_token_id=end, pad_token_id=end)["tokens_chosen"] == "in the step"


def test_the_first_token_may_be_the_end() -> None:
    model, inputs = llama_on_device(), prompts(10)
    end = generated(model, inputs, eos_token_id=None)[0][10]
    assert both_ways(model, inputs, eos_token_id=end)["new_tokens"] == 1


@pytest.mark.parametrize("new", [1, 2, 17])
def test_the_length_is_the_limit(new: int) -> None:
    model, inputs = llama_on_device(), prompts(10, 4)
    last = both_ways(model, inputs, eos_token_id=None, max_new_tokens=new)
    assert last["new_tokens"] == new and last["tokens_chosen"] == "in the step"
    # K/V of the newest token is never needed: the steps run are one fewer than the tokens
    assert last["kept_tokens"][0] == [10 + new - 1, 4 + new - 1]


def test_a_streamer_gets_every_token_once() -> None:
    model, inputs = llama_on_device(), prompts(7)
    end = generated(model, inputs, eos_token_id=None)[0][7 + 12]
    modlab.enable_fast_generation(model, compile=False)
    streamer = Collect()
    got = generated(model, inputs, eos_token_id=end, streamer=streamer)
    assert modlab.fast_generation_report(model)["last"]["tokens_chosen"] == "in the step"
    assert streamer.ended
    assert [token for piece in streamer.pieces for token in piece] == got[0]
    assert got[0][-1] == end and [len(piece) for piece in streamer.pieces[1:]] == [1] * (len(got[0]) - 7)


def test_after_an_interrupt_the_next_generation_starts_afresh() -> None:
    model, inputs = llama_on_device(), prompts(9, 6)
    ends = [generated(model, inputs, eos_token_id=None)[0][9 + 3]]
    want = generated(model, inputs, eos_token_id=None)
    modlab.enable_fast_generation(model, compile=False)
    with pytest.raises(KeyboardInterrupt):
        streamer: Any = Collect(after=8)  # row 0 has finished by then
        generated(model, {k: v[:1] for k, v in inputs.items()}, eos_token_id=ends, streamer=streamer)
        generated(model, inputs, eos_token_id=None, stopping_criteria=[_interrupt])
    assert all(not step.tables.caches for step in model.__dict__["mod_engine"].steps.values())
    assert generated(model, inputs, eos_token_id=None) == want


def _interrupt(ids: torch.Tensor, _scores: Any, **_kwargs: Any) -> Any:
    if ids.shape[1] > 15:
        raise KeyboardInterrupt
    return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)


class OwnEnd(EosTokenCriteria):
    """A user's own subclass, which may do anything."""


@pytest.mark.parametrize(
    "settings",
    [
        {"do_sample": True},
        {"repetition_penalty": 1.2},
        {"stopping_criteria": [MaxTimeCriteria(600.0)]},
        {"stopping_criteria": [OwnEnd(3)]},
        {"eos_token_id": list(range(3, 4 + MAX_ENDS))},
    ],
    ids=["sampling", "processor", "time", "subclass", "many-ends"],
)
def test_what_a_step_cannot_choose_is_chosen_on_the_host(settings: dict[str, Any]) -> None:
    assert both_ways(llama_on_device(), prompts(8, 5), **settings)["tokens_chosen"] == "on the host"


def test_users_criteria_of_the_known_kinds_stay_in_the_step() -> None:
    model, inputs = llama_on_device(), prompts(8, 5)
    tokens = generated(model, inputs, eos_token_id=None)
    criteria = StoppingCriteriaList([EosTokenCriteria(tokens[0][8 + 6]), MaxLengthCriteria(8 + 20)])
    last = both_ways(model, inputs, stopping_criteria=criteria, pad_token_id=0)
    assert last["tokens_chosen"] == "in the step" and last["new_tokens"] <= 20


def test_rows_beyond_the_context_are_warned_of_as_ever(make_llama: Any, caplog: Any) -> None:
    from transformers.utils import logging

    model, inputs = make_llama(max_position_embeddings=16).to(DEVICE), prompts(12)
    logger = logging.get_logger("transformers.generation.stopping_criteria")
    logging.enable_propagation()
    try:
        for fast in (False, True):
            if fast:
                modlab.enable_fast_generation(model, compile=False)
            caplog.clear()
            type(logger).warning_once.cache_clear()
            generated(model, inputs, max_new_tokens=10, eos_token_id=None)
            assert any("predefined maximum length (16)" in r.message for r in caplog.records), fast
    finally:
        logging.disable_propagation()


# The compiled parts of a step.


@pytest.mark.parametrize(
    ("model_type", "names"),
    [
        ("llama", {"norm", "rotary_emb"}),
        ("gpt_neox", {"final_layer_norm", "rotary_emb"}),
        ("gpt2", {"ln_f"}),
        ("opt", {"final_layer_norm"}),
        ("phi", {"final_layernorm", "rotary_emb"}),
        ("mixtral", {"norm", "rotary_emb"}),
    ],
)
def test_what_stands_beside_the_layers_is_found_by_structure(model_type: str, names: set[str]) -> None:
    model = tiny_model(model_type)
    layers = modlab.hf.anatomy.decoder_layers(model)
    assert set(beside_layers(decoder_of(model), layers)) == names


@pytest.fixture
def quick_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.compile without the machine code: what it traces and how it treats writes, in little time."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))


class PartsOnly(Compiler):
    """Compiles what stands beside the layers; those, with the reference attention of a CPU, take long."""

    def layer(self, function: Any) -> Any:
        return function


def compiled_generation(model: Any, inputs: dict[str, torch.Tensor], monkeypatch: Any, **kwargs: Any) -> Any:
    """`generated`, every step run by the host through its compiled parts; and the compiler."""
    compiler = PartsOnly(enabled=True)
    modlab.enable_fast_generation(model, compile=False)
    monkeypatch.setattr(step_module, "Compiler", lambda enabled: compiler)
    return generated(model, inputs, **kwargs), compiler


@pytest.mark.usefixtures("quick_compile")
def test_compiled_steps_give_the_same_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = llama_on_device(num_hidden_layers=2), prompts(10, 5)
    ends = [generated(model, inputs, eos_token_id=None)[0][10 + 4]]
    want = generated(model, inputs, eos_token_id=ends, max_new_tokens=8)
    got, compiler = compiled_generation(model, inputs, monkeypatch, eos_token_id=ends, max_new_tokens=8)
    assert got == want
    assert not compiler.eager and set(compiler._whole) == {"norm", "rotary_emb", "choice of tokens"}


@pytest.mark.usefixtures("quick_compile")
def test_a_part_that_does_not_compile_runs_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    class Stubborn(nn.Module):
        """A norm that asks the host, which no whole graph can hold."""

        def __init__(self, norm: nn.Module) -> None:
            super().__init__()
            self.norm = norm

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.norm(x) if float(x.sum()) < 1e9 else x

    model, inputs = llama_on_device(num_hidden_layers=2), prompts(10, 5)
    model.model.norm = Stubborn(model.model.norm)
    want = generated(model, inputs, max_new_tokens=5)
    got, compiler = compiled_generation(model, inputs, monkeypatch, max_new_tokens=5)
    assert got == want
    assert set(compiler.eager) == {"norm"} and compiler.eager["norm"]


class Capturing(Branch):
    """Any way of branching for which a step is captured."""

    name = "capturing"


def test_layers_that_do_not_compile_are_captured_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    model = llama_on_device()
    modlab.enable_fast_generation(model, compile=False)
    engine = model.__dict__["mod_engine"]
    engine.branch, engine.compile = Capturing(), True
    captures: list[bool] = []

    def capture(step: Any, batch: int) -> None:
        captures.append(engine.compile)
        if engine.compile:
            raise torch._dynamo.exc.Unsupported("a builtin it does not know\nsecond line")

    monkeypatch.setattr(step_module.Step, "_capture", capture)
    with pytest.warns(UserWarning, match="without torch.compile"):
        step_module.Step(engine, 2)
    report = modlab.fast_generation_report(model)
    assert captures == [True, False] and not report["compiled"]
    assert report["uncompiled"] == {"layers": "a builtin it does not know second line"}


@pytest.mark.usefixtures("quick_compile")
def test_parts_beside_the_layers_can_be_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = llama_on_device(num_hidden_layers=2), prompts(10, 5)
    modlab.enable_fast_generation(model, compile=False)
    model.__dict__["mod_engine"].compile = "layers"
    compiler = PartsOnly(enabled=True)
    monkeypatch.setattr(step_module, "Compiler", lambda enabled: compiler)
    generated(model, inputs, max_new_tokens=3)
    assert set(compiler._whole) == {"choice of tokens"}


def test_what_compile_takes(make_llama: Any) -> None:
    with pytest.raises(ModlabError, match="True, False or 'layers'"):
        modlab.enable_fast_generation(make_llama(), compile="everything")


# What a step takes for granted.


def test_a_step_made_in_inference_mode_serves_outside_of_it() -> None:
    model, inputs = llama_on_device(), prompts(9, 4)
    want = generated(model, inputs)
    modlab.enable_fast_generation(model, compile=False)
    with torch.inference_mode():
        assert generated(model, inputs) == want
    assert generated(model, inputs) == want
    with torch.inference_mode():
        assert generated(model, inputs) == want


@pytest.mark.parametrize("part", ["model", "model.norm", "model.embed_tokens", "lm_head", ""])
def test_a_hook_anywhere_is_respected(part: str) -> None:
    model, inputs = llama_on_device(), prompts(9, 6)
    modlab.enable_fast_generation(model, compile=False)
    shapes: list[int] = []
    hook = model.get_submodule(part).register_forward_hook(lambda _m, _a, _out: shapes.append(1))
    generated(model, inputs, max_new_tokens=3, eos_token_id=None)
    assert len(shapes) == 3 and "hook" in modlab.fast_generation_report(model)["last"]["why"]
    hook.remove()
    generated(model, inputs, max_new_tokens=3)
    assert modlab.fast_generation_report(model)["last"]["fast"]


def test_hooks_that_transformers_leaves_behind_do_not_matter() -> None:
    """Its recorders of hidden states stay in a model that was once asked for some."""
    model, inputs = llama_on_device(), prompts(9, 6)
    model(**inputs, output_hidden_states=True)
    model.enable_input_require_grads()
    modules = list(model.modules())
    before = [list(module._forward_hooks) for module in modules]
    assert any(module._forward_hooks for module in model.model.layers), "transformers should leave hooks"
    assert both_ways(model, inputs)["fast"]
    assert [list(module._forward_hooks) for module in modules] == before
    states = model(**inputs, output_hidden_states=True).hidden_states
    assert len(states) == 7


def test_a_tracker_of_kv_bytes_sees_the_cache() -> None:
    model, inputs = llama_on_device(), prompts(9)
    modlab.enable_fast_generation(model, compile=False)
    with modlab.KVTracker(model) as tracker:
        generated(model, inputs, max_new_tokens=4, eos_token_id=None)
    assert tracker.summary()["steps"] == 4


def test_tables_that_are_replaced_make_a_step_stale(make_llama: Any) -> None:
    """A captured graph reads the rotary frequencies where they were."""
    model = make_llama().to(DEVICE)
    modlab.enable_fast_generation(model, compile=False)
    step = step_module.Step(model.__dict__["mod_engine"], 1)
    assert step.is_current()
    model.model.rotary_emb.inv_freq = model.model.rotary_emb.inv_freq * 0.5
    assert not step.is_current()


def test_a_caller_under_autocast_goes_the_ordinary_way() -> None:
    """Its types would stay in a captured step, and the next caller's keys be read as what they are not."""
    model, inputs = llama_on_device(), prompts(9, 4)
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        want = generated(model, inputs, max_new_tokens=3)
        modlab.enable_fast_generation(model, compile=False)
        assert generated(model, inputs, max_new_tokens=3) == want
    assert "autocast" in modlab.fast_generation_report(model)["last"]["why"]


def test_steps_of_the_latest_batch_sizes_are_kept(make_llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_module, "MAX_STEPS", 2)
    model = make_llama().to(DEVICE)
    modlab.enable_fast_generation(model, compile=False)
    engine = model.__dict__["mod_engine"]
    steps = [engine.step(rows) for rows in (1, 2, 1, 3)]
    assert steps[0] is steps[2] and list(engine.steps) == [1, 3]
    assert engine.step(1) is steps[0] and engine.step(2) is not steps[1]
