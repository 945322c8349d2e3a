"""Fast generation: the same tokens as the ordinary path, no work for skipped tokens, and clear refusals.

On a machine with a GPU the same tests run there, through CUDA graphs and the Triton kernels.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM, Phi3Config, Phi3ForCausalLM
from transformers.generation.streamers import BaseStreamer

import modlab
from modlab.engine import loop, switch
from modlab.engine.branch import Branch
from modlab.engine.choice import best_token
from modlab.engine.prefill import lines
from modlab.engine.step import Step
from modlab.errors import ModlabError
from modlab.families.tiny_models import tiny_model
from modlab.hf.names import cache_argument
from modlab.kernels import launch
from modlab.kernels.launch import KernelRefused
from modlab.routing.router import ROUTER
from tests.helpers.fast_generation import (
    DEVICE,
    NEW,
    SETTINGS,
    both_ways,
    generated,
    llama_on_device,
    prompts,
    stored_at_thresholds,
    use_engine,
)
from tests.helpers.models import alternate_layers


class Collect(BaseStreamer):
    """What is streamed, as it comes."""

    def __init__(self) -> None:
        self.pieces: list[list[int]] = []
        self.ended = False

    def put(self, value: Any) -> None:
        self.pieces.append(value.flatten().tolist())

    def end(self) -> None:
        self.ended = True


@pytest.mark.parametrize("gate", ["straight-through", "fused", "paper"])
@pytest.mark.parametrize("lengths", [(1,), (17,), (30, 3, 12)], ids=str)
def test_same_tokens_as_the_ordinary_path(gate: str, lengths: tuple[int, ...]) -> None:
    last = both_ways(llama_on_device(gate=gate), prompts(*lengths))
    assert last["prompt_tokens"] == list(lengths)
    assert last["rows"] == len(lengths)


def test_a_dense_model_works_too(make_llama: Any) -> None:
    last = both_ways(make_llama().to(DEVICE), prompts(9, 4))
    seen = [9 + last["new_tokens"] - 1, 4 + last["new_tokens"] - 1]
    assert last["kept_tokens"] == [seen] * 6


@pytest.mark.parametrize(
    "settings",
    [*SETTINGS, {"min_new_tokens": NEW}, {"no_repeat_ngram_size": 2, "bad_words_ids": [[5]]}],
    ids=lambda settings: next(iter(settings)),
)
def test_same_tokens_under_every_setting_of_generate(settings: dict[str, Any]) -> None:
    both_ways(llama_on_device(), prompts(11, 6), **settings)


def test_rows_stop_at_their_own_end_token() -> None:
    model, inputs = llama_on_device(), prompts(10, 5, 8)
    tokens = generated(model, inputs, eos_token_id=None)
    ends = [tokens[0][10 + 4], tokens[1][10 + 9]]
    want = generated(model, inputs, eos_token_id=ends)
    assert len({row.index(0, 10) if 0 in row[10:] else -1 for row in want}) > 1, "rows should end apart"
    both_ways(model, inputs, eos_token_id=ends)


def test_stopping_criteria_and_streamers_are_the_users_own() -> None:
    def stop_at_20(ids: torch.Tensor, _scores: Any, **_kwargs: Any) -> torch.Tensor:
        return torch.full((ids.shape[0],), ids.shape[1] >= 20, device=ids.device)

    model, inputs = llama_on_device(), prompts(7)
    want = generated(model, inputs, stopping_criteria=[stop_at_20], eos_token_id=None)
    modlab.enable_fast_generation(model, compile=False)
    streamer = Collect()
    got = generated(model, inputs, stopping_criteria=[stop_at_20], eos_token_id=None, streamer=streamer)
    assert got == want and len(got[0]) == 20
    assert streamer.ended
    assert [token for piece in streamer.pieces for token in piece] == got[0]


def test_caches_hold_what_the_ordinary_ones_hold() -> None:
    """Kept tokens of every layer and row; bytes of the buffers, with growth beyond the first slack."""
    model, inputs = llama_on_device(), prompts(20, 9)
    cache = modlab.RaggedCache(model)
    want = generated(model, inputs, max_new_tokens=90, eos_token_id=None, **{cache_argument(model): cache})
    modlab.enable_fast_generation(model, compile=False)
    assert generated(model, inputs, max_new_tokens=90, eos_token_id=None) == want
    last = modlab.fast_generation_report(model)["last"]
    ordinary = cache.kept_tokens.tolist()
    for layer, kept in enumerate(last["kept_tokens"]):
        # an ordinary unrouted layer stores padding too, the engine does not
        assert kept == (ordinary[layer] if layer in model.mod.layers else [20 + 89, 9 + 89])
    token = 2 * 2 * 16 * 4 + 4  # K and V of 2 heads of 16 in fp32, and the column
    kept_bytes = sum(map(sum, last["kept_tokens"])) * token
    slack = sum(max(16, n // 32) for row in last["kept_tokens"] for n in row) * token
    assert kept_bytes <= last["kv_bytes"] <= kept_bytes + slack


def test_no_row_is_computed_for_a_skipped_token_or_for_padding(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = llama_on_device(), prompts(30, 3, 12)
    layer_of = {id(model.model.layers[layer].mlp): layer for layer in range(6)}
    mlp_class: Any = type(model.model.layers[0].mlp)
    run, dense = dict.fromkeys(range(6), 0), mlp_class.forward

    def counting(self: Any, x: torch.Tensor) -> torch.Tensor:
        run[layer_of[id(self)]] += x.shape[:2].numel()
        return dense(self, x)

    monkeypatch.setattr(mlp_class, "forward", counting)
    modlab.enable_fast_generation(model, compile=False, check=False)
    generated(model, inputs, max_new_tokens=1)
    kept = modlab.fast_generation_report(model)["last"]["kept_tokens"]
    for layer in model.mod.layers:
        assert sum(kept[layer]) < 45, "this routing should skip something"
    if DEVICE.type == "cpu":  # on a GPU a first generate also warms up and captures a step
        assert run == {i: sum(kept[i]) for i in range(6)}


def test_a_decoding_step_that_every_row_skips_runs_nothing() -> None:
    model, inputs = llama_on_device(), prompts(5)
    modlab.set_threshold(model, 0.999)
    modlab.enable_fast_generation(model, compile=False)
    generated(model, inputs, eos_token_id=None)
    kept = modlab.fast_generation_report(model)["last"]["kept_tokens"]
    assert all(kept[layer] == [4] for layer in model.mod.layers), (
        "only the first tokens, which are always kept"
    )
    assert all(kept[layer] == [5 + NEW - 1] for layer in (0, 2, 4))


def test_thresholds_are_live() -> None:
    model, inputs = llama_on_device(), prompts(25)
    modlab.enable_fast_generation(model, compile=False)
    totals = stored_at_thresholds(model, inputs, (0.2, 0.5, 0.8, 0.2))
    assert totals[0] > totals[1] > totals[2] and totals[3] == totals[0]


def test_a_routing_table_decides_prompt_and_new_tokens() -> None:
    model, inputs = llama_on_device(), prompts(14, 6)
    generator = torch.Generator().manual_seed(2)
    table = modlab.RoutingTable(
        {layer: torch.rand(2, 14 + NEW, generator=generator) < 0.5 for layer in model.mod.layers}
    )
    with modlab.routing_override(model, table):
        last = both_ways(model, inputs, eos_token_id=None)
    for layer, mask in table.keep.items():
        assert last["kept_tokens"][layer] == [
            int(mask[0, : 14 + NEW - 1].sum()), int(mask[1, : 6 + NEW - 1].sum())
        ]  # fmt: skip


def test_rows_beyond_one_line_run_in_further_lines() -> None:
    model, inputs = llama_on_device(), prompts(30, 3, 12, 28, 1)
    modlab.enable_fast_generation(model, compile=False)
    one_line = generated(model, inputs)
    report = modlab.fast_generation_report(model)["last"]
    use_engine(model, line_tokens=32)
    assert [s.stop - s.start for s in lines([30, 3, 12, 28, 1], 32)] == [1, 2, 2]
    assert generated(model, inputs) == one_line
    assert modlab.fast_generation_report(model)["last"]["kept_tokens"] == report["kept_tokens"]


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"num_beams": 2}, None),
        ({"use_cache": False}, "use_cache"),
        ({"return_dict_in_generate": True, "output_scores": True}, "return_dict_in_generate"),
        ({"prompt_lookup_num_tokens": 3}, None),
    ],
    ids=["beams", "no-cache", "scores", "assisted"],
)
def test_what_the_engine_does_not_do_goes_the_ordinary_way(settings: dict[str, Any], why: str | None) -> None:
    model, inputs = llama_on_device(), prompts(9)

    def sequences() -> list[list[int]]:
        torch.manual_seed(0)
        out = model.generate(**inputs, do_sample=False, max_new_tokens=12, **settings)
        return getattr(out, "sequences", out).tolist()

    want = sequences()
    modlab.enable_fast_generation(model, compile=False)
    assert sequences() == want
    if why is not None:
        last = modlab.fast_generation_report(model)["last"]
        assert not last["fast"] and why in last["why"]


def test_a_cache_of_the_users_is_used_and_filled() -> None:
    model, inputs = llama_on_device(), prompts(9)
    modlab.enable_fast_generation(model, compile=False)
    cache = modlab.RaggedCache(model)
    generated(model, inputs, eos_token_id=None, **{cache_argument(model): cache})
    assert cache.get_seq_length() == 9 + NEW - 1
    assert "a cache was passed in" in modlab.fast_generation_report(model)["last"]["why"]


def test_recordings_and_override_functions_see_every_step() -> None:
    model, inputs = llama_on_device(), prompts(9)
    modlab.enable_fast_generation(model, compile=False)
    with modlab.record_routing(model) as recording:
        generated(model, inputs, eos_token_id=None)
    assert len(recording.steps) == NEW
    with modlab.routing_override(model, lambda layer, gate, position: position % 2 == 0):
        generated(model, inputs)
    assert "not a RoutingTable" in modlab.fast_generation_report(model)["last"]["why"]


@pytest.mark.parametrize(
    ("model_type", "reason"),
    [
        ("gemma2", "sliding window"),
        ("gpt_oss", "sliding window"),
        ("gpt_neo", "sliding window"),
        ("mamba", "no softmax attention|takes? neither"),
        ("jamba", "layer 0"),
        ("deepseek_v32", "sparse attention"),
        ("bloom", "."),
    ],
)
def test_a_model_that_it_does_not_cover_is_refused_and_left_alone(model_type: str, reason: str) -> None:
    model = tiny_model(model_type).to(DEVICE)
    before, keys = type(model), set(model.__dict__)
    with pytest.raises(ModlabError, match=reason):
        modlab.enable_fast_generation(model, compile=False)
    assert type(model) is before and set(model.__dict__) == keys
    assert not modlab.fast_generation_report(model)["enabled"]


@pytest.mark.parametrize(
    "model_type", ["mistral", "qwen2", "qwen3", "phi3", "gpt_neox", "olmo2", "qwen3_moe"]
)
def test_other_families_generate_the_same_tokens(model_type: str) -> None:
    model: Any = tiny_model(model_type)
    if getattr(model.config, "sliding_window", None):
        model.config.sliding_window = None  # Mistral's own later checkpoints have none either
        model = type(model)(model.config).eval()
    modlab.convert(model, alternate_layers())
    model = model.to(DEVICE)
    generator = torch.Generator().manual_seed(4)
    mask = torch.rand(1, 80, generator=generator) < 0.5
    with modlab.routing_override(model, modlab.RoutingTable(dict.fromkeys(model.mod.layers, mask))):
        vocabulary = model.get_input_embeddings().weight.shape[0]
        both_ways(model, prompts(13, 5, vocabulary=vocabulary), eos_token_id=None)


def test_training_mode_goes_the_ordinary_way() -> None:
    model, inputs = llama_on_device(), prompts(5)
    modlab.enable_fast_generation(model, compile=False)
    model.mod.what_if = False
    generated(model.train(), inputs)
    assert "training mode" in modlab.fast_generation_report(model)["last"]["why"]


@pytest.mark.parametrize("part", ["mlp", "self_attn.q_proj"])
def test_a_part_in_training_mode_goes_the_ordinary_way(part: str) -> None:
    model, inputs = llama_on_device(), prompts(5)
    modlab.enable_fast_generation(model, compile=False)
    model.model.layers[0].get_submodule(part).train()
    generated(model, inputs)
    assert "training mode" in modlab.fast_generation_report(model)["last"]["why"]


def test_a_router_in_training_mode_does_not() -> None:
    """Only routers train where the base is frozen, and what they decide is the same."""
    model, inputs = llama_on_device(), prompts(5)
    modlab.enable_fast_generation(model, compile=False)
    for index in model.mod.layers:
        getattr(model.model.layers[index], ROUTER).train()
    generated(model, inputs)
    assert modlab.fast_generation_report(model)["last"]["fast"]


def test_switching_off_gives_the_model_back() -> None:
    model = llama_on_device()
    before, keys = type(model), set(model.__dict__)
    modlab.enable_fast_generation(model, compile=False)
    generated(model, prompts(5))
    with pytest.raises(ModlabError, match="disable_fast_generation"):
        copy.deepcopy(model)
    modlab.disable_fast_generation(model)
    assert type(model) is before and set(model.__dict__) == keys
    assert all("forward" not in module.__dict__ for module in model.modules())
    copy.deepcopy(model)


def test_weights_that_change_in_place_are_seen() -> None:
    model, inputs = llama_on_device(), prompts(9)
    modlab.enable_fast_generation(model, compile=False)
    first = generated(model, inputs, eos_token_id=None)
    with torch.no_grad():
        for parameter in model.model.layers[0].parameters():
            parameter.mul_(1.5)
    second = generated(model, inputs, eos_token_id=None)
    modlab.disable_fast_generation(model)
    assert second == generated(model, inputs, eos_token_id=None) != first


@pytest.mark.parametrize("vocabulary", [1, 63, 64, 65, 1000])
def test_best_token_is_the_first_of_the_largest(vocabulary: int) -> None:
    generator = torch.Generator().manual_seed(vocabulary)
    logits = torch.randint(0, 5, (7, vocabulary), generator=generator).float()  # many ties
    assert best_token(logits).tolist() == logits.argmax(-1).tolist()


@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a GPU")
@pytest.mark.parametrize("rows", [1, 3])
def test_on_a_gpu_steps_are_graphs_with_if_nodes(rows: int) -> None:
    model, inputs = llama_on_device(), prompts(*[50] * rows)
    want = generated(model, inputs, eos_token_id=None)
    modlab.enable_fast_generation(model, compile=True)
    assert generated(model, inputs, eos_token_id=None) == want
    report = modlab.fast_generation_report(model)
    assert report["branch"] in ("torch", "cuda-python") and report["compiled"]
    assert report["batch_sizes"] == [rows]


@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a GPU")
@pytest.mark.parametrize("rows", [1, 64])
def test_in_bfloat16_most_next_tokens_agree(rows: int) -> None:
    """The token of a prefill and the one of a captured, compiled step, each after the same text; greedy paths
    part for good after one rounding that matters.
    """
    model = llama_on_device(hidden_size=256, intermediate_size=512).to(torch.bfloat16)
    batches = [prompts(*range(20, 84))] if rows == 64 else [prompts(20 + n, seed=n) for n in range(64)]
    want = [row for batch in batches for row in generated(model, batch, max_new_tokens=2, eos_token_id=None)]
    modlab.enable_fast_generation(model, compile=True)
    got = [row for batch in batches for row in generated(model, batch, max_new_tokens=2, eos_token_id=None)]
    first = [a[-2] == b[-2] for a, b in zip(got, want, strict=True)]
    second = [a[-1] == b[-1] for a, b, same in zip(got, want, first, strict=True) if same]
    print(f"{rows} rows: prefill {sum(first)} of {len(first)}, step {sum(second)} of {len(second)}")
    assert sum(first) >= 0.9 * len(first) and sum(second) >= 0.9 * len(second)


@pytest.mark.parametrize("where", ["prefill", "step"])
def test_a_gpu_that_refuses_a_kernel_generates_without_the_engine(
    where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Told once, with no token streamed twice; with a bounded cache it is an error."""
    model, inputs = llama_on_device(skip="kv", keep_recent=4), prompts(20)
    want = generated(model, inputs)
    modlab.enable_fast_generation(model, compile=False)
    refused = KernelRefused("the kernel attend does not run on this machine (why)")

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise refused

    part, name = {"prefill": (loop, "prefill"), "step": (Step, "run")}[where]
    monkeypatch.setattr(part, name, refuse)
    launch.warn_slower.cache_clear()
    streamer = Collect()
    with pytest.warns(UserWarning, match="generate runs without the engine, more slowly") as told:
        assert generated(model, inputs, streamer=streamer) == want == generated(model, inputs)
    assert sum("does not run on this machine (why): generate" in str(one.message) for one in told) == 1
    assert [token for piece in streamer.pieces for token in piece] == want[0]
    last = modlab.fast_generation_report(model)["last"]
    assert last == {"fast": False, "why": str(refused)}
    modlab.enable_fast_generation(model, compile=False, check=False, kv_tokens=8)
    with pytest.raises(ModlabError, match=r"bounds the cache .* attend does not run"):
        generated(model, inputs)


