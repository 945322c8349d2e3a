"""Fast generation where routers leave out attention or MLP alone: the same tokens, K/V of kept tokens only,
and no work for the others.
"""

from __future__ import annotations

import functools
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import AttentionInterface

import modlab
from modlab.engine import step as step_module
from modlab.engine.attention import DECODE, decode_attention_function
from modlab.engine.prefill import prefill
from modlab.errors import ModlabError
from modlab.execution.routed import RoutedBranch, RoutedModule
from modlab.families.tiny_models import tiny_model
from modlab.hf.anatomy import attention_name, decoder_layers, mlp_name
from modlab.hf.cache_argument import cache_argument
from tests.helpers.fast_generation import (
    DEVICE,
    NEW,
    LayersOnly,
    both_ways,
    generated,
    llama_on_device,
    masks_of_two_rows,
    prompts,
    stored_at_thresholds,
)
from tests.helpers.models import alternate_layers

SUBLAYERS = {"attention": "self_attn", "mlp": "mlp"}
"""What `MoDConfig.skip` names, and what Llama calls it."""


@pytest.mark.parametrize("skip", SUBLAYERS)
@pytest.mark.parametrize("gate", ["straight-through", "fused", "paper"])
@pytest.mark.parametrize("lengths", [(1,), (17,), (30, 3, 12)], ids=str)
def test_same_tokens_as_the_ordinary_path(skip: str, gate: str, lengths: tuple[int, ...]) -> None:
    last = both_ways(llama_on_device(gate=gate, skip=skip), prompts(*lengths), max_new_tokens=20)
    assert last["prompt_tokens"] == list(lengths)


