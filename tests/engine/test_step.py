"""Tokens chosen inside the step, and the compiled parts of a step: the same tokens, with less to launch."""

from __future__ import annotations

import functools
from typing import Any, ClassVar

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
from modlab.engine.branch import Branch
from modlab.engine.choice import MAX_ENDS, Choice, choose
from modlab.engine.compiled import Compiler, outside_layers
from modlab.engine.step import Step
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
    use_engine,
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
    assert all(not step.tables.buffers for step in model.__dict__["mod_engine"].steps.values())
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
        {"stopping_criteria": [MaxTimeCriteria(1e9)]},
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
    verbosity = logging.get_verbosity()
    logging.set_verbosity_warning()  # whatever ran before in this process
    try:
        for fast in (False, True):
            if fast:
                modlab.enable_fast_generation(model, compile=False)
            caplog.clear()
            type(logger).warning_once.cache_clear()
            generated(model, inputs, max_new_tokens=10, eos_token_id=None)
            assert any("predefined maximum length (16)" in r.message for r in caplog.records), fast
    finally:
        logging.set_verbosity(verbosity)
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
def test_what_stands_outside_the_layers_is_found_by_structure(model_type: str, names: set[str]) -> None:
    model = tiny_model(model_type)
    layers = modlab.hf.anatomy.decoder_layers(model)
    assert set(outside_layers(decoder_of(model), layers)) == names


@pytest.fixture
def quick_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.compile without the machine code: what it traces and how it treats writes, in little time."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))


class PartsOnly(Compiler):
    """Compiles what stands outside the layers; those, with the reference attention of a CPU, take long."""

    def layer(self, function: Any) -> Any:
        return function


def compiled_generation(
    model: Any, inputs: dict[str, torch.Tensor], compile: bool | str = False, **kwargs: Any
) -> tuple[list[list[int]], Compiler]:
    """`generated`, every step run by the host through its compiled parts; and the compiler."""
    compiler = PartsOnly(enabled=True)
    use_engine(model, compiler=lambda enabled: compiler).compile = compile
    return generated(model, inputs, **kwargs), compiler


@pytest.mark.usefixtures("quick_compile")
def test_compiled_steps_give_the_same_tokens() -> None:
    model, inputs = llama_on_device(num_hidden_layers=2), prompts(10, 5)
    ends = [generated(model, inputs, eos_token_id=None)[0][10 + 4]]
    want = generated(model, inputs, eos_token_id=ends, max_new_tokens=8)
    got, compiler = compiled_generation(model, inputs, eos_token_id=ends, max_new_tokens=8)
    assert got == want
    assert not compiler.eager and set(compiler.whole_functions) == {"norm", "rotary_emb", "choice of tokens"}


@pytest.mark.usefixtures("quick_compile")
def test_a_part_that_does_not_compile_runs_as_it_is() -> None:
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
    got, compiler = compiled_generation(model, inputs, max_new_tokens=5)
    assert got == want
    assert set(compiler.eager) == {"norm"} and compiler.eager["norm"]


class Capturing(Branch):
    """Any way of branching for which a step is captured."""

    name = "capturing"


class Uncompiled(Step):
    """A step that can be captured, of layers that do not compile."""

    captures: ClassVar[list[Any]] = []

    def capture(self, batch: int) -> None:
        self.captures.append(self.engine.compile)
        if self.engine.compile:
            raise torch._dynamo.exc.Unsupported("a builtin it does not know\nsecond line")


def test_layers_that_do_not_compile_are_captured_as_they_are() -> None:
    model = llama_on_device()
    engine = use_engine(model, make_step=Uncompiled)
    engine.branch, engine.compile = Capturing(), True
    captures = Uncompiled.captures
    captures.clear()
    with pytest.warns(UserWarning, match="without torch.compile"):
        engine.step(2)
    report = modlab.fast_generation_report(model)
    assert captures == [True, False] and not report["compiled"]
    assert report["uncompiled"] == {"layers": "a builtin it does not know second line"}


@pytest.mark.usefixtures("quick_compile")
def test_parts_outside_the_layers_can_be_left_out() -> None:
    model, inputs = llama_on_device(num_hidden_layers=2), prompts(10, 5)
    _, compiler = compiled_generation(model, inputs, compile="layers", max_new_tokens=3)
    assert set(compiler.whole_functions) == {"choice of tokens"}


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
    step = use_engine(model).step(1)
    assert step.is_current()
    model.model.rotary_emb.inv_freq = model.model.rotary_emb.inv_freq * 0.5
    assert not step.is_current()


@pytest.mark.parametrize("part", ["lm_head", "model.layers.1.mlp.up_proj", "model.norm"])
def test_a_weight_that_is_replaced_makes_a_step_stale(make_llama: Any, part: str) -> None:
    model = make_llama().to(DEVICE)
    step = use_engine(model).step(1)
    module = model.get_submodule(part)
    module.weight = torch.nn.Parameter(module.weight.detach().clone())
    assert not step.is_current()


def test_a_caller_under_autocast_goes_the_ordinary_way() -> None:
    """Its types would stay in a captured step, and the next caller's keys be read as what they are not."""
    model, inputs = llama_on_device(), prompts(9, 4)
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        want = generated(model, inputs, max_new_tokens=3)
        modlab.enable_fast_generation(model, compile=False)
        assert generated(model, inputs, max_new_tokens=3) == want
    assert "autocast" in modlab.fast_generation_report(model)["last"]["why"]


def test_steps_of_the_latest_batch_sizes_are_kept(make_llama: Any) -> None:
    engine = use_engine(make_llama().to(DEVICE), max_steps=2)
    steps = [engine.step(rows) for rows in (1, 2, 1, 3)]
    assert steps[0] is steps[2] and list(engine.steps) == [1, 3]
    assert engine.step(1) is steps[0] and engine.step(2) is not steps[1]
