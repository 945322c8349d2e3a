"""What a run changes about the model: dtypes, frozen weights, compilation; and that it gives them back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from modlab.execution.routed import compiled_forward
from modlab.training.loop import TrainConfig, train
from tests.helpers.models import alternate_layers, leaving_llama, scatter_gates
from tests.helpers.training import changes, settings


def test_freeze_base_trains_routers_alone(make: Callable[..., Any], rows: torch.Tensor) -> None:
    model = make(mod=alternate_layers())
    with changes(model) as changed:
        train(model, rows, TrainConfig(**settings(steps=2, freeze_base=True)))
    assert changed == {n for n, _ in model.named_parameters() if "router" in n}
    assert all(p.requires_grad for p in model.parameters())


def test_freeze_below_trains_what_is_above_the_point_of_leaving(rows: torch.Tensor) -> None:
    model = leaving_llama("kv+prompt", "kv_head", router_hidden=2)
    config = settings(steps=2, objective="distil", keep_ratio=0.5, ramp=0.0, router_lr=1e-2)
    with changes(model) as changed:
        train(model, rows, TrainConfig(**config, freeze_below=True))
    changed = {n for n in changed if not n.endswith("mod_router.bias")}  # all shift
    assert {n.split(".")[3] for n in changed} == {"mod_router", "mod_projections"}
    assert {int(n.split(".")[2]) for n in changed} == {4, 5}, "four of six layers lie below"
    assert all(p.requires_grad for p in model.parameters())


def test_bf16_model_trains_in_fp32_and_comes_back(make: Callable[..., Any], rows: torch.Tensor) -> None:
    model = make(mod=alternate_layers()).to(torch.bfloat16)
    routers = {n for n, p in model.named_parameters() if p.dtype == torch.float32}
    assert routers and all("router" in n for n in routers)
    seen = []
    model.model.register_forward_pre_hook(lambda *_: seen.append(model.model.embed_tokens.weight.dtype))
    train(model, rows, TrainConfig(**settings(steps=2, mixed_precision="bf16")))
    assert set(seen) == {torch.float32}
    assert {n for n, p in model.named_parameters() if p.dtype == torch.float32} == routers
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_compiled_run_equals_the_plain_one(
    make: Callable[..., Any], rows: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Capture and clean-up of torch.compile; its code generation is replaced, since it needs a C++
    compiler."""
    plain, model = make(), make()
    compiled = []

    def compile(self: Any, **kwargs: Any) -> None:
        compiled.append(kwargs)
        torch.nn.Module.compile(self, backend="eager", **kwargs)

    monkeypatch.setattr(type(model), "compile", compile)
    config = settings(steps=4, eval_every=2)
    a = train(plain, rows, TrainConfig(**config), eval_data=rows[:8])
    b = train(model, rows, TrainConfig(**config, compile=True), eval_data=rows[:8])
    assert compiled == [{"dynamic": False}]
    assert b.history["loss"].tolist() == pytest.approx(a.history["loss"].tolist(), rel=1e-5)
    assert b.history["eval_loss"].dropna().tolist() == pytest.approx(
        a.history["eval_loss"].dropna().tolist(), rel=1e-5
    )
    assert model._compiled_call_impl is None


@pytest.mark.parametrize("skip", ["layer", "attention", "mlp", "kv"])
def test_compiled_layers_of_a_converted_model_equal_the_plain_ones(
    make: Callable[..., Any], rows: torch.Tensor, monkeypatch: pytest.MonkeyPatch, skip: Any
) -> None:
    """As above: what-if steps and packed ones, dense layers and routed ones, and all as before afterwards."""
    config = settings(steps=6, keep_ratio=0.5, ramp=0.0, what_if=0.5, eval_every=3, log_every=3)
    plain, model = (make(mod=alternate_layers(skip=skip, keep_recent=4)) for _ in range(2))
    scatter_gates(plain)
    scatter_gates(model)
    a = train(plain, rows, TrainConfig(**config), eval_data=rows[:8])
    compiled: list[Any] = []

    def compile(function: Any, **kwargs: Any) -> Any:
        compiled.append(function)
        return original(function, backend="eager", **kwargs)

    original = torch.compile
    monkeypatch.setattr(torch, "compile", compile)
    compiled_forward.cache_clear()
    b = train(model, rows, TrainConfig(**config, compile=True), eval_data=rows[:8])
    compiled_forward.cache_clear()
    assert len(compiled) >= 3  # two dense layers, and what is routed
    for column in ("loss", "keep_ratio", "eval_loss", "eval_keep_ratio"):
        assert b.history[column].tolist() == pytest.approx(a.history[column].tolist(), rel=1e-4), column
    assert not model.mod.compile_layers
    assert all(layer._compiled_call_impl is None for layer in model.model.layers)


def test_a_frozen_base_keeps_its_type_while_routers_learn(make, rows) -> None:
    model = make(mod=alternate_layers(skip="kv", keep_recent=2)).to(torch.bfloat16)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    seen: set[torch.dtype] = set()
    embedding = model.get_input_embeddings()
    hook = embedding.register_forward_pre_hook(lambda m, _: seen.add(m.weight.dtype))
    train(model, rows, TrainConfig(steps=2, batch_size=2, lr=1e-2, freeze_base=True, calibrate=False))
    hook.remove()
    assert seen == {torch.bfloat16}
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) == ("router" not in name), name
        assert parameter.requires_grad
