"""Prefill waits for the GPU once a routed layer, and for nothing else after its first look at the mask."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import modlab
from modlab.engine import attention as attention_module
from modlab.engine import compiled as compiled_module
from modlab.engine import prefill_layers
from modlab.engine.compiled import Compiler, norm_forwards
from modlab.engine.prefill import prefill
from modlab.engine.ring import RingBuffer
from modlab.engine.tables import Tables
from modlab.families.tiny_models import tiny_model
from modlab.kernels import varlen_attention as varlen
from tests.helpers.fast_generation import DEVICE, generated, llama_on_device, prompts
from tests.helpers.waits import WAITING, Waits


def leave_references_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """What stands in for a kernel on a machine without a GPU asks for values as it likes."""
    reference = attention_module.reference_store_kept

    def uncounted(*args: Any) -> None:
        with torch._C.DisableTorchFunction():
            reference(*args)

    monkeypatch.setattr(attention_module, "reference_store_kept", uncounted)


def test_the_counter_sees_what_waits() -> None:
    x = torch.arange(4)
    with Waits() as waits:
        x.tolist(), x[1].item(), bool(x[0]), int(x[1]), x[x > 1], x.nonzero(), torch.tensor([1], device="cpu")
        x + 1, x[torch.tensor([0, 1])], torch.nonzero_static(x, size=3)  # these do not
    assert sum(waits.calls.values()) == 7


@pytest.mark.parametrize(
    ("gate", "skip", "gates"),
    [
        ("straight-through", "layer", "layer"),
        ("straight-through", "attention", "layer"),
        ("straight-through", "kv", "layer"),
        ("straight-through", "kv", "kv_head"),
        ("paper", "layer", "layer"),
        ("paper", "attention", "layer"),
    ],
)
@pytest.mark.parametrize("lengths", [(30,), (30, 3, 12)], ids=str)
def test_prefill_waits_once_a_routed_layer(
    gate: str, skip: str, gates: str, lengths: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    leave_references_out(monkeypatch)
    model, inputs = llama_on_device(gate=gate, skip=skip, gates=gates), prompts(*lengths)
    modlab.enable_fast_generation(model, compile=False)
    engine = model.__dict__["mod_engine"]
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    with Waits() as waits:
        _, caches, counts = prefill(engine, ids, mask)
        tables = Tables(6, model.mod.layers, len(lengths), DEVICE, True, engine.keep_recent, model.mod.gates)
        before = waits.calls.copy()
        tables.attach(caches, ids.shape[1], counts)
    stored = [cache.row_lengths if isinstance(cache, RingBuffer) else cache.lengths for cache in caches]
    assert any(sum(rows) < sum(lengths) for rows in stored), "nothing was skipped"
    assert before == {"tolist": 1 + len(model.mod.layers)}  # the mask, then each decision
    assert waits.calls == before
    assert tables.position.flatten().tolist() == list(lengths)


class Order(Waits):
    """Notes waits and linear maps as they come."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in WAITING or func is torch.nn.functional.linear:
            self.seen.append(func.__name__)
        return super().__torch_function__(func, types, args, kwargs)


@pytest.mark.skipif(DEVICE.type == "cuda", reason="routers run as kernels there")
@pytest.mark.parametrize("gates", ["layer", "kv_head"])
def test_the_wait_for_kept_keys_comes_once_the_gpu_has_projections_to_run(
    gates: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    leave_references_out(monkeypatch)
    model, inputs = llama_on_device(skip="kv", gates=gates), prompts(30)
    modlab.enable_fast_generation(model, compile=False)
    with Order() as order:
        prefill(model.__dict__["mod_engine"], inputs["input_ids"], None)
    text = " ".join(order.seen).replace("linear", "x")
    # a routed layer: its router, q, k, v; the wait; output projection, MLP
    assert text.count("x x x x tolist x x x x") == text.count("tolist") == len(model.mod.layers)


def test_a_dense_prefill_waits_for_nothing(make_llama: Any) -> None:
    model, inputs = make_llama().to(DEVICE), prompts(30)
    modlab.enable_fast_generation(model, compile=False)
    with Waits() as waits:
        prefill(model.__dict__["mod_engine"], inputs["input_ids"], None)
    assert not waits.calls


def test_a_greedy_step_waits_for_its_news_only(make_llama: Any) -> None:
    """Steps between prefill and end: what the host reads is the copy of the tokens."""
    model, inputs = make_llama().to(DEVICE), prompts(9, 4)
    modlab.enable_fast_generation(model, compile=False)
    counts = []
    for new in (5, 15):
        with Waits() as waits:
            generated(model, inputs, max_new_tokens=new, eos_token_id=None)
        counts.append(waits.calls)
    more = counts[1] - counts[0]
    # `bool` of the news and of the length criterion's answer, both on the host; the rest is the reference
    # attention of a machine without a GPU, which reads each row's length
    assert more["__bool__"] == 10 * 2 + (10 * 6 * 2 if DEVICE.type == "cpu" else 0)
    assert not more["tolist"] and not more["item"]


@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a GPU")
def test_on_a_gpu_a_dense_prefill_never_waits(make_llama: Any) -> None:
    model, inputs = make_llama().to(DEVICE, torch.bfloat16), prompts(30)
    modlab.enable_fast_generation(model, compile=False)
    prefill(model.__dict__["mod_engine"], inputs["input_ids"], None)
    torch.cuda.set_sync_debug_mode("error")
    try:
        prefill(model.__dict__["mod_engine"], inputs["input_ids"], None)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.skipif(DEVICE.type == "cuda", reason="on a GPU the step is compiled too")
def test_norms_of_long_prompts_are_compiled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """For all layers, routed or not, and all lengths; short lines run as they are."""
    counter = CompileCounterWithBackend("aot_eager")
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=counter))
    monkeypatch.setattr(compiled_module, "LONG_LINE", 16)
    model = llama_on_device()
    batches = [prompts(60), prompts(41, 30), prompts(97), prompts(5)]
    want = [generated(model, batch, max_new_tokens=4) for batch in batches]
    modlab.enable_fast_generation(model, compile=False)
    model.__dict__["mod_engine"].compile = True
    assert [generated(model, batch, max_new_tokens=4) for batch in batches] == want
    report = modlab.fast_generation_report(model)
    assert counter.frame_count == 1 and report["last"]["fast"] and not report["uncompiled"]


