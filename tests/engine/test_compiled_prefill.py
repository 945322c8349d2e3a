"""Layers of a prefill by torch.compile: one graph for all of them and all lengths; nothing else changes."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaMLP

import modlab
from modlab.engine import attention as attention_module
from modlab.engine import compiled_layers, prefill_layers
from modlab.engine.compiled_layers import LAYERS, LEAST_TOKENS, MLPS, LineLayers
from modlab.engine.prefill import prefill
from modlab.families.tiny_models import tiny_model
from modlab.kernels.launch import KernelRefused
from modlab.routing.state import routing_override
from tests.helpers.fast_generation import DEVICE, generated, llama_on_device, prompts
from tests.helpers.models import alternate_layers, dense_llama, leaving_llama

pytestmark = pytest.mark.skipif(DEVICE.type == "cuda", reason="on a GPU the step is compiled too")

LENGTHS = (300, 301, 512, 17)


@pytest.fixture
def compiles(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], CompileCounterWithBackend]:
    """Has a backend compile lines of 16 tokens and more, nothing kept from before; gives what counts its
    graphs."""

    def use(backend: Any = "aot_eager") -> CompileCounterWithBackend:
        torch._dynamo.reset()
        counter = CompileCounterWithBackend(backend)
        monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=counter))
        monkeypatch.setattr(compiled_layers, "LEAST_TOKENS", 16)
        return counter

    return use


def switch_on(model: Any) -> Any:
    """Fast generation with compiled prefills on a machine where nothing else is compiled; the engine."""
    modlab.enable_fast_generation(model, compile=False)
    engine = model.__dict__["mod_engine"]
    engine.compile = True
    return engine


def not_compiled(model: Any) -> dict[str, str]:
    return modlab.fast_generation_report(model)["uncompiled"]


MODELS: dict[str, Callable[[], Any]] = {
    "dense": lambda: dense_llama().to(DEVICE),
    "layer": lambda: llama_on_device(skip="layer"),
    "fused gate": lambda: llama_on_device(skip="layer", gate="fused"),
    "kv": lambda: llama_on_device(skip="kv"),
    "kv, a gate a head": lambda: llama_on_device(skip="kv", gates="kv_head"),
    "kv in eight bits": lambda: llama_on_device(skip="kv", kv_cache_dtype="int8"),
    "kv+prompt": lambda: leaving_llama("kv+prompt").to(DEVICE),
}


@pytest.mark.parametrize("kind", MODELS)
def test_one_graph_for_all_layers_and_lengths(kind: str, compiles: Any) -> None:
    model, counter = MODELS[kind](), compiles()
    batches = [*map(prompts, LENGTHS), prompts(40, 3, 22)]
    want = [generated(model, batch, max_new_tokens=4) for batch in batches]
    switch_on(model)
    assert [generated(model, batch, max_new_tokens=4) for batch in batches] == want
    assert modlab.fast_generation_report(model)["last"]["fast"] and not not_compiled(model)
    assert counter.frame_count == 1


@pytest.mark.parametrize("kind", ["layer", "kv"])
def test_how_many_tokens_are_kept_makes_no_further_graph(kind: str, compiles: Any) -> None:
    """Nor do one token, and none."""
    model, counter = MODELS[kind](), compiles()
    engine, ids = switch_on(model), prompts(48)["input_ids"]
    for kept in (48, 17, 32, 2, 1, 0):
        mask = torch.arange(48)[None] < kept
        with (
            torch.no_grad(),
            routing_override(model, modlab.RoutingTable(dict.fromkeys(model.mod.layers, mask))),
        ):
            logits, buffers, _ = prefill(engine, ids, None)
            engine.compile = False
            want, plain, _ = prefill(engine, ids, None)
            engine.compile = True
        assert torch.equal(logits, want)
        assert [buffer.lengths for buffer in buffers] == [buffer.lengths for buffer in plain]
        for a, b in zip(buffers, plain, strict=True):
            (first, *_), (n, *_) = a.starts, a.lengths
            assert torch.equal(a.keys[:, first : first + n], b.keys[:, first : first + n])
    assert counter.frame_count == 1 and not not_compiled(model)


@pytest.mark.parametrize("kind", ["kv", "kv, a gate a head", "kv+prompt"])
@pytest.mark.parametrize(("tokens", "beside"), [(40, True), (39, False)])
def test_routers_of_long_lines_run_next_to_projections(
    kind: str, tokens: int, beside: bool, compiles: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And attention waits for them before it asks who is kept."""
    model, _, told = MODELS[kind](), compiles(), []

    @contextlib.contextmanager
    def noted(device: torch.device) -> Iterator[None]:
        told.append("aside")
        yield
        told.append("decided")

    monkeypatch.setattr(prefill_layers, "ASIDE_TOKENS", 40)
    monkeypatch.setattr(prefill_layers, "aside", noted)
    monkeypatch.setattr(attention_module, "rejoin", lambda device: told.append("rejoined"))
    engine = switch_on(model)
    with torch.no_grad():
        prefill(engine, prompts(tokens)["input_ids"], None)
    assert ("aside" in told) == beside and "rejoined" in told
    decided = [at for at, what in enumerate(told) if what == "decided"]
    assert len(decided) == beside * len(model.mod.layers)
    assert all("rejoined" in told[at:] for at in decided), "nobody waited for the latest decision"


