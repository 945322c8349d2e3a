"""Fast generation in each of its forms, one for each thing that routers can decide about: the same tokens as
the ordinary path, K/V of stored tokens only, and no work for skipped ones.

Whole layers have more tests in `test_engine.py`.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import AttentionInterface

import modlab
from modlab import skips
from modlab.engine.attention import DECODE, decode_attention_function
from modlab.engine.forms import form_of
from modlab.engine.prefill import prefill
from modlab.engine.ring import RingBuffer
from modlab.errors import ModlabError
from modlab.execution.routed import RoutedBranch, RoutedKeys, RoutedModule
from modlab.families.tiny_models import tiny_model
from modlab.hf.anatomy import attention_name, decoder_layers, mlp_name
from modlab.hf.names import cache_argument
from modlab.skips.layer import LayerSkip
from tests.helpers.fast_generation import (
    DEVICE,
    NEW,
    SETTINGS,
    LayersOnly,
    both_ways,
    generated,
    llama_on_device,
    masks_of_two_rows,
    prompts,
    stored_at_thresholds,
    use_engine,
)
from tests.helpers.models import alternate_layers, dense_llama, leaving_llama

SKIPS = ["layer", "attention", "mlp", "kv"]
SUBLAYERS = {"attention": "self_attn", "mlp": "mlp"}
"""What `MoDConfig.skip` names, and what Llama calls it."""

RECENT = 4
"""`keep_recent` of these models."""

TOKEN = 2 * 2 * 16 * 4
"""Bytes of K and V of 2 heads of 16 in fp32."""


def stored_of(skip: str, keep: Tensor, seen: int) -> int:
    """Tokens that a routed layer stores of a row whose first `seen` tokens it has run."""
    if skip == "mlp":
        return seen
    kept = int(keep[:seen].sum())
    return kept if skip != "kv" else RECENT + int(keep[: seen - RECENT].sum())


def test_every_skip_has_a_form_of_its_own() -> None:
    forms = [form_of(llama_on_device(skip=skip).mod) for skip in SKIPS]
    forms.append(form_of(None))  # a dense model has one too
    assert None not in forms and len(set(forms)) == len(forms)


class Unheard(LayerSkip):
    """Whole layers, for which the engine is said to have no form."""

    name = "unheard"

    def why_no_engine(self, config: modlab.MoDConfig) -> str:
        return "nobody has written its form"


def test_a_skip_without_a_form_runs_without_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(skips._REGISTERED, "unheard", Unheard())
    model, inputs = llama_on_device(skip="unheard"), prompts(9, 4)
    want = generated(model, inputs)
    with pytest.warns(UserWarning, match="nobody has written its form"):
        modlab.enable_fast_generation(model, compile=False)
    assert generated(model, inputs) == want
    last = modlab.fast_generation_report(model)["last"]
    assert last == {"fast": False, "why": "nobody has written its form"}


@pytest.mark.parametrize("lengths", [(1,), (17,), (30, 3, 12)], ids=str)
@pytest.mark.parametrize(
    ("skip", "fields"),
    [
        *((skip, {"gate": gate}) for skip in SUBLAYERS for gate in ("straight-through", "fused", "paper")),
        *(("kv", {"keep_recent": recent}) for recent in (1, RECENT, 16, 200)),
        *(("kv", {"keep_recent": recent, "gates": "kv_head"}) for recent in (1, RECENT, 16, 200)),
        *((skip, {"router_hidden": 5}) for skip in SKIPS),
        ("kv", {"router_hidden": 5, "gates": "kv_head"}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(map(str, value.values())),
)
def test_same_tokens_as_the_ordinary_path(
    skip: str, fields: dict[str, Any], lengths: tuple[int, ...]
) -> None:
    model = llama_on_device(skip=skip, **fields)
    last = both_ways(model, prompts(*lengths), eos_token_id=None)
    assert last["prompt_tokens"] == list(lengths)


@pytest.mark.parametrize("skip", SKIPS[1:])
@pytest.mark.parametrize(
    "settings",
    SETTINGS,
    ids=lambda settings: next(iter(settings)),
)
def test_same_tokens_under_settings_of_generate(skip: str, settings: dict[str, Any]) -> None:
    both_ways(llama_on_device(skip=skip), prompts(11, 6), max_new_tokens=20, **settings)


@pytest.mark.parametrize("skip", SKIPS)
@pytest.mark.parametrize("kept", ["all", "none", "some", "rows"])
def test_a_routing_table_decides_prompt_and_new_tokens(skip: str, kept: str) -> None:
    """And what is stored in the end is what the form says, no more."""
    model, inputs = llama_on_device(skip=skip), prompts(14, 6)
    masks = masks_of_two_rows(model, kept, 14 + NEW)
    with modlab.routing_override(model, modlab.RoutingTable(masks)):
        last = both_ways(model, inputs, eos_token_id=None)
    seen = [14 + NEW - 1, 6 + NEW - 1]
    for layer in range(6):
        routed = (
            [stored_of(skip, masks[layer][row], n) for row, n in enumerate(seen)] if layer in masks else seen
        )
        assert last["kept_tokens"][layer] == routed


@pytest.mark.parametrize("skip", SKIPS[1:])
@pytest.mark.parametrize(
    "model_type",
    ["mistral", "qwen2", "qwen3", "phi3", "phi", "gpt_neox", "gpt2", "olmo2", "mixtral", "qwen2_moe"],
)
def test_other_families_generate_the_same_tokens(model_type: str, skip: Any) -> None:
    model: Any = tiny_model(model_type)
    if getattr(model.config, "sliding_window", None):
        model.config.sliding_window = None
        model = type(model)(model.config).eval()
    modlab.convert(model, alternate_layers(skip=skip, keep_recent=5))
    model = model.to(DEVICE)
    mask = torch.rand(1, 80, generator=torch.Generator().manual_seed(4)) < 0.5
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


@pytest.mark.parametrize("name", ["default", "layers", "memory"])
def test_recipes_have_fast_generation(make_llama: Any, name: str) -> None:
    dense = make_llama(num_hidden_layers=8).to(DEVICE)
    config, _ = modlab.recipe(name, dense, tokens=1000)
    both_ways(modlab.convert(dense, config), prompts(13, 5))


@pytest.mark.parametrize("skip", SKIPS)
def test_buffers_hold_what_the_ordinary_cache_holds(skip: str) -> None:
    """Tokens of every layer and row; bytes of the buffers, with growth beyond the first slack."""
    model, inputs = llama_on_device(skip=skip), prompts(60, 20)
    cache = modlab.RaggedCache(model)
    settings = {"max_new_tokens": 90, "eos_token_id": None}
    want = generated(model, inputs, **settings, **{cache_argument(model): cache})
    modlab.enable_fast_generation(model, compile=False)
    assert generated(model, inputs, **settings) == want
    last = modlab.fast_generation_report(model)["last"]
    ordinary, seen = cache.kept_tokens.tolist(), [60 + 89, 20 + 89]
    stored = slack = 0
    for layer, kept in enumerate(last["kept_tokens"]):
        routed = layer in model.mod.layers
        if not routed or skip == "mlp":
            assert kept == seen
        else:
            assert sum(kept) < sum(seen), "this routing should skip something"
            swept_late = skip == "kv"  # the ordinary cache drops tokens now and then, a ring at once
            assert all(a <= b if swept_late else a == b for a, b in zip(kept, ordinary[layer], strict=True))
        ring = routed and skip == "kv"
        one = TOKEN + (0 if ring else 4)  # its column
        stored += sum(kept) * one + (2 * RECENT if ring else 0)  # a ring has a flag for each of its tokens
        slack += sum(max(16, n // 32) for n in kept) * one
    assert stored <= last["kv_bytes"] <= stored + slack


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
    def counted(x: Tensor) -> Tensor:
        run[name] = run.get(name, 0) + x.shape[:-1].numel()
        return forward(x)

    return counted


def _kept_in_a_prompt(model: Any, inputs: dict[str, Tensor]) -> dict[int, int]:
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

    def twice(self: Any, hidden_states: Tensor, **kwargs: Any) -> Any:
        return forward(self, hidden_states + self.mlp(hidden_states), **kwargs)

    monkeypatch.setattr(dense_class, "forward", twice)
    with pytest.raises(ModlabError, match="LlamaMLP more than once"):
        modlab.enable_fast_generation(model, compile=False)


@pytest.mark.parametrize("skip", ["attention", "kv"])
def test_thresholds_are_live(skip: str) -> None:
    model, inputs = llama_on_device(skip=skip), prompts(25)
    modlab.enable_fast_generation(model, compile=False)
    totals = stored_at_thresholds(model, inputs, (0.2, 0.5, 0.8, 0.2))
    assert totals[0] > totals[1] > totals[2] and totals[3] == totals[0]


@pytest.mark.parametrize("skip", SKIPS[1:])
def test_the_model_is_left_as_it_was(skip: str) -> None:
    """Classes, forwards and attributes, after a generation and after one that was interrupted."""

    def interrupt(_ids: Any, _scores: Any, **_kwargs: Any) -> Any:
        raise KeyboardInterrupt

    model, inputs = llama_on_device(skip=skip), prompts(9, 4)
    sublayer, own = model.model.layers[1].get_submodule(SUBLAYERS.get(skip, "mlp")), None
    if skip in SUBLAYERS:
        sublayer.__dict__["forward"] = own = sublayer.forward  # as accelerate does
    before = [(type(module), set(module.__dict__)) for module in model.modules()]
    want = generated(model, inputs)
    modlab.enable_fast_generation(model, compile=False)
    with pytest.raises(KeyboardInterrupt):
        generated(model, inputs, stopping_criteria=[interrupt])
    assert isinstance(model.model.layers[1].self_attn, RoutedKeys) == (skip == "kv")
    assert generated(model, inputs) == want
    modlab.disable_fast_generation(model)
    assert [(type(module), set(module.__dict__)) for module in model.modules()] == before
    assert sublayer.__dict__.get("forward") is own


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


@pytest.mark.parametrize("skip", ["attention", "kv"])
def test_threads_take_turns(skip: str) -> None:
    model = llama_on_device(skip=skip)
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
@pytest.mark.parametrize("skip", SKIPS[1:])
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("compile", [False, True])
def test_on_a_gpu_steps_are_graphs(skip: str, rows: int, compile: bool) -> None:
    model, inputs = llama_on_device(skip=skip), prompts(*[50] * rows)
    want = generated(model, inputs, eos_token_id=None)
    modlab.enable_fast_generation(model, compile=compile)
    assert generated(model, inputs, eos_token_id=None) == want
    report = modlab.fast_generation_report(model)
    assert report["branch"] in ("torch", "cuda-python") and report["compiled"] == compile
    assert report["batch_sizes"] == [rows]


@pytest.fixture
def compiled_frames(monkeypatch: pytest.MonkeyPatch) -> Callable[[nn.Module], int]:
    """Generates with a model, its layers compiled, checks the tokens; how many frames torch.compile has made
    since the test began."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=counter))
    # the reference attention of a CPU reads buffers of all sizes, for which it would be compiled again
    opaque = torch.compiler.disable(decode_attention_function)
    compiler, inputs = LayersOnly(enabled=True), prompts(9, 4)

    def frames(model: Any) -> int:
        want = generated(model, inputs, max_new_tokens=4, eos_token_id=None)
        use_engine(model, compiler=lambda enabled: compiler)
        monkeypatch.setitem(AttentionInterface._global_mapping, DECODE, opaque)
        assert generated(model, inputs, max_new_tokens=4, eos_token_id=None) == want
        return counter.frame_count

    return frames


