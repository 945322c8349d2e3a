"""The training loop: it learns, resumes exactly, stops cleanly, refuses early, and runs in several
processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import modlab
from modlab.data import packed
from modlab.errors import ModlabError
from modlab.execution.routed import compiled_forward
from modlab.training.config import is_what_if, keep_target, lr_factor, ramped_target
from modlab.training.loop import TrainConfig, evaluate, train
from tests.helpers.models import alternate_layers, scatter_gates
from tests.helpers.tokenizers import character_tokenizer

V, T = 64, 32


@pytest.fixture
def make(make_llama: Callable[..., Any]) -> Callable[..., Any]:
    """A very small dense model; `mod` converts it."""

    def make(seed: int = 0, mod: modlab.MoDConfig | None = None, **changes: Any) -> Any:
        sizes = {
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
        }
        sizes |= {
            "num_hidden_layers": 4,
            "vocab_size": V,
            "max_position_embeddings": T,
            "tie_word_embeddings": True,
        }
        model = make_llama(seed=seed, **(sizes | changes))
        return model if mod is None else modlab.convert(model, mod)

    return make


@pytest.fixture(scope="module")
def rows() -> torch.Tensor:
    """Sequences that count in steps of 1, 2 or 3: easy to learn, different enough to tell batches apart."""
    g = torch.Generator().manual_seed(0)
    stride, start = (torch.randint(low, high, (160, 1), generator=g) for low, high in ((1, 4), (0, V)))
    return (torch.arange(T)[None] * stride + start) % V


def settings(**changes: Any) -> dict[str, Any]:
    """Short runs; those that end calibrated ask for it."""
    return {"steps": 10, "batch_size": 8, "lr": 3e-3, "log_every": 1, "calibrate": False, **changes}


def same_weights(a: Any, b: Any) -> bool:
    return all(
        torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    )


def test_dense_loss_falls(make: Callable[..., Any], rows: torch.Tensor) -> None:
    model = make()
    result = train(model, rows, TrainConfig(**settings(steps=60, log_every=20)), eval_data=rows[:32])
    history = result.history
    assert history["loss"].iloc[0] > 3.0 > 2.7 > history["loss"].iloc[-1]
    assert history["eval_loss"].iloc[-1] == pytest.approx(evaluate(model, rows[:32])["loss"], rel=1e-5)
    assert result.tokens == 60 * 8 * T == history["tokens"].iloc[-1]
    assert (result.stopped, result.steps, result.interrupted) == ("finished", 60, False)
    assert result.model is model and not model.training


def test_evaluate_is_the_mean_over_every_token(make: Callable[..., Any], rows: torch.Tensor) -> None:
    model = make()
    with torch.no_grad():
        logits = model(input_ids=rows[:11]).logits[:, :-1]
        expected = torch.nn.functional.cross_entropy(logits.reshape(-1, V), rows[:11, 1:].reshape(-1)).item()
    found = evaluate(model, rows[:11], batch_size=4)  # 4 + 4 + 3
    assert found["loss"] == pytest.approx(expected, rel=1e-5)
    assert found["tokens"] == 11 * (T - 1)
    padded = {"input_ids": torch.cat([rows[:2], torch.zeros_like(rows[:2, :3])], 1)[:, :T]}
    padded["attention_mask"] = torch.ones_like(padded["input_ids"])
    padded["attention_mask"][1, 20:] = 0
    assert evaluate(model, [padded])["tokens"] == T - 1 + 19


@pytest.mark.parametrize("kind", ["dense", "mod", "accumulated"])
def test_resume_is_exact(make: Callable[..., Any], rows: torch.Tensor, tmp_path: Path, kind: str) -> None:
    """10 steps = 5 + 5 from a checkpoint, bit for bit, with dropout and a log window across the
    checkpoint."""
    more = {
        "dense": {},
        "mod": {"keep_ratio": 0.4, "what_if": 0.5, "router_lr": 1e-2, "ramp": 0.5},
        "accumulated": {"grad_accum": 2, "batch_size": 4},
    }[kind]
    mod = alternate_layers(init_gate=0.6) if kind == "mod" else None
    config = settings(save_every=5, log_every=2, **more)
    whole = train(make(mod=mod, attention_dropout=0.2), rows, TrainConfig(out=tmp_path / "whole", **config))

    short = TrainConfig(out=tmp_path / "cut", **config | {"max_minutes": 1e-9})
    cut = train(make(mod=mod, attention_dropout=0.2), rows, short)
    assert (cut.stopped, cut.steps) == ("time", 1)
    middle = make(seed=7, mod=mod, attention_dropout=0.2)
    path = tmp_path / "whole" / "checkpoints" / "step_5"
    resumed = train(middle, rows, TrainConfig(out=tmp_path / "again", resume=path, **config))
    other = make(seed=8, mod=mod, attention_dropout=0.2)
    last = train(other, rows, TrainConfig(out=tmp_path / "cut", resume="auto", **config))

    assert same_weights(whole.model, resumed.model)
    assert same_weights(whole.model, last.model)
    keys = [c for c in whole.history if c not in ("tokens_per_s", "seconds")]
    assert last.history[keys].equals(whole.history[keys])
    assert resumed.history[keys].equals(whole.history[keys].iloc[2:].reset_index(drop=True))


def test_finished_run_resumes_to_itself_and_can_be_extended(
    make: Callable[..., Any], rows: torch.Tensor, tmp_path: Path
) -> None:
    config = settings(steps=4, save_every=2)
    first = train(make(), rows, TrainConfig(out=tmp_path / "run", **config))
    again = train(make(seed=3), rows, TrainConfig(out=tmp_path / "run", resume="auto", **config))
    assert same_weights(first.model, again.model)
    assert again.history.equals(first.history)
    longer = train(
        make(seed=4), rows, TrainConfig(out=tmp_path / "run", resume="auto", **config | {"steps": 6})
    )
    assert longer.history["step"].tolist() == [1, 2, 3, 4, 5, 6]


def test_log_is_jsonl_without_duplicates(
    make: Callable[..., Any], rows: torch.Tensor, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    train(make(), rows, TrainConfig(out=out, **settings(steps=6, save_every=3)))
    newest = out / "checkpoints" / "step_6"
    newest.rename(out / "checkpoints" / ".step_6.tmp")  # a machine that died while it wrote this one
    with open(out / "log.jsonl", "a", encoding="utf-8") as file:
        file.write('{"step": 7, "lo')
    train(make(), rows, TrainConfig(out=out, resume="auto", **settings(steps=8, save_every=3)))
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert {"tokens", "loss", "lr", "grad_norm", "tokens_per_s", "seconds"} <= set(lines[0])


def test_checkpoints_are_pruned_and_the_model_is_saved(
    make: Callable[..., Any], rows: torch.Tensor, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    result = train(make(), rows, TrainConfig(out=out, **settings(steps=9, save_every=2, keep_last=2)))
    assert sorted(p.name for p in (out / "checkpoints").iterdir()) == ["step_8", "step_9"]
    saved = AutoModelForCausalLM.from_pretrained(out / "model")
    with torch.no_grad():
        assert torch.equal(saved(rows[:2]).logits, result.model(rows[:2]).logits)
    assert json.loads((out / "run.json").read_text())["batch_size"] == 8


def test_keep_ratio_reaches_its_target(make: Callable[..., Any], rows: torch.Tensor, tmp_path: Path) -> None:
    model = make()
    train(model, rows, TrainConfig(**settings(steps=60)))
    before = evaluate(model, rows)["loss"]
    modlab.convert(model, alternate_layers(keep_first=1))
    config = TrainConfig(out=tmp_path / "run", **settings(steps=150, keep_ratio=0.5, lam=8.0, router_lr=1e-2))
    result = train(model, rows, config, eval_data=rows)
    history = result.history
    assert history["keep_ratio"].iloc[0] == 1.0
    assert history["target"].iloc[0] == 1.0 and history["target"].iloc[-1] == 0.5
    found = evaluate(model, rows)
    assert abs(found["keep_ratio"] - 0.5) < 0.1
    assert found["loss"] < before, "the routed model learns on while it skips half"
    assert found["keep_ratio"] == pytest.approx((found["keep_1"] + found["keep_3"]) / 2)
    reloaded, kept = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model"), model.state_dict()
    assert all(torch.equal(tensor, kept[name]) for name, tensor in reloaded.state_dict().items())
    assert "mod_router" in (tmp_path / "run" / "model" / "modlab_router.safetensors").read_bytes().decode(
        "latin-1"
    )


def test_what_if_steps_are_spread_and_counted(make: Callable[..., Any], rows: torch.Tensor) -> None:
    for share, steps in ((0.0, 0), (0.25, 25), (0.3, 30), (1.0, 100)):
        chosen = [s for s in range(100) if is_what_if(share, s)]
        assert len(chosen) == steps
        assert chosen[:1] == [0][: len(chosen)]
    gaps = [s for s in range(100) if is_what_if(0.25, s)]
    assert {b - a for a, b in zip(gaps, gaps[1:], strict=False)} == {4}
    model = make(mod=alternate_layers())
    seen = []
    model.model.register_forward_pre_hook(lambda *_: seen.append(model.mod.what_if))
    model.mod.what_if = False
    train(model, rows, TrainConfig(**settings(steps=4, what_if=0.5)))
    assert seen == [True, False, True, False]
    assert model.mod.what_if is False, "the model's own setting comes back"


@pytest.mark.parametrize(
    ("mod", "config", "column"),
    [
        (modlab.MoDConfig.topk(0.5), {}, "objective"),
        (modlab.MoDConfig.paper(), {"objective": "load", "alpha": 0.1}, "objective"),
        (alternate_layers(), {"objective": "none"}, None),
        (alternate_layers(), {"per_layer": True, "ramp": 0.0}, "objective"),
    ],
    ids=["topk", "load", "none", "per layer"],
)
def test_every_objective_trains_its_routers(
    make: Callable[..., Any],
    rows: torch.Tensor,
    mod: modlab.MoDConfig,
    config: dict[str, Any],
    column: str | None,
) -> None:
    model = make(mod=mod)
    before = {n: p.clone() for n, p in model.named_parameters() if "router" in n}
    result = train(model, rows, TrainConfig(**settings(steps=3, **config)))
    assert all(not torch.equal(p, before[n]) for n, p in model.named_parameters() if n in before)
    assert (result.history["objective"] > 0).all() if column else (result.history["objective"] == 0).all()
    if mod.operator == "topk":
        assert result.history["keep_ratio"].iloc[-1] == pytest.approx(0.5, abs=0.15)


def test_freeze_base_trains_routers_alone(make: Callable[..., Any], rows: torch.Tensor) -> None:
    model = make(mod=alternate_layers())
    before = {n: p.clone() for n, p in model.named_parameters()}
    train(model, rows, TrainConfig(**settings(steps=2, freeze_base=True)))
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert changed == {n for n in before if "router" in n}
    assert all(p.requires_grad for p in model.parameters())


def test_kl_pulls_towards_the_teacher(make: Callable[..., Any], rows: torch.Tensor) -> None:
    teacher = train(make(seed=1), rows, TrainConfig(**settings(steps=30))).model
    weights = [p.clone() for p in teacher.parameters()]
    config = TrainConfig(**settings(steps=30, kl=1.0))
    kl = train(make(seed=2), rows, config, teacher=teacher).history["kl"]
    assert kl.iloc[-1] < 0.3 * kl.iloc[0]
    assert all(
        torch.equal(a, b) and b.grad is None for a, b in zip(weights, teacher.parameters(), strict=True)
    )


def test_accumulation_equals_a_larger_batch(make: Callable[..., Any], rows: torch.Tensor) -> None:
    large = train(make(), rows, TrainConfig(**settings(steps=4)))
    small = train(make(), rows, TrainConfig(**settings(steps=4, batch_size=4, grad_accum=2)))
    for a, b in zip(large.model.parameters(), small.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)
    assert small.history["loss"].tolist() == pytest.approx(large.history["loss"].tolist(), rel=1e-4)


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


def test_budget_keeps_what_is_asked_at_every_step(make: Callable[..., Any], rows: torch.Tensor) -> None:
    model = make(mod=modlab.MoDConfig(skip="layer", layers=[1, 2]))
    scatter_gates(model)
    config = settings(steps=40, objective="budget", keep_ratio=0.4, hold=0.25, ramp=0.0, log_every=1)
    history = train(model, rows, TrainConfig(**config), eval_data=rows[:32]).history
    assert history["keep_ratio"][:10].tolist() == [1.0] * 10 == history["target"][:10].tolist()
    assert history["keep_ratio"][20:].mean() == pytest.approx(0.4, abs=0.03)
    assert history["eval_keep_ratio"].iloc[-1] == pytest.approx(0.4, abs=0.03)
    assert all(isinstance(p, float) for p in model.mod.thresholds.values())


def test_budget_over_a_range_ends_at_the_keep_ratio(make: Callable[..., Any], rows: torch.Tensor) -> None:
    model = make(mod=modlab.MoDConfig(skip="layer", layers=[1, 2]))
    scatter_gates(model)
    config = settings(
        steps=40, objective="budget", keep_ratio=0.5, keep_range=(0.3, 0.9), ramp=0.0, calibrate=True
    )
    history = train(model, rows, TrainConfig(**config), eval_data=rows[:32]).history
    assert history["keep_ratio"][5:].min() < 0.45 and history["keep_ratio"][5:].max() > 0.75
    assert history["eval_keep_ratio"].iloc[-1] == pytest.approx(0.5, abs=0.03)


def test_a_run_ends_calibrated(make: Callable[..., Any], rows: torch.Tensor) -> None:
    """The penalty alone has not got there in so few steps; the thresholds are moved."""
    ends = []
    for calibrated in (False, True):
        model = make(mod=alternate_layers())
        scatter_gates(model)
        config = settings(steps=6, keep_ratio=0.3, calibrate=calibrated)
        ends.append(
            train(model, rows, TrainConfig(**config), eval_data=rows).history["eval_keep_ratio"].iloc[-1]
        )
        assert set(model.mod.thresholds.values()) == {0.5}  # the gates moved
    assert abs(ends[0] - 0.3) > 0.05 and ends[1] == pytest.approx(0.3, abs=0.02)


def test_each_layer_is_calibrated_where_each_has_to_keep_the_share(
    make: Callable[..., Any], rows: torch.Tensor
) -> None:
    model = make(mod=modlab.MoDConfig(skip="layer", layers=[1, 2, 3]))
    scatter_gates(model)
    config = settings(steps=6, lr=1e-6, keep_ratio=0.4, per_layer=True, calibrate=True)
    train(model, rows, TrainConfig(**config))
    found = evaluate(model, rows)
    assert [found[f"keep_{i}"] for i in (1, 2, 3)] == pytest.approx([0.4] * 3, abs=0.05)


def test_thresholds_of_their_own_keep_their_distance(make: Callable[..., Any], rows: torch.Tensor) -> None:
    """Calibrated, all layers move by one amount: what one keeps beside the others was trained."""
    thresholds = {1: 0.4, 2: 0.6}
    model = make(mod=modlab.MoDConfig(skip="layer", layers=[1, 2], p=thresholds))
    scatter_gates(model)
    biases = [model.model.layers[i].mod_router.bias.item() for i in (1, 2)]
    train(model, rows, TrainConfig(**settings(steps=1, lr=1e-9, keep_ratio=0.3, calibrate=True)))
    moved = [model.model.layers[i].mod_router.bias.item() for i in (1, 2)]
    assert moved[0] - biases[0] == pytest.approx(moved[1] - biases[1], abs=1e-4)
    assert abs(moved[0] - biases[0]) > 0.1 and model.mod.thresholds == thresholds
    assert evaluate(model, rows)["keep_ratio"] == pytest.approx(0.3, abs=0.03)


def test_a_stopped_budget_run_leaves_plain_thresholds(
    make: Callable[..., Any], rows: torch.Tensor, tmp_path: Path
) -> None:
    class Stop:
        def step(self, step: int, share: float) -> bool:
            assert all(isinstance(p, float) for p in model.mod.thresholds.values())
            return step < 7

        def log(self, row: dict[str, Any]) -> None:
            pass

    model = make(mod=modlab.MoDConfig(skip="layer", layers=[1, 2]))
    scatter_gates(model)
    config = settings(steps=20, objective="budget", keep_ratio=0.4, ramp=0.0, log_every=10)
    assert train(model, rows, TrainConfig(**config), monitor=Stop()).interrupted
    model.save_pretrained(tmp_path / "model")


def test_a_finished_budget_run_resumes_to_itself(
    make: Callable[..., Any], rows: torch.Tensor, tmp_path: Path
) -> None:
    config = settings(steps=13, objective="budget", keep_ratio=0.4, ramp=0.0, log_every=10, save_every=13)
    found = []
    for _ in range(2):
        model = make(mod=modlab.MoDConfig(skip="layer", layers=[1, 2]))
        scatter_gates(model)
        train(model, rows, TrainConfig(out=tmp_path / "run", resume="auto", **config))
        saved = json.loads((tmp_path / "run" / "model" / "modlab_config.json").read_text())
        found.append((dict(model.mod.thresholds), saved))
    assert found[0] == found[1]
    assert set(found[0][0].values()) != {0.5}


def test_an_interrupt_while_calibrating_keeps_the_run(
    make: Callable[..., Any], rows: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("modlab.training.calibration.calibrate", interrupted)
    model = make(mod=alternate_layers())
    scatter_gates(model)
    before = {n: p.detach().clone() for n, p in model.named_parameters() if n.endswith("router.bias")}
    with pytest.warns(UserWarning, match="thresholds stay as trained: KeyboardInterrupt"):
        train(model, rows, TrainConfig(out=tmp_path / "run", **settings(steps=1, lr=1e-9, calibrate=True)))
    assert (tmp_path / "run" / "model" / "config.json").exists()
    after = dict(model.named_parameters())
    assert all(torch.allclose(after[n], bias, atol=1e-5) for n, bias in before.items())


def test_gates_that_enter_the_output_are_not_moved(make: Callable[..., Any], rows: torch.Tensor) -> None:
    model = make(mod=alternate_layers(gate="fused"))
    scatter_gates(model)
    config = settings(steps=6, lr=1e-6, keep_ratio=0.3, calibrate=True)
    biases = {n: p.detach().clone() for n, p in model.named_parameters() if n.endswith("router.bias")}
    history = train(model, rows, TrainConfig(**config), eval_data=rows).history
    assert history["eval_keep_ratio"].iloc[-1] == pytest.approx(0.3, abs=0.02)
    assert set(model.mod.thresholds.values()) != {0.5}
    assert all(torch.allclose(p, biases[n], atol=1e-3) for n, p in model.named_parameters() if n in biases)


def test_a_calibrated_run_resumes_to_itself_and_goes_on_from_what_was_trained(
    make: Callable[..., Any], rows: torch.Tensor, tmp_path: Path
) -> None:
    def run(out: str, steps: int, model: Any) -> Any:
        config = settings(steps=steps, keep_ratio=0.5, calibrate=True, save_every=3, ramp=0.0, warmup=0.0)
        config |= {"min_lr_ratio": 1.0, "out": tmp_path / out, "resume": "auto"}
        return train(model, rows, TrainConfig(**config)).model

    def fresh() -> Any:
        model = make(mod=alternate_layers())
        scatter_gates(model)
        return model

    first = run("a", 6, fresh())
    assert same_weights(run("a", 6, fresh()), first)  # nothing left to train: calibrated again
    assert same_weights(run("a", 9, fresh()), run("b", 9, fresh()))


def test_gates_that_cannot_be_split_stay(make: Callable[..., Any], rows: torch.Tensor) -> None:
    model = make(mod=alternate_layers())
    with pytest.warns(UserWarning, match="(?s)thresholds stay as trained.*all alike"):
        train(model, rows, TrainConfig(**settings(steps=1, lr=1e-9, keep_ratio=0.3, calibrate=True)))
    assert set(model.mod.thresholds.values()) == {0.5}


def test_ramp_falls_from_everything_to_the_target() -> None:
    values = [ramped_target(0.2, progress, 0.5) for progress in (0, 0.25, 0.5, 1)]
    assert values == pytest.approx([1.0, 0.6, 0.2, 0.2])
    assert ramped_target(0.2, 0.0, 0.0) == 0.2


def test_keep_target_holds_falls_and_spreads() -> None:
    config = TrainConfig(steps=1, keep_ratio=0.2, hold=0.25, ramp=0.5)
    assert [keep_target(config, 0, share) for share in (0.0, 0.2)] == [1.0, 1.0]
    assert keep_target(config, 0, 0.5) == pytest.approx(0.6)
    assert keep_target(config, 0, 0.9) == pytest.approx(0.2)
    config = TrainConfig(steps=1, objective="budget", keep_ratio=0.5, keep_range=(0.4, 0.8), ramp=0.0)
    targets = torch.tensor([keep_target(config, step, 0.5) for step in range(100)])
    assert 0.4 <= targets.min() < 0.41 and 0.79 < targets.max() <= 0.8
    assert targets[:10].mean().item() == pytest.approx(0.6, abs=0.03)


class Interrupting:
    """Batches that raise, or press Ctrl-C, when batch `at` is asked for."""

    def __init__(self, rows: torch.Tensor, at: int, press: Callable[[], None]) -> None:
        self.rows, self.at, self.press = rows, at, press

    def __iter__(self) -> Iterator[torch.Tensor]:
        for i in range(0, len(self.rows), 8):
            if i // 8 == self.at:
                self.press()
            yield self.rows[i : i + 8]


def raise_interrupt() -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    "press", [raise_interrupt, lambda: os.kill(os.getpid(), signal.SIGINT)], ids=["raised", "signal"]
)
def test_interrupted_run_saves_and_goes_on(
    make: Callable[..., Any], rows: torch.Tensor, tmp_path: Path, press: Callable[[], None]
) -> None:
    quiet = Interrupting(rows, -1, raise_interrupt)
    whole = train(make(), quiet, TrainConfig(**settings(steps=6)))
    handler = signal.getsignal(signal.SIGINT)
    cut = train(make(), Interrupting(rows, 3, press), TrainConfig(out=tmp_path / "run", **settings(steps=6)))
    assert cut.interrupted and 3 <= cut.steps <= 4 and not cut.model.training
    assert signal.getsignal(signal.SIGINT) is handler
    assert not (tmp_path / "run" / "model").exists()
    rest = train(make(seed=9), quiet, TrainConfig(out=tmp_path / "run", resume="auto", **settings(steps=6)))
    assert same_weights(whole.model, rest.model)
    assert rest.history["loss"].tolist() == whole.history["loss"].tolist()


def test_interrupt_without_a_folder_returns_what_there_is(
    make: Callable[..., Any], rows: torch.Tensor
) -> None:
    result = train(make(), Interrupting(rows, 2, raise_interrupt), TrainConfig(**settings()))
    assert result.interrupted and result.history["step"].tolist() == [1, 2]


def test_trains_outside_the_main_thread(make: Callable[..., Any], rows: torch.Tensor) -> None:
    """Notebook callbacks run in threads, where signal handlers cannot be set."""
    results = []
    thread = threading.Thread(
        target=lambda: results.append(train(make(), rows, TrainConfig(**settings(steps=2))))
    )
    thread.start()
    thread.join()
    assert results[0].steps == 2


def test_one_time_stream_ends_the_run(make: Callable[..., Any], rows: torch.Tensor, tmp_path: Path) -> None:
    stream = (rows[i : i + 8] for i in range(0, 40, 8))
    result = train(make(), stream, TrainConfig(out=tmp_path / "run", **settings(steps=50)))
    assert (result.stopped, result.steps) == ("data", 5)
    assert (tmp_path / "run" / "model" / "model.safetensors").is_file()


def test_minutes_alone_set_the_length(make: Callable[..., Any], rows: torch.Tensor) -> None:
    result = train(make(), rows, TrainConfig(max_minutes=0.03, batch_size=8, lr=1e-3, log_every=1))
    assert result.stopped == "finished"
    assert 1.8 <= result.seconds < 6
    rates = result.history["lr"]
    assert rates.iloc[-1] < 0.2 * 1e-3 < 0.9 * 1e-3 < rates.max()


def test_lr_schedule() -> None:
    config = TrainConfig(steps=100, warmup=10, min_lr_ratio=0.1)
    factors = [lr_factor(config, s, s / 100) for s in range(100)]
    assert factors[0] == pytest.approx(0.1, rel=0.01) and factors[4] == pytest.approx(0.5, rel=0.02)
    assert factors[10:] == sorted(factors[10:], reverse=True)
    assert 0.1 <= factors[-1] < 0.105
    assert lr_factor(TrainConfig(steps=100, warmup=0), 0, 0.0) == 1.0
    assert lr_factor(TrainConfig(max_minutes=1, warmup=0.1), 0, 0.05) == pytest.approx(0.5, rel=0.01)


def test_tokens_become_steps(make: Callable[..., Any], rows: torch.Tensor) -> None:
    result = train(make(), rows, TrainConfig(tokens=5 * 8 * T - 1, batch_size=4, grad_accum=2, lr=1e-3))
    assert result.steps == 5


def test_non_finite_loss_keeps_the_last_checkpoint(
    make: Callable[..., Any], rows: torch.Tensor, tmp_path: Path
) -> None:
    model, out = make(), tmp_path / "run"
    calls = []

    def poison(module: Any, args: Any, output: Any) -> Any:
        calls.append(1)
        return output * float("nan") if len(calls) == 6 else output

    model.lm_head.register_forward_hook(poison)
    with pytest.raises(ModlabError, match="not finite at or before step 6.*step_4"):
        train(model, rows, TrainConfig(out=out, **settings(save_every=2)))
    assert sorted(p.name for p in (out / "checkpoints").iterdir()) == ["step_2", "step_4"]
    assert not (out / "model").exists()
    rest = train(make(seed=5), rows, TrainConfig(out=out, resume="auto", **settings(save_every=2)))
    assert same_weights(rest.model, train(make(), rows, TrainConfig(**settings())).model)


def test_full_disk_during_a_checkpoint(
    make: Callable[..., Any], rows: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from accelerate import Accelerator

    real, calls = Accelerator.save_state, []

    def save_state(self: Any, folder: str, **kwargs: Any) -> Any:
        calls.append(folder)
        if len(calls) == 2:
            Path(folder, "model.safetensors").write_bytes(b"half")
            raise OSError(28, "No space left on device")
        return real(self, folder, **kwargs)

    monkeypatch.setattr(Accelerator, "save_state", save_state)
    with pytest.raises(ModlabError, match="No space left.*Earlier ones are intact"):
        train(make(), rows, TrainConfig(out=tmp_path / "run", **settings(save_every=2)))
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["step_2"]
    rest = train(make(), rows, TrainConfig(out=tmp_path / "run", resume="auto", **settings(save_every=2)))
    assert rest.steps == 10


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"steps": None}, "How long to train"),
        ({"steps": 0}, "steps=0"),
        ({"steps": -3}, "steps=-3"),
        ({"tokens": 100}, "give one of them"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"lr": 0.0}, "lr=0.0"),
        ({"lr": float("nan")}, "lr=nan"),
        ({"keep_ratio": 0.0}, "keep_ratio=0.0"),
        ({"keep_ratio": 1.5}, "keep_ratio=1.5"),
        ({"what_if": 1.5}, "what_if=1.5"),
        ({"objective": "budget", "keep_range": (0.3,)}, "two shares"),
        ({"hold": 0.9, "ramp": 0.2}, "more than the whole run"),
        ({"objective": "budget", "keep_range": (0.3, 0.5), "keep_ratio": 0.6}, "keep_ratio=0.6"),
        ({"keep_range": (0.3, 0.5), "keep_ratio": 0.4}, "needs objective='budget'"),
        ({"objective": "magic"}, "objective='magic'"),
        ({"mixed_precision": "fp8"}, "mixed_precision='fp8'"),
        ({"betas": (0.9, 1.0)}, "betas="),
        ({"save_every": 5}, "need a folder"),
        ({"resume": "auto"}, "need a folder"),
        ({"objective": "load"}, "the model is dense"),
        ({"objective": "target"}, "the model is dense"),
        ({"freeze_base": True}, "the model is dense"),
        ({"kl": 1.0}, "needs a teacher"),
        ({"batch_size": 1000}, "fewer than a batch"),
    ],
)
def test_refuses_bad_settings(
    make: Callable[..., Any], rows: torch.Tensor, tmp_path: Path, config: dict[str, Any], message: str
) -> None:
    model = make()
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(ModlabError, match=message) as caught:
        train(model, rows, TrainConfig(**settings(**config)))
    assert str(caught.value).count("\n") < 3
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize(
    ("mod", "config", "message"),
    [
        (alternate_layers(), {"objective": "bce"}, "does not fit threshold"),
        (modlab.MoDConfig.topk(), {"objective": "target"}, "does not fit topk"),
    ],
)
def test_refuses_settings_of_another_routing(
    make: Callable[..., Any], rows: torch.Tensor, mod: modlab.MoDConfig, config: dict[str, Any], message: str
) -> None:
    with pytest.raises(ModlabError, match=message):
        train(make(mod=mod), rows, TrainConfig(**settings(**config)))


def test_refuses_data_that_does_not_fit(make: Callable[..., Any], rows: torch.Tensor) -> None:
    model, config = make(), TrainConfig(**settings())
    for data, message in (
        (rows.repeat(1, 2), "rows of 64 tokens, but the model's context is 32"),
        (rows + 1, "ids from 1 to 64, but the model has 64 tokens"),
        (rows[:, :1], "rows of one token"),
        (rows[:0], "empty"),
        ([rows[:8], rows.repeat(1, 2)[:8]], "context is 32"),  # met in step 2
    ):
        with pytest.raises(ModlabError, match=message):
            train(model, data, config)
    with pytest.raises(ModlabError, match="eval_data holds token ids"):
        train(model, rows, config, eval_data=rows + 1)


def test_refuses_rows_in_which_every_key_is_recent(make: Callable[..., Any], rows: torch.Tensor) -> None:
    model = make(mod=modlab.MoDConfig(keep_recent=rows.shape[1]))
    with pytest.raises(ModlabError, match=f"rows of at most {rows.shape[1]} tokens.*keep_recent"):
        train(model, rows, TrainConfig(**settings(steps=1)))
    model.mod.config.keep_recent -= model.mod.config.keep_first + 2
    train(model, rows, TrainConfig(**settings(steps=1)))


def test_refuses_unsuitable_teachers(make: Callable[..., Any], rows: torch.Tensor) -> None:
    model = make()
    for teacher, kl, message in (
        (make(), 0.0, "kl=0"),
        (model, 1.0, "the model itself"),
        (make(mod=alternate_layers()), 1.0, "teacher is converted"),
        (make(vocab_size=80), 1.0, "80 tokens"),
    ):
        with pytest.raises(ModlabError, match=message):
            train(model, rows, TrainConfig(**settings(kl=kl)), teacher=teacher)


def test_refuses_a_folder_that_is_taken(make: Callable[..., Any], rows: torch.Tensor, tmp_path: Path) -> None:
    out = tmp_path / "run"
    train(make(), rows, TrainConfig(out=out, **settings(steps=2, save_every=1)))
    log = (out / "log.jsonl").read_text()
    with pytest.raises(ModlabError, match="already holds a run.*resume='auto'"):
        train(make(), rows, TrainConfig(out=out, **settings(steps=2)))
    with pytest.raises(ModlabError, match=r"seed=1 \(was 0\)"):
        train(make(), rows, TrainConfig(out=out, resume="auto", **settings(steps=4, seed=1)))
    with pytest.raises(ModlabError, match="no folder"):
        train(make(), rows, TrainConfig(out=out, resume=out / "step_99", **settings(steps=4)))
    with pytest.raises(ModlabError, match="belongs to another model"):
        train(make(hidden_size=16), rows, TrainConfig(out=out, resume="auto", **settings(steps=4)))
    assert (out / "log.jsonl").read_text() == log
    (tmp_path / "file").write_text("")
    with pytest.raises(ModlabError, match="is a file"):
        train(make(), rows, TrainConfig(out=tmp_path / "file", **settings()))


def test_result_shows_itself(make: Callable[..., Any], rows: torch.Tensor) -> None:
    result = train(make(mod=alternate_layers()), rows, TrainConfig(**settings(steps=3)), eval_data=rows[:8])
    figure = result.plot()
    assert {t.name for t in figure.data} == {"loss", "eval_loss", "keep_ratio", "keep_1", "keep_3", "target"}
    assert len(figure.data[0].x) == 3
    dense = train(make(), rows, TrainConfig(**settings(steps=2)))
    assert [t.name for t in dense.plot().data] == ["loss"]
    assert "2 steps" in dense._repr_html_() and "<table" in dense._repr_html_()


def test_packed_text_to_trained_model(make: Callable[..., Any], tmp_path: Path) -> None:
    """The way a user takes: text file, packed rows, train."""
    (tmp_path / "text.txt").write_text("def add(a, b): return a + b\n" * 200, encoding="utf-8")
    tokenizer = character_tokenizer(bos_token="<s>", eos_token="</s>")
    data = packed(tmp_path / "text.txt", tokenizer, T, cache_dir=tmp_path / "cache")
    result = train(make(), data, TrainConfig(out=tmp_path / "run", **settings(steps=30)), tokenizer=tokenizer)
    assert result.history["loss"].iloc[-1] < 0.7 * result.history["loss"].iloc[0]
    assert (tmp_path / "run" / "model" / "tokenizer.json").is_file()


def launch(out: Path, processes: int, batch_size: int) -> list[dict[str, Any]]:
    """The worker under `accelerate launch`; one report a rank."""
    out.mkdir()
    worker = Path(__file__).with_name("train_in_processes.py")
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_machines", "1"]
    command += ["--num_processes", str(processes), "--mixed_precision", "no", "--dynamo_backend", "no"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(worker.parents[1])}
    environment["ACCELERATE_USE_CPU"] = "true"
    if (
        processes > 1
    ):  # the launcher of local process groups carries this name on CPUs too; port 0 picks a free one
        command += ["--multi_gpu", "--main_process_port", "0"]
    done = subprocess.run(
        [*command, str(worker), str(out), str(batch_size)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(path.read_text()) for path in sorted(out.glob("rank_*.json"))]


def test_two_processes_do_what_one_does(tmp_path: Path) -> None:
    (alone,) = launch(tmp_path / "one", 1, 4)
    pair = launch(tmp_path / "two", 2, 2)
    assert len(pair) == 2
    for moment in ("weights", "calibrated"):
        assert pair[0][moment] == pair[1][moment], "both processes hold the same model"
    assert len(alone["calibrated_on"]) == 1
    assert pair[0]["calibrated_on"] == pair[1]["calibrated_on"] == alone["calibrated_on"]
    assert alone["keep_ratio"] == pytest.approx(0.5, abs=0.01)
    assert pair[0]["keep_ratio"] == pytest.approx(0.5, abs=0.01)
    for name, total in alone["weights"].items():
        assert pair[0]["weights"][name] == pytest.approx(total, rel=1e-4, abs=1e-4), name
    for part, columns in (
        ("dense", ("loss", "grad_norm", "tokens")),
        ("mod", ("loss", "keep_ratio", "objective")),
    ):
        for column in columns:
            assert pair[0][part][column] == pytest.approx(alone[part][column], rel=1e-3, abs=1e-5), (
                part,
                column,
            )
    assert pair[0]["dense"]["eval_loss"][-1] == pytest.approx(alone["dense"]["eval_loss"][-1], rel=1e-4)
    assert pair[0]["tokens"] == alone["tokens"]
    lines = (tmp_path / "two" / "mod" / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4]


@pytest.mark.data
@pytest.mark.long
def test_real_weights_reach_a_keep_ratio(data_dir: Path, tmp_path: Path) -> None:
    """Trained third-party weights: converting changes nothing, and 80 steps bring half the tokens at a fair
    loss."""
    model, tokenizer = modlab.load(data_dir / "models" / "stories260K")
    text = data_dir / "text" / "tinystories_4276_truecased.jsonl"
    data, heldout = (
        packed(text, tokenizer, 128, split=split, limit_tokens=limit, cache_dir=tmp_path / "cache")
        for split, limit in (("train", 100_000), ("heldout", 20_000))
    )
    dense = evaluate(model, heldout)["loss"]
    modlab.convert(model, alternate_layers(keep_first=2))
    assert evaluate(model, heldout)["loss"] == pytest.approx(dense, abs=1e-6)
    settings = {"steps": 80, "batch_size": 8, "lr": 3e-4, "router_lr": 1e-2, "keep_ratio": 0.5, "lam": 8.0}
    train(model, data, TrainConfig(**settings))
    found = evaluate(model, heldout)
    # Calibrated: without that, 0.545 kept at a loss of dense + 0.585.
    assert found["keep_ratio"] == pytest.approx(0.5, abs=0.03)
    assert found["loss"] < dense + 0.75


def test_a_monitor_is_told_and_may_end_the_run(make_llama: Any) -> None:
    class Watch:
        def __init__(self) -> None:
            self.steps: list[int] = []
            self.rows: list[dict[str, Any]] = []

        def step(self, step: int, share: float) -> bool:
            self.steps.append(step)
            assert share == pytest.approx(step / 10)
            return step < 4

        def log(self, row: dict[str, Any]) -> None:
            self.rows.append(row)

    watch = Watch()
    rows = [{"input_ids": torch.randint(3, 500, (2, 16))} for _ in range(10)]
    result = modlab.train(make_llama(), rows, TrainConfig(steps=10, log_every=2), monitor=watch)
    assert watch.steps == [1, 2, 3, 4] and [row["step"] for row in watch.rows] == [2, 4]
    assert result.interrupted and result.steps == 4


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