@pytest.mark.parametrize("where", ["prefill", "step"])
def test_fast_generation_is_refused_where_a_kernel_is(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the check on a small batch, which runs the kernels that prompts and steps run."""
    model = llama_on_device(skip="kv", keep_recent=4)

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise KernelRefused("the kernel attend does not run on this machine (why)")

    part, name = {"prefill": (switch, "prefill"), "step": (Step, "run")}[where]
    monkeypatch.setattr(part, name, refuse)
    with pytest.raises(ModlabError, match=r"does not cover this .*attend does not run .*\. The ordinary"):
        modlab.enable_fast_generation(model, compile=False)
    assert not modlab.fast_generation_report(model)["enabled"]


class AskingStep(Step):
    """A step of a model that asks the host."""

    def capture(self, batch: int) -> None:
        raise RuntimeError("operation not permitted when stream is capturing\nsecond line")


def test_a_model_that_cannot_be_captured_runs_from_the_host() -> None:
    """As a mixture of experts that asks the host how many tokens each expert gets."""
    model, inputs = llama_on_device(), prompts(9, 4)
    want = generated(model, inputs)
    use_engine(model, make_step=AskingStep).branch = Branch()  # any way that captures
    with pytest.warns(UserWarning, match="without CUDA graphs"):
        assert generated(model, inputs) == want
    report = modlab.fast_generation_report(model)
    assert report["branch"] == "host" and report["last"]["fast"]
    assert report["branch_note"].endswith("operation not permitted when stream is capturing")


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda i: i["attention_mask"].__setitem__((0, slice(None)), 0), "ends in padding"),
        (lambda i: i["attention_mask"].__setitem__((1, -1), 0), "ends in padding"),
        (lambda i: i.update(position_ids=i["attention_mask"].cumsum(1) + 5), "position_ids"),
    ],
    ids=["empty-row", "right-padding", "positions"],
)
def test_inputs_out_of_the_ordinary_go_the_ordinary_way(
    change: Callable[[dict[str, torch.Tensor]], Any], why: str
) -> None:
    model, inputs = llama_on_device(), prompts(9, 6)
    change(inputs)
    want = generated(model, inputs, eos_token_id=None)
    modlab.enable_fast_generation(model, compile=False)
    assert generated(model, inputs, eos_token_id=None) == want
    assert why in modlab.fast_generation_report(model)["last"]["why"]


def test_position_ids_that_say_nothing_new_are_fine() -> None:
    inputs = prompts(9, 6)
    inputs["position_ids"] = (inputs["attention_mask"].cumsum(1) - 1).clamp_min(0)
    both_ways(llama_on_device(), inputs, eos_token_id=None)


def test_a_prompt_beyond_the_context_is_the_ordinary_error() -> None:
    model = llama_on_device(max_position_embeddings=16)
    modlab.enable_fast_generation(model, compile=False)
    with pytest.raises(ModlabError, match="context is 16"):
        generated(model, prompts(17), max_new_tokens=1)


LONG_ROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "partial_rotary_factor": 1.0,
    "short_factor": [1.0] * 8,
    "long_factor": [4.0 + i for i in range(8)],
    "original_max_position_embeddings": 24,
}


@pytest.mark.parametrize(
    ("length", "fast"), [(3, True), (10, False), (30, True)], ids=["below", "across", "above"]
)
def test_a_text_that_crosses_into_other_rotary_frequencies(length: int, fast: bool) -> None:
    """As Phi-3's long-context models: where the text outgrows the first context, all keys are made again."""
    torch.manual_seed(0)
    config = Phi3Config(
        vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, original_max_position_embeddings=24,
        rope_parameters=LONG_ROPE, pad_token_id=0,
    )  # fmt: skip
    model, inputs = Phi3ForCausalLM(config).eval().to(DEVICE), prompts(length)
    for parameter in model.parameters():
        parameter.data *= 3  # else these random weights say the same token whatever the frequencies
    want = generated(model, inputs, max_new_tokens=20, eos_token_id=None)
    modlab.enable_fast_generation(model, compile=False)
    assert generated(model, inputs, max_new_tokens=20, eos_token_id=None) == want
    last = modlab.fast_generation_report(model)["last"]
    assert last["fast"] == fast and ("rotary" in last["why"]) != fast


def test_hooks_see_what_they_always_saw() -> None:
    model, inputs = llama_on_device(), prompts(9, 6)
    modlab.enable_fast_generation(model, compile=False)
    shapes: list[tuple[int, ...]] = []
    hook = model.model.layers[0].mlp.register_forward_hook(
        lambda _m, _a, out: shapes.append(tuple(out.shape))
    )
    generated(model, inputs, max_new_tokens=2, eos_token_id=None)
    assert shapes == [(2, 9, 64), (2, 1, 64)]
    assert "hook" in modlab.fast_generation_report(model)["last"]["why"]
    hook.remove()
    generated(model, inputs, max_new_tokens=2)
    assert modlab.fast_generation_report(model)["last"]["fast"]


def test_a_forward_of_the_objects_own_is_put_back() -> None:
    model = llama_on_device()
    mlp = model.model.layers[0].mlp
    mlp.forward = own = mlp.forward  # as accelerate does
    modlab.enable_fast_generation(model, compile=False)
    generated(model, prompts(5))
    assert mlp.__dict__["forward"] is own


@pytest.mark.parametrize(
    "gate", ["straight-through", "paper"]
)  # the paper's has hooks in the layers meanwhile
def test_threads_take_turns(gate: str) -> None:
    model = llama_on_device(gate=gate)
    modlab.enable_fast_generation(model, compile=False)
    inputs = [prompts(9, 6, seed=seed) for seed in range(4)]
    want = [generated(model, batch) for batch in inputs]
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(4) as pool:
            got = list(pool.map(lambda batch: (generated(model, batch), engine_says(model)), inputs))
    finally:
        sys.setswitchinterval(before)
    assert got == [(tokens, True) for tokens in want]
    assert model.config._attn_implementation == "sdpa"


def engine_says(model: Any) -> bool:
    """Whether the latest generation, of whatever thread, went the fast way."""
    return modlab.fast_generation_report(model)["last"]["fast"]


def test_an_interrupted_generation_lets_its_cache_go() -> None:
    def interrupt(_ids: Any, _scores: Any, **_kwargs: Any) -> Any:
        raise KeyboardInterrupt

    model, inputs = llama_on_device(), prompts(9)
    want = generated(model, inputs)
    modlab.enable_fast_generation(model, compile=False)
    with pytest.raises(KeyboardInterrupt):
        generated(model, inputs, stopping_criteria=[interrupt])
    assert all(not step.tables.buffers for step in model.__dict__["mod_engine"].steps.values())
    assert generated(model, inputs) == want


def test_conversion_and_its_undoing_end_fast_generation(make_llama: Any) -> None:
    dense = make_llama().to(DEVICE)
    inputs = prompts(9)
    want = generated(dense, inputs)
    modlab.enable_fast_generation(dense, compile=False)
    modlab.convert(dense, alternate_layers())
    assert not modlab.fast_generation_report(dense)["enabled"]
    assert generated(dense, inputs) == want
    modlab.enable_fast_generation(dense, compile=False)
    modlab.revert(dense)
    assert not modlab.fast_generation_report(dense)["enabled"] and type(dense) is LlamaForCausalLM
    assert generated(dense, inputs) == want


def test_a_refused_second_switching_on_leaves_the_first() -> None:
    model = llama_on_device()
    modlab.enable_fast_generation(model, compile=False)
    model.hf_device_map = {"": 0, "model.norm": 1}
    with pytest.raises(ModlabError, match="several devices"):
        modlab.enable_fast_generation(model)
    assert modlab.fast_generation_report(model)["enabled"]


def test_a_wrapped_model_is_refused_with_the_way_out(make_llama: Any) -> None:
    peft = pytest.importorskip("peft")
    wrapped = peft.get_peft_model(make_llama(), peft.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ModlabError, match="get_base_model"):
        modlab.enable_fast_generation(wrapped)


def test_a_table_for_other_rows_is_a_clear_error() -> None:
    model = llama_on_device()
    modlab.enable_fast_generation(model, compile=False)
    table = modlab.RoutingTable({i: torch.ones(3, 60, dtype=torch.bool) for i in model.mod.layers})
    with modlab.routing_override(model, table), pytest.raises(ModlabError, match="3 rows, the batch has 2"):
        generated(model, prompts(9, 4))


def test_a_table_that_lacks_a_layer_is_a_clear_error() -> None:
    model = llama_on_device()
    modlab.enable_fast_generation(model, compile=False)
    table = modlab.RoutingTable({1: torch.ones(1, 60, dtype=torch.bool)})
    with modlab.routing_override(model, table), pytest.raises(ModlabError, match=r"no layer 3; it has \[1\]"):
        generated(model, prompts(9, 4))
    with pytest.raises(ModlabError, match=r"no layer 3; it has \[1\]"):  # what kernels read
        table.for_rows(3, 2, DEVICE)