@pytest.mark.skipif(DEVICE.type != "cpu", reason="runs compiled steps from the host")
@pytest.mark.parametrize("skip", SUBLAYERS)
def test_a_layer_is_compiled_around_its_sublayer_once_for_all(
    skip: str, compiled_frames: Callable[[nn.Module], int]
) -> None:
    """A deeper model of the same layers compiles nothing more."""
    frames = []
    for depth in (3, 6):
        model = llama_on_device(skip=skip, num_hidden_layers=depth)
        everything = dict.fromkeys(model.mod.layers, torch.ones(1, 1, dtype=torch.bool))
        with modlab.routing_override(model, modlab.RoutingTable(everything)):
            frames.append(compiled_frames(model))
    assert frames[0] == frames[1] > 2


@pytest.mark.skipif(DEVICE.type != "cpu", reason="runs compiled steps from the host")
def test_where_the_cache_alone_is_routed_layers_are_compiled_like_dense_ones(
    make_llama: Any, compiled_frames: Callable[[nn.Module], int]
) -> None:
    dense = compiled_frames(make_llama().to(DEVICE))
    routed = [compiled_frames(llama_on_device(skip="kv", num_hidden_layers=depth)) for depth in (3, 6)]
    assert routed[0] == routed[1] <= 2 * dense, (
        "no more pieces than a dense layer, whose class is another one"
    )