@pytest.mark.parametrize("skip", SUBLAYERS)
@pytest.mark.parametrize(
    "settings",
    [
        {"do_sample": True, "temperature": 0.7, "top_k": 20},
        {"repetition_penalty": 1.3},
        {"num_return_sequences": 3, "do_sample": True},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_same_tokens_under_settings_of_generate(skip: str, settings: dict[str, Any]) -> None:
    both_ways(llama_on_device(skip=skip), prompts(11, 6), max_new_tokens=20, **settings)


@pytest.mark.parametrize("skip", SUBLAYERS)
@pytest.mark.parametrize("kept", ["all", "none", "some", "rows"])
def test_a_routing_table_decides_prompt_and_new_tokens(skip: str, kept: str) -> None:
    model, inputs = llama_on_device(skip=skip), prompts(14, 6)
    masks = masks_of_two_rows(model, kept, 14 + NEW)
    with modlab.routing_override(model, modlab.RoutingTable(masks)):
        last = both_ways(model, inputs, eos_token_id=None)
    seen = [14 + NEW - 1, 6 + NEW - 1]
    for layer in range(6):
        stored = [int(masks[layer][row, :n].sum()) for row, n in enumerate(seen)] if layer in masks else seen
        assert last["kept_tokens"][layer] == (seen if skip == "mlp" else stored)


@pytest.mark.parametrize("skip", SUBLAYERS)
@pytest.mark.parametrize(
    "model_type",
    ["mistral", "qwen2", "qwen3", "phi3", "phi", "gpt_neox", "gpt2", "olmo2", "mixtral", "qwen2_moe"],
)
def test_other_families_generate_the_same_tokens(model_type: str, skip: Any) -> None:
    model: Any = tiny_model(model_type)
    if getattr(model.config, "sliding_window", None):
        model.config.sliding_window = None
        model = type(model)(model.config).eval()
    modlab.convert(model, alternate_layers(skip=skip))
    model = model.to(DEVICE)
    generator = torch.Generator().manual_seed(4)
    mask = torch.rand(1, 80, generator=generator) < 0.5
    with modlab.routing_override(model, modlab.RoutingTable(dict.fromkeys(model.mod.layers, mask))):
        vocabulary = model.get_input_embeddings().weight.shape[0]
        both_ways(model, prompts(13, 5, vocabulary=vocabulary), eos_token_id=None, max_new_tokens=12)


@pytest.mark.parametrize(
    ("model_type", "name"),
    [("qwen2_moe", "mlp"), ("olmoe", "mlp"), ("granitemoe", "block_sparse_moe"), ("mixtral", "mlp")],
)
def test_attention_called_after_a_mixture_of_experts_is_no_mlp(model_type: str, name: str) -> None:
    layer = decoder_layers(tiny_model(model_type))[1]
    assert (attention_name(layer), mlp_name(layer)) == ("self_attn", name)


@pytest.mark.parametrize("name", ["default", "speed", "memory"])
def test_recipes_have_fast_generation(make_llama: Any, name: str) -> None:
    dense = make_llama(num_hidden_layers=8).to(DEVICE)
    config, _ = modlab.recipe(name, dense, tokens=1000)
    both_ways(modlab.convert(dense, config), prompts(13, 5))


@pytest.mark.parametrize("skip", SUBLAYERS)
def test_caches_hold_what_the_ordinary_ones_hold(skip: str) -> None:
    """Kept tokens of every layer and row; bytes of the buffers, with growth beyond the first slack."""
    model, inputs = llama_on_device(skip=skip), prompts(20, 9)
    cache = modlab.RaggedCache(model)
    want = generated(model, inputs, max_new_tokens=60, eos_token_id=None, **{cache_argument(model): cache})
    modlab.enable_fast_generation(model, compile=False)
    assert generated(model, inputs, max_new_tokens=60, eos_token_id=None) == want
    last = modlab.fast_generation_report(model)["last"]
    ordinary, seen = cache.kept_tokens.tolist(), [20 + 59, 9 + 59]
    for layer, kept in enumerate(last["kept_tokens"]):
        ragged = skip == "attention" and layer in model.mod.layers
        assert kept == (ordinary[layer] if ragged else seen)
        assert not ragged or sum(kept) < sum(seen), "this routing should skip something"
    token = 2 * 2 * 16 * 4 + 4  # K and V of 2 heads of 16 in fp32, and the column
    kept_bytes = sum(map(sum, last["kept_tokens"])) * token
    slack = sum(max(16, n // 32) for row in last["kept_tokens"] for n in row) * token
    assert kept_bytes <= last["kv_bytes"] <= kept_bytes + slack


@pytest.mark.skipif(DEVICE.type != "cpu", reason="on a GPU a first generate also warms up and captures")
@pytest.mark.parametrize("skip", SUBLAYERS)
def test_no_row_is_computed_for_a_skipped_token(skip: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = llama_on_device(skip=skip), prompts(30, 3, 12)
    run: dict[tuple[str, int], int] = {}
    for part, linear in (("attention", "self_attn.q_proj"), ("mlp", "mlp.up_proj")):
        for index, layer in enumerate(model.model.layers):
            counted = layer.get_submodule(linear)
            monkeypatch.setattr(counted, "forward", _counting(run, (part, index), counted.forward))
    modlab.enable_fast_generation(model, compile=False, check=False)
    with torch.no_grad():
        prefill(model.__dict__["mod_engine"], inputs["input_ids"], inputs["attention_mask"])
    ran = {part: [run.get((part, index), 0) for index in range(6)] for part in SUBLAYERS}
    other = "mlp" if skip == "attention" else "attention"
    assert ran[other] == [45] * 6
    decided = _kept_in_a_prompt(model, inputs)
    assert ran[skip] == [decided.get(index, 45) for index in range(6)]
    assert sum(decided.values()) < 45 * len(decided), "this routing should skip something"


def _counting(run: dict[Any, int], name: Any, forward: Any) -> Any:
    def counted(x: torch.Tensor) -> torch.Tensor:
        run[name] = run.get(name, 0) + x.shape[:-1].numel()
        return forward(x)

    return counted


def _kept_in_a_prompt(model: Any, inputs: dict[str, torch.Tensor]) -> dict[int, int]:
    with modlab.record_routing(model) as recording, torch.no_grad():
        model(**inputs)
    return {layer: int(keep.sum()) for layer, keep in recording.steps[0].keep.items()}


@pytest.mark.parametrize("skip", SUBLAYERS)
def test_a_decoding_step_that_every_row_skips_runs_no_sublayer(
    skip: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, inputs = llama_on_device(skip=skip), prompts(9, 6)
    modlab.set_threshold(model, 0.999)
    want = generated(model, inputs, eos_token_id=None)
    modlab.enable_fast_generation(model, compile=False)
    sublayer: Any = type(model.model.layers[1].get_submodule(SUBLAYERS[skip]))
    calls, dense = [0], sublayer.dense_class.forward

    def counting(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls[0] += isinstance(self, RoutedModule)
        return dense(self, *args, **kwargs)

    monkeypatch.setattr(sublayer.dense_class, "forward", functools.wraps(dense)(counting))
    assert generated(model, inputs, eos_token_id=None) == want
    if DEVICE.type == "cpu":
        assert calls[0] == len(model.mod.layers), "once each, for the first tokens of the prompt"


def test_a_layer_that_runs_its_mlp_twice_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """One decision sets one IF node."""
    model = llama_on_device(skip="mlp")
    dense_class: Any = model.model.layers[1].dense_class
    forward = dense_class.forward

    def twice(self: Any, hidden_states: torch.Tensor, **kwargs: Any) -> Any:
        return forward(self, hidden_states + self.mlp(hidden_states), **kwargs)

    monkeypatch.setattr(dense_class, "forward", twice)
    with pytest.raises(ModlabError, match="LlamaMLP more than once"):
        modlab.enable_fast_generation(model, compile=False)


def test_thresholds_are_live() -> None:
    model, inputs = llama_on_device(skip="attention"), prompts(25)
    modlab.enable_fast_generation(model, compile=False)
    totals = stored_at_thresholds(model, inputs, (0.2, 0.5, 0.8, 0.2))
    assert totals[0] > totals[1] > totals[2] and totals[3] == totals[0]


@pytest.mark.parametrize("skip", SUBLAYERS)
def test_the_model_is_left_as_it_was(skip: str) -> None:
    """Classes, forwards and attributes, after a generation and after one that was interrupted."""

    def interrupt(_ids: Any, _scores: Any, **_kwargs: Any) -> Any:
        raise KeyboardInterrupt

    model, inputs = llama_on_device(skip=skip), prompts(9, 4)
    sublayer = model.model.layers[1].get_submodule(SUBLAYERS[skip])
    sublayer.__dict__["forward"] = own = sublayer.forward  # as accelerate does
    before = [(type(module), set(module.__dict__)) for module in model.modules()]
    want = generated(model, inputs)
    modlab.enable_fast_generation(model, compile=False)
    with pytest.raises(KeyboardInterrupt):
        generated(model, inputs, stopping_criteria=[interrupt])
    assert generated(model, inputs) == want
    modlab.disable_fast_generation(model)
    assert [(type(module), set(module.__dict__)) for module in model.modules()] == before
    assert sublayer.__dict__["forward"] is own


def test_a_hook_on_a_sublayer_is_respected() -> None:
    model, inputs = llama_on_device(skip="attention"), prompts(9, 6)
    modlab.enable_fast_generation(model, compile=False)
    seen: list[int] = []
    hook = model.model.layers[1].self_attn.register_forward_hook(lambda _m, _a, _out: seen.append(1))
    generated(model, inputs, max_new_tokens=3, eos_token_id=None)
    assert len(seen) == 3 and "hook" in modlab.fast_generation_report(model)["last"]["why"]
    hook.remove()
    generated(model, inputs, max_new_tokens=3)
    assert modlab.fast_generation_report(model)["last"]["fast"]


def test_threads_take_turns() -> None:
    model = llama_on_device(skip="attention")
    modlab.enable_fast_generation(model, compile=False)
    inputs = [prompts(9, 6, seed=seed) for seed in range(4)]
    want = [generated(model, batch, max_new_tokens=12) for batch in inputs]
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(4) as pool:
            got = list(pool.map(lambda batch: generated(model, batch, max_new_tokens=12), inputs))
    finally:
        sys.setswitchinterval(before)
    assert got == want and modlab.fast_generation_report(model)["last"]["fast"]
    assert isinstance(model.model.layers[1].self_attn, RoutedBranch)


@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a GPU")
@pytest.mark.parametrize("skip", SUBLAYERS)
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("compile", [False, True])
def test_on_a_gpu_steps_are_graphs_with_if_nodes(skip: str, rows: int, compile: bool) -> None:
    model, inputs = llama_on_device(skip=skip), prompts(*[50] * rows)
    want = generated(model, inputs, eos_token_id=None)
    modlab.enable_fast_generation(model, compile=compile)
    assert generated(model, inputs, eos_token_id=None) == want
    report = modlab.fast_generation_report(model)
    assert report["branch"] in ("torch", "cuda-python") and report["compiled"] == compile
    assert report["batch_sizes"] == [rows]


@pytest.mark.skipif(DEVICE.type != "cpu", reason="runs compiled steps from the host")
@pytest.mark.parametrize("skip", SUBLAYERS)
def test_a_layer_is_compiled_around_its_sublayer_once_for_all(
    skip: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A deeper model of the same layers compiles nothing more."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=counter))
    compiler = LayersOnly(enabled=True)
    monkeypatch.setattr(step_module, "Compiler", lambda enabled: compiler)
    inputs = prompts(9, 4)
    graphs = []
    for depth in (3, 6):
        model = llama_on_device(skip=skip, num_hidden_layers=depth)
        everything = dict.fromkeys(model.mod.layers, torch.ones(1, 1, dtype=torch.bool))
        with modlab.routing_override(model, modlab.RoutingTable(everything)):
            want = generated(model, inputs, max_new_tokens=4, eos_token_id=None)
            modlab.enable_fast_generation(model, compile=False, check=False)
            # the reference attention of a CPU reads buffers of all sizes: each would be compiled again
            opaque = torch.compiler.disable(decode_attention_function)
            monkeypatch.setitem(AttentionInterface._global_mapping, DECODE, opaque)
            assert generated(model, inputs, max_new_tokens=4, eos_token_id=None) == want
        graphs.append(counter.frame_count)
    assert graphs[0] == graphs[1] > 2