@pytest.mark.parametrize("kind", ["dense", "layer", "kv"])
def test_mlps_of_long_lines_run_in_pieces(kind: str, compiles: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled too: a graph for the layers around them, and one for the pieces of whichever length."""
    pieces: list[int] = []
    whole = LineLayers.run_mlp

    def noted(self: LineLayers, mlp: Any, x: Tensor) -> Any:
        pieces.append(x.shape[1])
        return whole(self, mlp, x)

    monkeypatch.setattr(prefill_layers, "MLP_CHUNK", 32)
    monkeypatch.setattr(LineLayers, "run_mlp", noted)
    model, counter = MODELS[kind](), compiles()
    batches = [prompts(100), prompts(97), prompts(129), prompts(60, 45)]
    want = [generated(model, batch, max_new_tokens=4) for batch in batches]
    switch_on(model)
    assert generated(model, batches[0], max_new_tokens=4) == want[0]
    graphs = counter.frame_count
    assert [generated(model, batch, max_new_tokens=4) for batch in batches[1:]] == want[1:]
    assert pieces and max(pieces) <= 32 and len(set(pieces)) > 2
    # torch runs what it has compiled in another state the first time, and compiles what is called there again
    assert graphs == counter.frame_count <= 3 and not not_compiled(model)


class TupleMLP(LlamaMLP):
    """Returns more than the state, as mixtures of experts do."""

    def forward(self, x: Tensor) -> Any:
        return super().forward(x), None


class TupleLayer(LlamaDecoderLayer):
    """Takes the first of what its MLP returns, which of a tensor would be its only row."""

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        hidden_states = hidden_states + self.self_attn(self.input_layernorm(hidden_states), **kwargs)[0]
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))[0]


def test_an_mlp_that_returns_more_than_a_tensor_runs_in_no_piece(
    compiles: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prefill_layers, "MLP_CHUNK", 32)
    model, _ = MODELS["dense"](), compiles()
    for layer in model.model.layers:
        layer.__class__, layer.mlp.__class__ = TupleLayer, TupleMLP
    want = generated(model, prompts(50), max_new_tokens=4)
    switch_on(model)
    assert generated(model, prompts(50), max_new_tokens=4) == want
    assert "more than a tensor" in not_compiled(model)[LAYERS]


def test_the_papers_gate_stands_in_hooks_and_those_layers_run_as_they_are(compiles: Any) -> None:
    model, counter = llama_on_device(skip="layer", gate="paper"), compiles()
    want = [generated(model, prompts(n), max_new_tokens=4) for n in (60, 41)]
    ran = []
    for layer in model.mod.layers:
        inside = model.model.layers[layer].mlp.down_proj
        inside.forward = lambda x, own=inside.forward: ran.append(torch.compiler.is_compiling()) or own(x)
    switch_on(model)
    assert [generated(model, prompts(n), max_new_tokens=4) for n in (60, 41)] == want
    assert counter.frame_count == 1 and ran and not any(ran)


def refusing(error: type[Exception]) -> Callable[[Any, Any], Any]:
    def backend(graph: Any, inputs: Any) -> Any:
        raise error("no compiler here")

    return backend


@pytest.mark.parametrize("kind", MODELS)
def test_what_does_not_compile_runs_as_it_is(kind: str, compiles: Any) -> None:
    model, counter = MODELS[kind](), compiles(refusing(RuntimeError))
    batches = [prompts(60), prompts(41, 30)]
    want = [generated(model, batch, max_new_tokens=4) for batch in batches]
    switch_on(model)
    assert [generated(model, batch, max_new_tokens=4) for batch in batches] == want
    assert "no compiler here" in not_compiled(model)[LAYERS] and counter.frame_count == 1


def test_a_layer_that_asks_for_the_number_of_tokens_is_no_graph_for_each(
    compiles: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, counter = MODELS["kv"](), compiles()
    mlp_class = type(model.model.layers[0].mlp)
    forward = mlp_class.forward

    def counting(self: Any, x: Tensor) -> Tensor:
        for _ in range(x.shape[1] // 100):
            x = x + 0
        return forward(self, x)

    monkeypatch.setattr(mlp_class, "forward", counting)
    want = [generated(model, prompts(n), max_new_tokens=4) for n in (160, 250, 341)]
    switch_on(model)
    assert [generated(model, prompts(n), max_new_tokens=4) for n in (160, 250, 341)] == want
    assert counter.frame_count <= 3


@pytest.mark.parametrize("inside", [False, True])
def test_a_lack_of_memory_is_no_reason_to_go_uncompiled(
    inside: bool, compiles: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any) -> Any:
        raise torch.OutOfMemoryError("full")

    model = MODELS["dense"]()
    compiles("aot_eager" if inside else refusing(torch.OutOfMemoryError))
    engine = switch_on(model)
    if inside:
        monkeypatch.setattr(attention_module, "varlen_attention", full)
    with pytest.raises((torch.OutOfMemoryError, torch._dynamo.exc.TorchDynamoException)):
        prefill(engine, prompts(60)["input_ids"], None)
    assert not not_compiled(model)


def test_a_refused_kernel_says_so_through_the_graph(compiles: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*args: Any) -> Any:
        raise KernelRefused("too small a GPU")

    model, _ = MODELS["dense"](), compiles()
    engine = switch_on(model)
    monkeypatch.setattr(attention_module, "varlen_attention", refused)
    with pytest.raises(KernelRefused, match="too small"):
        prefill(engine, prompts(60)["input_ids"], None)
    assert not not_compiled(model)


@pytest.mark.parametrize("kind", ["layer", "kv"])
def test_an_error_within_a_graph_that_ran_is_met_by_running_the_line_again(
    kind: str, compiles: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Layers have stored their keys by then; each is stored once in the end."""
    calls: list[int] = []
    whole = attention_module.attend_line

    def failing(*args: Any) -> Any:
        calls.append(1)
        if len(calls) == 4:
            raise RuntimeError("once")
        return whole(*args)

    model, _ = MODELS[kind](), compiles()
    want = generated(model, prompts(60), max_new_tokens=4)
    switch_on(model)
    monkeypatch.setattr(prefill_layers, "attend_line", failing)
    assert generated(model, prompts(60), max_new_tokens=4) == want
    assert "once" in not_compiled(model)[LAYERS]
    assert modlab.fast_generation_report(model)["last"]["prompt_tokens"] == [60]


def test_short_lines_and_other_settings_compile_no_layer(
    compiles: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, counter = MODELS["kv"](), compiles()
    engine = switch_on(model)
    monkeypatch.setattr(compiled_layers, "LEAST_TOKENS", LEAST_TOKENS)
    prefill(engine, prompts(LEAST_TOKENS - 1)["input_ids"], None)
    for setting in (False, "layers"):
        engine.compile = setting
        prefill(engine, prompts(LEAST_TOKENS)["input_ids"], None)
    assert counter.frame_count == 0
    engine.compile = True
    prefill(engine, prompts(LEAST_TOKENS)["input_ids"], None)
    assert counter.frame_count == 1


def test_a_forward_that_somebody_put_on_a_layer_is_run(compiles: Any) -> None:
    model, _ = MODELS["dense"](), compiles()
    layer, seen = model.model.layers[2], []
    own = layer.forward
    layer.forward = lambda *args, **kwargs: seen.append(1) or own(*args, **kwargs)
    engine = switch_on(model)
    seen.clear()
    prefill(engine, prompts(60)["input_ids"], None)
    assert seen == [1] and layer.__dict__["forward"] is not own


@pytest.mark.parametrize("piece", [32, 1024], ids=["in-pieces", "at-once"])
def test_a_forward_that_somebody_put_on_an_mlp_runs(
    piece: int, compiles: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prefill_layers, "MLP_CHUNK", piece)
    model, _ = MODELS["dense"](), compiles()
    mlp = model.model.layers[2].mlp
    own = mlp.forward
    mlp.forward = lambda x: 2 * own(x)
    want = generated(model, prompts(60), max_new_tokens=4)
    switch_on(model)
    assert generated(model, prompts(60), max_new_tokens=4) == want


def test_two_threads_generate_on_two_models(compiles: Any) -> None:
    compiles()
    models = [MODELS["kv"](), MODELS["layer"]()]
    batches = [prompts(n) for n in (60, 97, 41)]
    want = [[generated(m, batch, max_new_tokens=4) for batch in batches] for m in models]
    for model in models:
        switch_on(model)
    with ThreadPoolExecutor(2) as pool:
        got = list(pool.map(lambda m: [generated(m, batch, max_new_tokens=4) for batch in batches], models))
    assert got == want


@pytest.mark.parametrize("model_type", ["qwen3", "phi3", "gpt2", "mixtral"])
def test_other_families_have_one_graph_too(model_type: str, compiles: Any) -> None:
    model, counter = tiny_model(model_type), compiles()
    modlab.convert(model, alternate_layers(skip="kv", keep_recent=5))
    vocabulary = model.get_input_embeddings().weight.shape[0]
    batches = [prompts(n, vocabulary=vocabulary) for n in (40, 57)]
    want = [generated(model, batch, max_new_tokens=4) for batch in batches]
    switch_on(model)
    assert [generated(model, batch, max_new_tokens=4) for batch in batches] == want
    assert counter.frame_count == 1 and not not_compiled(model)
    assert MLPS not in not_compiled(model)


@pytest.mark.parametrize("what", ["attention", "layers", "model"])
def test_modules_that_a_user_compiles_run_in_a_prefill(what: str) -> None:
    """What torch.compile traces then is no layer of the engine's."""
    model = modlab.convert(dense_llama(), alternate_layers(skip="kv", keep_recent=4))
    ids = torch.randint(3, 500, (1, 12), generator=torch.Generator().manual_seed(0))
    want = model.generate(ids, max_new_tokens=4, do_sample=False)
    modlab.enable_fast_generation(model)
    for layer in model.model.layers:
        if what == "attention":
            layer.self_attn.compile(backend="eager")
        elif what == "layers":
            layer.compile(backend="eager")
    if what == "model":
        model.forward = torch.compile(model.forward, backend="eager")
    assert torch.equal(model.generate(ids, max_new_tokens=4, do_sample=False), want)
    assert modlab.fast_generation_report(model)["last"]["fast"]