@pytest.mark.skipif(DEVICE.type != "cpu", reason="runs compiled steps from the host")
@pytest.mark.parametrize("skip", ["prompt", "kv+prompt"])
def test_layers_that_prompts_leave_out_are_compiled_once_for_all(
    skip: str, compiled_frames: Callable[[nn.Module], int]
) -> None:
    frames = [
        compiled_frames(leaving_llama(skip, dense=dense_llama(num_hidden_layers=depth), leave_after=0.3))
        for depth in (6, 9)
    ]
    assert frames[0] == frames[1] > 2


# The cache alone


@pytest.mark.parametrize("recent", [1, 4, 9])
def test_padding_between_tokens_is_no_part_of_the_recent_past(recent: int) -> None:
    model, inputs = llama_on_device(skip="kv", keep_recent=recent), prompts(19, 12)
    inputs["attention_mask"][0, 6:11] = 0
    inputs["attention_mask"][1, 13] = 0
    last = both_ways(model, inputs, eos_token_id=None)
    assert last["prompt_tokens"] == [14, 11]


@pytest.mark.parametrize("skip", SKIPS[1:])
def test_rows_beyond_one_line_run_in_further_lines(skip: str) -> None:
    model, inputs = llama_on_device(skip=skip), prompts(12, 7, 9, 5)
    results = []
    for line_tokens in (1000, 20):
        use_engine(model, line_tokens=line_tokens)
        tokens = generated(model, inputs, eos_token_id=None)
        results.append((tokens, modlab.fast_generation_report(model)["last"]["kept_tokens"]))
    assert results[0] == results[1]


