"""Fast generation where prompt tokens leave early: the tokens of the ordinary path, and nothing run above."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import modlab
from modlab.engine import attention as attention_module
from modlab.engine import leaving_prefill
from modlab.engine.attention import LineBlocks
from modlab.engine.forms import form_of
from modlab.engine.leaving_prefill import LeavingKeysPrefill, LeavingPrefill
from modlab.engine.prefill import prefill
from modlab.engine.ring import RingBuffer
from modlab.engine.tables import LayerStep
from modlab.execution.routed import RoutedBranch
from modlab.families.tiny_models import tiny_model
from modlab.hf.anatomy import decoder_layers
from modlab.hf.names import cache_argument
from modlab.kernels.decode_attention import decode_attention, decode_ring_attention, fold
from modlab.kernels.kept_attention import store_kept
from tests.helpers.fast_generation import (
    DEVICE,
    NEW,
    SETTINGS,
    both_ways,
    generated,
    prompts,
    stepped,
    stored_at_thresholds,
    use_engine,
)
from tests.helpers.models import dense_llama, leaving_llama

RECENT, FIRST = 6, 4
"""`keep_recent` of these models, and the first of their six layers that prompt tokens leave out."""

KINDS = [("prompt", "layer"), ("kv+prompt", "layer"), ("kv+prompt", "kv_head")]
kinds = pytest.mark.parametrize(("skip", "gates"), KINDS, ids=[" ".join(kind) for kind in KINDS])


def leaving(skip: str, gates: str, **fields: Any) -> Any:
    return leaving_llama(skip, gates, **fields).to(DEVICE)


def test_layers_above_have_a_form_of_their_own() -> None:
    forms = {skip: form_of(leaving(skip, "layer").mod) for skip in ("prompt", "kv+prompt")}
    above = {skip: form.above and form.above.prefill for skip, form in forms.items() if form}
    assert above == {"prompt": LeavingPrefill, "kv+prompt": LeavingKeysPrefill}


@kinds
@pytest.mark.parametrize("lengths", [(1,), (2, 1), (17,), (30, 3, 12)], ids=str)
def test_same_tokens_as_the_ordinary_path(skip: str, gates: str, lengths: tuple[int, ...]) -> None:
    last = both_ways(leaving(skip, gates), prompts(*lengths), eos_token_id=None)
    assert last["prompt_tokens"] == list(lengths)


@kinds
@pytest.mark.parametrize("fields", [{"leave_rank": 4}, {"leave_after": 0.2}, {"leave_after": 0.99}], ids=str)
def test_same_tokens_wherever_they_leave(skip: str, gates: str, fields: dict[str, Any]) -> None:
    both_ways(leaving(skip, gates, **fields), prompts(30, 3, 12), eos_token_id=None)


@pytest.mark.parametrize(
    "fields", [{"keep_recent": 1}, {"keep_recent": 200}, {"router_hidden": 5}, {"layers": [1]}]
)
@pytest.mark.parametrize("gates", ["layer", "kv_head"])
def test_same_tokens_whatever_is_kept(gates: str, fields: dict[str, Any]) -> None:
    both_ways(leaving("kv+prompt", gates, **fields), prompts(30, 3, 12), eos_token_id=None)


@kinds
@pytest.mark.parametrize(
    "settings",
    SETTINGS,
    ids=lambda settings: next(iter(settings)),
)
def test_same_tokens_under_settings_of_generate(skip: str, gates: str, settings: dict[str, Any]) -> None:
    both_ways(leaving(skip, gates), prompts(11, 6), max_new_tokens=20, **settings)


@kinds
@pytest.mark.parametrize(
    "model_type", ["mistral", "qwen2", "qwen3", "olmo2", "mixtral", "qwen2_moe", "cohere"]
)
def test_other_families_generate_the_same_tokens(model_type: str, skip: str, gates: str) -> None:
    dense: Any = tiny_model(model_type)
    if getattr(dense.config, "sliding_window", None):
        dense.config.sliding_window = None
        dense = type(dense)(dense.config).eval()
    vocabulary = dense.get_input_embeddings().weight.shape[0]
    model = leaving(skip, gates, dense=dense)
    both_ways(model, prompts(13, 5, vocabulary=vocabulary), eos_token_id=None, max_new_tokens=12)


@kinds
def test_logits_are_those_of_the_ordinary_path(skip: str, gates: str) -> None:
    """All rows', where tokens of a prompt and of a step may differ by less than a choice shows."""
    model, inputs = leaving(skip, gates, by=0.1), prompts(40, 1, 7, 23)
    mask = inputs["attention_mask"]
    want = model(**inputs, position_ids=(mask.cumsum(1) - 1).clamp_min(0), use_cache=False).logits[:, -1]
    engine = use_engine(model)
    with torch.no_grad():
        got, _, _ = prefill(engine, inputs["input_ids"], mask)
    torch.testing.assert_close(got, want, atol=2e-5, rtol=1e-4)