@pytest.mark.skipif(DEVICE.type == "cuda", reason="on a GPU the step is compiled too")
def test_norms_that_do_not_compile_run_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(graph: Any, inputs: Any) -> Any:
        raise RuntimeError("no compiler here")

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=refuse))
    monkeypatch.setattr(compiled_module, "LONG_LINE", 16)
    model, inputs = llama_on_device(), prompts(40)
    want = generated(model, inputs, max_new_tokens=4)
    modlab.enable_fast_generation(model, compile=False)
    model.__dict__["mod_engine"].compile = True
    assert generated(model, inputs, max_new_tokens=4) == want
    assert "no compiler here" in modlab.fast_generation_report(model)["uncompiled"]["norms of a prefill"]


def test_torchs_own_norms_are_left_alone() -> None:
    model = tiny_model("gpt_neox")
    assert not norm_forwards(model.gpt_neox.layers, Compiler(enabled=True))


@pytest.mark.parametrize("n", [varlen.LONG - 1, varlen.LONG, varlen.LONG + 1], ids=str)
def test_only_lengths_between_buckets_are_padded(n: int) -> None:
    """The fast way, its kernels replaced: rows come back whole, and a multiple of `BUCKET` is not copied."""
    seen: list[int] = []

    def one_row(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
        seen.append(q.shape[2])
        return q

    def flash(q: Tensor, k: Tensor, v: Tensor, longest: int, bounds: Tensor, scale: float | None) -> Tensor:
        assert bounds.tolist() == [0, q.shape[2]] and longest == q.shape[2]
        return q.transpose(1, 2)

    counts = [5, n, varlen.LONG]
    bounds = torch.tensor([0, *counts]).cumsum(0).int()
    q = torch.randn(1, 2, sum(counts), 4)
    out = varlen.fast_rows(q, q, q, counts, bounds, None, varying=True, long_row=one_row, short_rows=flash)
    assert torch.equal(out, q.transpose(1, 2))
    long = [-(-m // varlen.BUCKET) * varlen.BUCKET for m in (n, varlen.LONG) if m >= varlen.LONG]
    assert seen == long


@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a GPU")
@pytest.mark.parametrize(("skip", "gates"), [("kv", "layer"), ("kv", "kv_head"), ("kv+prompt", "kv_head")])
def test_on_a_gpu_routers_next_to_projections_decide_the_same(
    skip: Any, gates: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit, prompt after prompt."""
    model = llama_on_device(skip=skip, gates=gates, router_hidden=16).to(torch.bfloat16)
    modlab.enable_fast_generation(model)
    engine, found = model.__dict__["mod_engine"], []
    for least in (1, 10**9):
        monkeypatch.setattr(prefill_layers, "ASIDE_TOKENS", least)
        for seed in range(8):
            ids = torch.randint(1, 60, (1, 1500), generator=torch.Generator().manual_seed(seed)).to(DEVICE)
            logits, buffers, _ = prefill(engine, ids, None)
            found.append((logits, [buffer.lengths for buffer in buffers]))
    for (logits, lengths), (other, of_other) in zip(found[:8], found[8:], strict=True):
        assert torch.equal(logits, other) and lengths == of_other