def test_a_prompt_is_laid_out_as_a_ring_and_older_kept_tokens() -> None:
    model, inputs = llama_on_device(skip="kv"), prompts(13, 3)
    keep = torch.rand(2, 13, generator=torch.Generator().manual_seed(0)) < 0.5
    engine = use_engine(model)
    buffers = {}
    for name, table in (("routed", keep), ("all", torch.ones_like(keep))):
        with modlab.routing_override(model, modlab.RoutingTable(dict.fromkeys(model.mod.layers, table))):
            buffers[name] = prefill(engine, inputs["input_ids"], inputs["attention_mask"])[1][1]
    ring, everything = buffers["routed"], buffers["all"]
    assert isinstance(ring, RingBuffer) and isinstance(everything, RingBuffer)
    for row, n in enumerate((13, 3)):
        size = min(n, RECENT)
        older = [p for p in range(n - size) if keep[row, p]]
        assert ring.lengths[row] == size + len(older) and everything.lengths[row] == n
        places = {p: p % 4 for p in range(n - size, n)} | {p: 4 + i for i, p in enumerate(older)}
        whole = {p: p % 4 if p >= n - size else 4 + p for p in range(n)}
        for p, place in places.items():  # the first routed layer's keys do not depend on its own routing
            want = everything.keys[:, everything.starts[row] + whole[p]]
            torch.testing.assert_close(ring.keys[:, ring.starts[row] + place], want)
            if place < 4:
                assert bool(ring.ring_kept[row, place]) == bool(keep[row, p])
    assert not ring.ring_kept[1, 3], "a place that is not in use"