def by_kernels(step: LayerStep, new: tuple[Tensor, Tensor, Tensor], scale: float) -> Tensor:
    """`attend_step` as on a GPU."""
    if step.ring is None:
        return decode_attention(*new, step.table, step.lengths, step.keep, step.column, scale)
    q, k, v = (fold(x, len(step.lengths)) for x in new)
    position_B = step.position[:, 0]
    out = decode_ring_attention(q, k, v, step.table, step.lengths, step.keep, step.ring, position_B, scale)
    return out.view(*new[0].shape[:2], -1)


@kinds
def test_kernels_of_a_gpu_say_the_same(skip: str, gates: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In Triton's interpreter where there is no GPU: each row's last token is stored once more where it is
    stored already, and nothing else moves."""
    pytest.importorskip("triton", reason="Triton is not installed")
    model, inputs = leaving(skip, gates), prompts(17, 1, 6, 7)
    engine = use_engine(model)

    def run() -> tuple[Tensor, list[Any]]:
        with torch.no_grad():
            logits, buffers, _ = prefill(engine, inputs["input_ids"], inputs["attention_mask"])
        return logits, buffers

    def by_kernel(key: Tensor, value: Tensor, counts: list[int], stored: Any) -> None:
        store_kept(key, value, LineBlocks(counts, DEVICE).of(16), 16, stored)

    (want, buffers), lengths = run(), []

    def noting(step: LayerStep, *args: Any) -> Tensor:
        out = by_kernels(step, *args)
        lengths.append(step.lengths.tolist())
        return out

    monkeypatch.setattr(leaving_prefill, "attend_step", noting)
    monkeypatch.setattr(attention_module, "reference_store_kept", by_kernel)
    got, others = run()
    torch.testing.assert_close(got, want, atol=2e-5, rtol=1e-4)
    assert lengths == [buffer.lengths for buffer in buffers[FIRST:]]
    for one, other in zip(buffers, others, strict=True):
        assert one.lengths == other.lengths and one.starts == other.starts
        if isinstance(one, RingBuffer):
            assert torch.equal(one.ring_kept, other.ring_kept)
        for n, start in zip(one.lengths, one.starts, strict=True):
            here = slice(start, start + n)
            torch.testing.assert_close(one.keys[:, here], other.keys[:, here], atol=2e-5, rtol=1e-4)


def rows_of_mlps(model: Any, monkeypatch: pytest.MonkeyPatch) -> dict[int, int]:
    """Tokens that each layer's MLP has run for, counted from now on."""
    ran: dict[int, int] = {}

    def counting(index: int, forward: Any) -> Any:
        def counted(x: Tensor) -> Tensor:
            ran[index] = ran.get(index, 0) + x.shape[:-1].numel()
            return forward(x)

        return counted

    for index, layer in enumerate(decoder_layers(model)):
        for name in ("mlp.up_proj", "self_attn.o_proj"):
            linear = layer.get_submodule(name)
            monkeypatch.setattr(linear, "forward", counting(index, linear.forward))
    return ran


@kinds
def test_tokens_that_leave_run_nothing_above(skip: str, gates: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = leaving(skip, gates), prompts(30, 3, 12)
    engine = use_engine(model)
    ran = rows_of_mlps(model, monkeypatch)
    with torch.no_grad():
        prefill(engine, inputs["input_ids"], inputs["attention_mask"])
    assert ran == {index: 2 * (45 if index < FIRST else 3) for index in range(6)}


def test_layers_above_ask_the_host_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their routers read one state: the first of them has all counts sent, before any is waited for."""
    model, inputs, events = leaving("kv+prompt", "kv_head"), prompts(30, 3, 12), []

    class Noting(attention_module.Fetched):
        def __init__(self, numbers: Tensor) -> None:
            events.append("asked")
            super().__init__(numbers)

        def read(self) -> list[int]:
            events.append("read")
            return super().read()

    monkeypatch.setattr(attention_module, "Fetched", Noting)
    engine = use_engine(model)
    engine.defer_tokens = 0  # layers below read theirs at once
    with torch.no_grad():
        prefill(engine, inputs["input_ids"], inputs["attention_mask"])
    assert events == ["asked", "read"] * FIRST + ["asked"] * 2 + ["read"] * 2


@pytest.mark.parametrize(("model_type", "heads"), [("qwen2", 1), ("olmo2", None)])
def test_writing_computes_no_wide_queries(
    model_type: str, heads: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One head's width of zeros, but for families whose forward asks for all heads of a query."""
    dense: Any = tiny_model(model_type)
    vocabulary = dense.get_input_embeddings().weight.shape[0]
    model, widths = leaving("prompt", "layer", dense=dense), []
    attend = LeavingPrefill.attend

    def noting(self: LeavingPrefill, query: Tensor, *others: Any) -> Tensor:
        if self.new is None:
            widths.append(query.shape[1])
        return attend(self, query, *others)

    monkeypatch.setattr(LeavingPrefill, "attend", noting)
    engine, inputs = use_engine(model), prompts(13, 5, vocabulary=vocabulary)
    with torch.no_grad():
        prefill(engine, inputs["input_ids"], inputs["attention_mask"])
    assert widths and set(widths) == {heads or dense.config.num_attention_heads}


@kinds
def test_buffers_hold_what_the_ordinary_cache_holds(skip: str, gates: str) -> None:
    model, inputs = leaving(skip, gates), prompts(60, 20)
    cache = modlab.RaggedCache(model)
    settings: dict[str, Any] = {"max_new_tokens": 90, "eos_token_id": None}
    want = generated(model, inputs, **settings, **{cache_argument(model): cache})
    modlab.enable_fast_generation(model, compile=False)
    assert generated(model, inputs, **settings) == want
    last = modlab.fast_generation_report(model)["last"]
    stored, seen = last["kept_tokens"], [60 + 89, 20 + 89]
    if skip == "prompt":
        assert stored == [seen] * 6
        return
    assert sum(map(sum, stored)) < 0.8 * 6 * sum(seen)
    segments = [still_needed(layer) for layer in cache.layers]
    A = len(segments[0]) // 2  # gates of a layer; a row's figure is their mean, rounded up
    assert stored == [[-(-sum(held[row * A :][:A]) // A) for row in range(2)] for held in segments]
    assert buffers_after(model, inputs, want) == segments


def still_needed(layer: Any) -> list[int]:
    """Tokens of each row (of each head, one after another) in an ordinary cache layer that are kept or
    recent; others it drops now and then, a ring at once."""
    recent = layer.columns >= layer.cumulative_length - RECENT
    needed = layer.kept | recent
    return [int(needed[at : at + n].sum()) for at, n in zip(layer.starts, layer.lengths, strict=True)]


def buffers_after(model: Any, inputs: dict[str, Tensor], tokens: list[list[int]]) -> list[list[int]]:
    """Lengths of the engine's buffers by layer, after the prompts and all tokens but the last one."""
    ids, mask = torch.tensor(tokens, device=DEVICE)[:, :-1], inputs["attention_mask"]
    buffers, _ = stepped(use_engine(model), ids, mask, mask.shape[1])
    return [list(buffer.lengths) for buffer in buffers]


@pytest.mark.parametrize("gates", ["layer", "kv_head"])
def test_a_prompt_in_pieces_of_steps_leaves_the_same_cache(gates: str) -> None:
    """Rings, older tokens and flags of layers above do not tell whether tokens came in the prompt."""
    model, inputs = leaving("kv+prompt", gates), prompts(31, 12)
    engine, caches = use_engine(model), []
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    for later in (0, 5):
        buffers, layers = stepped(engine, ids, mask, ids.shape[1] - later)
        kept = [None if layer.ring is None else layer.ring.clone() for layer in layers]
        caches.append((buffers, kept))
        engine.release()
    for index in range(6):
        (prompt, flags), (steps, flags_too) = ((buffers[index], kept[index]) for buffers, kept in caches)
        assert isinstance(prompt, RingBuffer) and prompt.lengths == steps.lengths
        assert flags is not None and flags_too is not None and torch.equal(flags, flags_too)
        assert prompt.keys is not None and steps.keys is not None
        for n, here, there in zip(prompt.lengths, prompt.starts, steps.starts, strict=True):
            torch.testing.assert_close(
                prompt.keys[:, here : here + n], steps.keys[:, there : there + n], atol=2e-5, rtol=1e-4
            )


@kinds
def test_rows_beyond_one_line_run_in_further_lines(skip: str, gates: str) -> None:
    model, inputs = leaving(skip, gates), prompts(12, 7, 9, 5)
    results = []
    for line_tokens in (1000, 20, 1):
        use_engine(model, line_tokens=line_tokens)
        tokens = generated(model, inputs, eos_token_id=None)
        results.append((tokens, modlab.fast_generation_report(model)["last"]["kept_tokens"]))
    assert results[0] == results[1] == results[2]


@pytest.mark.parametrize("gates", ["layer", "kv_head"])
def test_bounds_of_the_cache_hold(gates: str) -> None:
    inputs, model = prompts(30, 3, 12), leaving("kv+prompt", gates)
    want = generated(model, inputs, eos_token_id=None)
    modlab.enable_fast_generation(model, compile=False, kv_tokens=200)
    assert generated(model, inputs, eos_token_id=None) == want, "it is not met"
    modlab.enable_fast_generation(model, compile=False, kv_tokens=RECENT + 5)
    generated(model, inputs, eos_token_id=None)
    stored = modlab.fast_generation_report(model)["last"]["kept_tokens"]
    assert max(map(max, stored)) == RECENT + 5


@pytest.mark.parametrize("gates", ["layer", "kv_head"])
def test_tokens_under_a_tight_bound_are_a_rows_own(gates: str) -> None:
    """Whatever line its prompt runs in, and whichever rows are with it."""
    model, lengths = leaving("kv+prompt", gates), (30, 3, 12)
    inputs, results = prompts(*lengths), []
    free = generated(model, inputs, eos_token_id=None)
    for line_tokens in (1000, 20, 1):
        use_engine(model, line_tokens=line_tokens, kv_tokens=10)
        results.append(generated(model, inputs, eos_token_id=None))
    assert results[0] == results[1] == results[2] != free, "the bound is met"
    use_engine(model, kv_tokens=10)
    for row, n in enumerate(lengths):
        alone = {name: tensor[row : row + 1, -n:] for name, tensor in inputs.items()}
        assert generated(model, alone, eos_token_id=None)[0] == results[0][row][-n - NEW :]


@pytest.mark.parametrize("gates", ["layer", "kv_head"])
def test_a_bound_cuts_down_what_the_last_token_has_seen(gates: str) -> None:
    """A prompt attends to all that is kept: its logits are those without a bound."""
    model, inputs = leaving("kv+prompt", gates), prompts(40, 25)
    logits, lengths = [], []
    for bound in (RECENT + 5, 1000):
        engine = use_engine(model, kv_tokens=bound)
        with torch.no_grad():
            out, caches, _ = prefill(engine, inputs["input_ids"], inputs["attention_mask"], bound - RECENT)
        logits.append(out)
        lengths.append([max(cache.lengths) for cache in caches])
    torch.testing.assert_close(logits[0], logits[1])
    assert max(lengths[0]) == RECENT + 5 < min(lengths[1])


def test_a_table_decides_what_is_kept_and_never_who_leaves() -> None:
    inputs = prompts(14, 6)
    for gates, shape in (("layer", (2, 14 + NEW)), ("kv_head", (2, 14 + NEW, 2))):
        model = leaving("kv+prompt", gates)
        mask = torch.rand(shape, generator=torch.Generator().manual_seed(2)) < 0.4
        with modlab.routing_override(model, modlab.RoutingTable(dict.fromkeys(model.mod.layers, mask))):
            both_ways(model, inputs, eos_token_id=None)
    model = leaving("prompt", "layer")
    table = modlab.RoutingTable(dict.fromkeys(model.mod.layers, torch.ones(1, 60, dtype=torch.bool)))
    modlab.enable_fast_generation(model, compile=False)
    with modlab.routing_override(model, table):
        generated(model, inputs)
    assert "routing_override" in modlab.fast_generation_report(model)["last"]["why"]


def test_thresholds_are_live() -> None:
    model, inputs = leaving("kv+prompt", "kv_head"), prompts(25)
    modlab.enable_fast_generation(model, compile=False)
    totals = stored_at_thresholds(model, inputs, (0.2, 0.5, 0.8, 0.2))
    assert totals[0] > totals[1] > totals[2] and totals[3] == totals[0]


@kinds
def test_the_model_is_left_as_it_was(skip: str, gates: str) -> None:
    """Classes, forwards and attributes, after a generation and after one that was interrupted."""

    def interrupt(_ids: Any, _scores: Any, **_kwargs: Any) -> Any:
        raise KeyboardInterrupt

    model, inputs = leaving(skip, gates), prompts(9, 4)
    before = [(type(module), set(module.__dict__)) for module in model.modules()]
    want = generated(model, inputs)
    modlab.enable_fast_generation(model, compile=False)
    with pytest.raises(KeyboardInterrupt):
        generated(model, inputs, stopping_criteria=[interrupt])
    assert generated(model, inputs) == want
    modlab.disable_fast_generation(model)
    assert [(type(module), set(module.__dict__)) for module in model.modules()] == before
    assert isinstance(model.model.layers[5].self_attn, RoutedBranch) == (skip == "kv+prompt")


def test_loaded_recipes_have_fast_generation() -> None:
    dense = dense_llama(num_hidden_layers=8).to(DEVICE)
    config, _ = modlab.recipe("speed", dense, tokens=1000)
    both_ways(modlab.convert(dense, config), prompts(13, 5))


@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a GPU")
@kinds
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("compile", [False, True])
def test_on_a_gpu_steps_are_graphs(skip: str, gates: str, rows: int, compile: bool) -> None:
    model, inputs = leaving(skip, gates), prompts(*[50] * rows)
    want = generated(model, inputs, eos_token_id=None)
    modlab.enable_fast_generation(model, compile=compile)
    assert generated(model, inputs, eos_token_id=None) == want
    report = modlab.fast_generation_report(model)
    assert report["branch"] in ("torch", "cuda-python") and report["compiled"] == compile
    assert report["batch_sizes"] == [rows]
