"""objective="distil": its gradient, its rows, its memory, a run that learns, and what it refuses."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import modlab
from modlab.data.batches import IGNORE
from modlab.errors import ModlabError
from modlab.families.tiny_models import tiny_model
from modlab.hf.anatomy import decoder_layers
from modlab.routing.noise import Noise
from modlab.routing.recent_tokens import SAVING_TEXT
from modlab.routing.router import is_router
from modlab.training.calibration import keep_for_saving, saving_text
from modlab.training.config import TrainConfig
from modlab.training.divergence import divergence
from modlab.training.head import Head
from modlab.training.reach import Reach
from modlab.training.run import Run
from tests.helpers.models import dense_llama, scatter_gates
from tests.helpers.training import changes, same_weights

V, T = 48, 96
CONTEXT = 2048
HEADS = {"layers": "all", "gates": "kv_head", "router_hidden": 4, "keep_recent": 8}
SIZES = {"vocab_size": V, "num_hidden_layers": 2, "initializer_range": 0.2}


def routed(seed: int = 0, **changes: Any) -> Any:
    """A tiny Llama whose gates differ by token and head."""
    model = modlab.convert(dense_llama(seed, **(SIZES | changes)), modlab.MoDConfig(**HEADS))
    return scatter_gates(model)


def texts(rows: int = 32, length: int = T) -> Tensor:
    return torch.randint(3, V, (rows, length), generator=torch.Generator().manual_seed(1))


def distil(**changes: Any) -> TrainConfig:
    settings = {"objective": "distil", "steps": 6, "batch_size": 4, "log_every": 1, "calibrate": False}
    return TrainConfig(**{**settings, "keep_ratio": 0.3, "num_workers": 0, **changes})


def kl(student: Tensor, teacher: Tensor) -> Tensor:
    """Of each token, by whole logits."""
    log_s, log_t = student.float().log_softmax(-1), teacher.float().log_softmax(-1)
    return (log_t.exp() * (log_t - log_s)).sum(-1)


KINDS = ("llama", "gpt2", "gemma2", "cohere", "granite", "opt", "phi", "gpt_neox", "mixtral", "gemma3_text")


@pytest.mark.parametrize("model_type", KINDS)
def test_logits_behind_the_stack_are_the_models_own(model_type: str) -> None:
    """Scales, caps, biases and projections of the logits are the model's."""
    model = tiny_model(model_type).eval()
    ids = torch.randint(3, 200, (2, 9), generator=torch.Generator().manual_seed(0))
    head = Head(model)
    with torch.no_grad(), head.noting():
        logits = model(ids, use_cache=False).logits
    torch.testing.assert_close(head(head.states.flatten(0, 1)), logits.flatten(0, 1), rtol=1e-4, atol=1e-5)
    head.check(logits)


def test_logits_of_something_else_are_refused() -> None:
    model = dense_llama(**SIZES)
    head = Head(model)
    with torch.no_grad(), head.noting():
        logits = model(texts(1), use_cache=False).logits
    with pytest.raises(ModlabError, match="more than its last hidden states"):
        head.check(logits + torch.randn(logits.shape))


@pytest.mark.parametrize("chunk", [V, 7 * V, 10**9])
@pytest.mark.parametrize("model_type", ["llama", "gemma2"])
def test_value_and_gradient_are_those_of_whole_logits(model_type: str, chunk: int) -> None:
    model = tiny_model(model_type).eval().requires_grad_(False)
    ids = torch.randint(3, 200, (3, 8), generator=torch.Generator().manual_seed(0))
    head = Head(model)
    with torch.no_grad(), head.noting():
        model(ids, use_cache=False)
    teacher = head.states.flatten(0, 1)
    student = (teacher + 0.1 * torch.randn(teacher.shape)).requires_grad_()
    weight, targets = torch.rand(len(teacher)), torch.randint(0, 200, (len(teacher),))
    targets[::5] = IGNORE
    total, each, loss = divergence(head, student, teacher, weight, targets, chunk * 256 // V)
    plain = kl(head(student), head(teacher).detach())
    torch.testing.assert_close(each, plain.detach(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(total, (plain * weight).sum(), rtol=1e-4, atol=1e-6)
    predicted = torch.nn.functional.cross_entropy(
        head(student), targets, ignore_index=IGNORE, reduction="none"
    )
    torch.testing.assert_close(loss, predicted.detach(), rtol=1e-4, atol=1e-5)
    wanted = torch.autograd.grad((plain * weight).sum(), student)[0]
    found = torch.autograd.grad(3 * total, student)[0]
    torch.testing.assert_close(found, 3 * wanted, rtol=1e-3, atol=1e-7)


def gradients(model: Any, rows: Tensor, config: TrainConfig) -> dict[str, Tensor]:
    """Of one step of `modlab.train`."""
    from torch.optim.optimizer import register_optimizer_step_pre_hook

    seen: dict[str, Tensor] = {}

    def note(*_: Any) -> None:
        seen.update({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})

    handle = register_optimizer_step_pre_hook(note)
    try:
        modlab.train(model, rows, config)
    finally:
        handle.remove()
    return seen


@pytest.mark.parametrize("checkpointed", [False, True])
def test_a_step_is_kl_of_whole_logits_and_the_pull(
    monkeypatch: pytest.MonkeyPatch, checkpointed: bool
) -> None:
    monkeypatch.setattr("modlab.training.run.open_gates", lambda *_: None)
    monkeypatch.setattr("modlab.training.divergence.ON_CPU", 10 * V)  # ten tokens' logits at a time
    rows, config = texts(4), distil(steps=1, max_grad_norm=1e9, ramp=0.0, lam=3.0)
    model = routed()
    if checkpointed:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    found = gradients(model, rows, config)
    assert found and all(is_router(name) for name in found), "the base is frozen"

    plain = routed().train()
    order = next(modlab.training.loader.open_batches(rows).iterate(4, 0))["input_ids"]
    plain.mod.noise, plain.mod.what_if = Noise(0, 0, torch.arange(4)), True
    with modlab.record_routing(plain, detach=False) as recording:
        student = plain(order, use_cache=False).logits
    with torch.no_grad(), modlab.routing_off(plain):
        teacher = plain(order, use_cache=False).logits
    step = recording.steps[0]
    kept = torch.stack([step.keep[i].float().mean() for i in plain.mod.layers]).mean()
    gate = torch.stack([step.gate[i].mean() for i in plain.mod.layers]).mean()
    over = kept + gate - gate.detach() - 0.3
    assert over > 0
    loss = kl(student, teacher).mean() + 3.0 * over
    names = [n for n, p in plain.named_parameters() if is_router(n)]
    wanted = torch.autograd.grad(loss, [dict(plain.named_parameters())[n] for n in names])
    for name, value in zip(names, wanted, strict=True):
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-6, msg=name)


def test_the_pull_is_one_sided() -> None:
    from modlab.training import objectives

    logit = torch.zeros(1, 4, requires_grad=True)
    step: Any = type("Step", (), {})()
    step.real, step.gate, step.keep = torch.ones(1, 4).bool(), {0: torch.sigmoid(logit)}, {}
    slopes = []
    for kept in (1, 0):
        step.keep = {0: torch.full((1, 4), bool(kept))}
        term = objectives.pull_objective(step, 0.5, lam=2.0)
        assert term.item() == pytest.approx(1.0 if kept else 0.1)
        slopes.append(torch.autograd.grad(term, logit, retain_graph=True)[0][0, 0].item())
    assert slopes[0] == pytest.approx(2 * 0.25 / 4)
    assert slopes[1] == pytest.approx(-0.2 * 0.25 / 4)


def test_every_other_row_has_a_threshold_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    from modlab.routing.forward import ForwardHooks

    shifts: list[Tensor] = []
    real = ForwardHooks._new_call

    def noting(self: Any, *args: Any) -> Any:
        call = real(self, *args)
        if call.row_shift is not None:
            shifts.append(call.row_shift)
        return call

    monkeypatch.setattr(ForwardHooks, "_new_call", noting)
    model = routed()
    result = modlab.train(model, texts(), distil(steps=4, keep_range=(0.1, 0.8)))
    assert len(shifts) == 4
    for shift in shifts:
        assert torch.equal(shift[::2], torch.zeros(2)) and (shift[1::2] != 0).all()
    assert len(torch.unique(torch.stack(shifts)[:, 1::2])) == 8
    assert model.mod.row_shift is None
    assert {"kl", "keep_ratio", "target", "loss"} <= set(result.history.columns)


def test_rows_of_milder_savings_count_more(monkeypatch: pytest.MonkeyPatch) -> None:
    from modlab.training import distillation
    from modlab.training.threshold_control import ThresholdControl

    weights: list[Tensor] = []
    shares: list[Tensor] = []
    whole, expected = distillation.divergence, ThresholdControl.expected

    def noting(head: Any, student: Tensor, taught: Tensor, weight_S: Tensor, targets: Tensor) -> Any:
        weights.append(weight_S)
        return whole(head, student, taught, weight_S, targets)

    def seeing(self: Any, share_B: Tensor) -> Tensor:
        shares.append(share_B)
        return expected(self, share_B)

    monkeypatch.setattr(distillation, "divergence", noting)
    monkeypatch.setattr(ThresholdControl, "expected", seeing)
    settings = {"steps": 3, "ramp": 0.0, "keep_range": (0.1, 0.8)}
    modlab.train(routed(), texts(), distil(row_weight=1.0, **settings))
    assert len(weights) == len(shares) == 3
    for weight_S, share_B in zip(weights, shares, strict=True):
        weight_B = weight_S.reshape(4, -1).sum(1) * 4  # 1: as much as one of four rows
        torch.testing.assert_close(weight_B[::2], torch.ones(2))
        torch.testing.assert_close(weight_B[1::2], share_B[1::2] / 0.1)
    weights.clear()
    shares.clear()
    near = {**settings, "keep_range": (0.05, 0.8), "recent_range": (2, 16), "steps": 8}
    modlab.train(routed(), texts(), distil(row_weight=1.0, **near))
    assert len({round(float(1 / share_B[1])) for share_B in shares}) > 2, "steps of several savings"
    for weight_S, share_B in zip(weights, shares, strict=True):
        weight_B = weight_S.reshape(4, -1).sum(1) * 4
        torch.testing.assert_close(weight_B[1::2], share_B[1::2] / 0.05, msg="20x, whatever the step's own")
    weights.clear()
    modlab.train(routed(), texts(), distil(**settings))
    assert all(torch.equal(weight_S, weight_S[:1].expand_as(weight_S)) for weight_S in weights)


def test_evaluations_in_a_run_know_no_thresholds_of_rows() -> None:
    kept: list[float] = []
    model = routed()

    class Watcher:
        def step(self, step: int, share: float) -> bool:
            assert model.mod.row_shift is None and model.mod.row_recent is None
            model.mod.row_shift = torch.full((4,), 3.0)
            model.eval()
            for shift in (model.mod.row_shift, None):
                before, model.mod.row_shift = model.mod.row_shift, shift
                with torch.no_grad(), modlab.record_routing(model) as recording:
                    model(texts(4), use_cache=False)
                kept.append(sum(float(keep.float().mean()) for keep in recording.steps[0].keep.values()))
                model.mod.row_shift = before
            model.train()
            return True

        def log(self, row: dict[str, Any]) -> None: ...

    modlab.train(model, texts(), distil(steps=2, keep_range=(0.1, 0.8)), monitor=Watcher())
    assert kept[::2] == kept[1::2]


def test_thresholds_of_rows_give_the_expected_share() -> None:
    from modlab.training.threshold_control import ThresholdControl

    control = ThresholdControl([0], False, torch.device("cpu"))
    z = torch.randn(64, 128, generator=torch.Generator().manual_seed(0)) * 4
    step: Any = type("Step", (), {})()
    step.real, step.position_ids, step.logit = torch.ones(64, 128).bool(), torch.arange(128) + 4, {0: z + 1.5}
    step.position_ids = step.position_ids.expand(64, -1)
    assert control.expected(torch.tensor([0.5])).item() == 0
    control.see(step, 0, {0: 1.5})
    control.advance(lambda value: value)
    keep = torch.tensor([0.7, 0.25, 0.06])
    found = torch.sigmoid(z.flatten()[:, None] - control.expected(keep)).mean(0)
    torch.testing.assert_close(found, keep, rtol=5e-3, atol=1e-3)


def noted_calls(monkeypatch: pytest.MonkeyPatch, model: Any) -> list[Any]:
    """The calls of the student's passes, as they come."""
    from modlab.routing.forward import ForwardHooks

    calls: list[Any] = []
    real = ForwardHooks._new_call

    def noting(self: Any, *args: Any) -> Any:
        call = real(self, *args)
        if model.training:
            calls.append(call)
        return call

    monkeypatch.setattr(ForwardHooks, "_new_call", noting)
    return calls


def test_recent_tokens_go_with_the_rows_savings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every step has a number of its own, in all of its forwards; afterwards the model has its own again."""
    from modlab.training.schedule import step_saving

    model = routed()
    calls = noted_calls(monkeypatch, model)
    settings = {"keep_range": (0.05, 0.8), "recent_range": (2, 16), "ramp": 0.0, "steps": 8}
    modlab.train(model, texts(), distil(grad_accum=2, batch_size=2, **settings))
    assert len(calls) == 8 * 4  # two parts, each looked at once before
    for step in range(8):
        near = step_saving(step)
        for call in calls[4 * step : 4 * step + 4]:
            assert call.recent == {2.0: 16, 4.0: 8, 8.0: 4, 16.0: 2}[near]
    assert {step_saving(step) for step in range(8)} == {2.0, 4.0, 8.0, 16.0}
    assert model.mod.row_recent is None and model.mod.recent == HEADS["keep_recent"]


def test_recent_tokens_by_saving_need_a_skip_that_has_some() -> None:
    model = modlab.convert(dense_llama(0, **SIZES), modlab.MoDConfig(skip="layer", layers="all"))
    with pytest.raises(ModlabError, match="skip='layer' no token is seen for being recent"):
        modlab.train(model, texts(), distil(keep_range=(0.1, 0.8), recent_range=(2, 16)))


def test_a_finished_run_with_recent_tokens_by_saving_goes_on(tmp_path: Path) -> None:
    model = routed(max_position_embeddings=8192)
    settings = {"keep_range": (0.04, 0.8), "recent_range": (128, 1024), "keep_ratio": 0.25, "calibrate": True}
    modlab.train(model, texts(), distil(out=tmp_path, steps=4, save_every=2, **settings))
    assert model.mod.recent == 512
    result = modlab.train(model, texts(), distil(out=tmp_path, steps=6, resume="auto", **settings))
    assert result.steps == 6


def test_a_steps_gradient_is_that_of_a_model_with_its_recent_tokens() -> None:
    one, other = routed(), routed()
    ids = texts(2)
    one.mod.row_recent = 3
    modlab.set_keep_recent(other, 3)
    for model in (one, other):
        model.train()
        model.mod.noise = Noise(0, 0, torch.arange(2))
        model(ids, labels=ids).loss.backward()
    for p, q in zip(one.parameters(), other.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None)
        assert p.grad is None or torch.equal(p.grad, q.grad)


def test_a_run_with_recent_tokens_by_saving_ends_at_what_was_asked() -> None:
    """And its savings are those of long texts, recent tokens counted."""
    model = routed(max_position_embeddings=8192)
    settings = {"keep_ratio": 0.25, "keep_range": (0.04, 0.8), "recent_range": (128, 1024), "calibrate": True}
    modlab.train(model, texts(), distil(**settings))
    trained = model.mod.trained
    assert trained.seq_len == 8192 and set(trained.recent) == set(trained.savings)
    assert trained.recent[4.0] == 512 == model.mod.recent
    assert set(model.mod.thresholds.values()) == {trained.savings[4.0]}
    found = modlab.measure.evaluate(model, texts(), cache=False)
    assert found.keep_ratio == pytest.approx((8192 / 4 - 512) / (8192 - 512), abs=0.02)


def test_a_resumed_run_is_the_uninterrupted_one(tmp_path: Path) -> None:
    settings = {"keep_range": (0.1, 0.8), "save_every": 3}
    whole = modlab.train(routed(), texts(), distil(out=tmp_path / "a", **settings))
    first = distil(out=tmp_path / "b", **(settings | {"max_minutes": 1e-9}))
    cut = modlab.train(routed(), texts(), first)
    assert 0 < cut.steps < 6
    rest = modlab.train(routed(), texts(), distil(out=tmp_path / "b", resume="auto", **settings))
    assert same_weights(whole.model, rest.model)


def test_a_run_lowers_kl_below_chance_with_the_same_head_shares() -> None:
    """And leaves thresholds for several ratios, each of which keeps what it says."""
    model = routed(initializer_range=0.3)
    rows = texts(64)
    config = distil(
        steps=90,
        batch_size=8,
        keep_ratio=0.25,
        keep_range=(0.1, 0.7),
        ramp=0.6,
        lam=8.0,
        calibrate=True,
        log_every=20,
    )
    result = modlab.train(model, rows, config)
    held = torch.randint(3, V, (8, T), generator=torch.Generator().manual_seed(9))
    with torch.no_grad():
        with modlab.routing_off(model):
            dense = model(held, use_cache=False).logits
        with modlab.record_routing(model) as recording:
            routed_kl = kl(model(held, use_cache=False).logits, dense).mean()
        keep = recording.steps[0].keep
        generator = torch.Generator().manual_seed(0)

        def chance(layer: int, gate: Tensor, position_ids: Tensor) -> Tensor:
            share = keep[layer][:, 4:].float().mean((0, 1))
            return (torch.rand(gate.shape, generator=generator) < share) | (position_ids < 4)[..., None]

        with modlab.routing_override(model, chance):
            chance_kl = kl(model(held, use_cache=False).logits, dense).mean()
    assert routed_kl < 0.9 * chance_kl
    assert set(result.thresholds) == set(model.mod.trained.savings) == {2.0, 3.0, 4.0, 8.0}
    for ratio, thresholds in result.thresholds.items():
        modlab.set_threshold(model, thresholds)
        found = modlab.measure.evaluate(model, rows[:16], cache=False)
        assert found.keep_ratio == pytest.approx(keep_for_saving(model, ratio, CONTEXT), rel=0.15)


def test_thresholds_are_those_of_held_out_rows() -> None:
    """Rows of the training have repetitions, in which gates say something else."""
    model, rows = routed(), torch.full((16, T), 7)
    rows[:, ::3] = texts(16, len(range(0, T, 3)))
    config = distil(steps=2, keep_range=(0.1, 0.8), calibrate=True)
    result = modlab.train(model, rows, config, eval_data=texts(8))
    found = modlab.measure.evaluate(model, texts(8), cache=False)
    assert found.keep_ratio == pytest.approx(0.3, abs=0.005)
    assert modlab.measure.evaluate(model, rows, cache=False).keep_ratio != pytest.approx(0.3, abs=0.02)
    assert result.history["eval_kl_keep"].iloc[-1] == pytest.approx(0.3, abs=0.005)
    assert model.mod.trained.seq_len == CONTEXT


def test_savings_count_the_latest_tokens_of_a_text() -> None:
    model = routed()
    recent = model.mod.config.recent_stored
    for context in (CONTEXT, 8192):
        keep_ratio = keep_for_saving(model, 4.0, context)
        assert recent + (context - recent) * keep_ratio == pytest.approx(context / 4)
    assert saving_text(model, T) == saving_text(model, CONTEXT) == CONTEXT  # the model can have no longer one
    longer = routed(max_position_embeddings=16_384)
    assert saving_text(longer, T) == SAVING_TEXT and saving_text(longer, 12_000) == 12_000


@pytest.mark.parametrize("settled", [False, True])
def test_kl_of_held_out_rows_is_that_of_whole_logits_where_keep_ratio_is_kept(settled: bool) -> None:
    model = routed()
    run = Run(model, texts(), distil(steps=2, keep_range=(0.1, 0.8)), eval_data=texts(4))
    with run:
        before = dict(model.mod.thresholds)
        found = run.evaluate(settled)
        assert model.mod.thresholds == before
    with torch.no_grad():
        with modlab.routing_off(model):
            dense = model(texts(4), use_cache=False).logits
        if not settled:
            modlab.calibrate(model, texts(8), keep_ratio=0.3, tolerance=0.003)
        with modlab.record_routing(model) as recording:
            apart = kl(model(texts(4), use_cache=False).logits, dense).mean()
    kept = sum(float(keep.float().mean()) for keep in recording.steps[0].keep.values()) / 2
    close = 1e-5 if settled else 0.02  # its thresholds are of the tokens seen lately, not of these
    assert found["eval_kl_keep"] == pytest.approx(kept, abs=close)
    assert found["eval_kl"] == pytest.approx(float(apart), rel=1e-4 if settled else 0.15)


def test_a_steps_rows_lie_apart_over_the_range() -> None:
    """With few rows a step, chance would leave whole ratios out for many of them."""
    asked: list[Tensor] = []
    model = routed()
    with Run(model, texts(), distil(steps=2, keep_range=(0.1, 0.8))) as run:
        distillation: Any = run.stepping.distillation
        distillation.control.expected = lambda keep_B: asked.append(keep_B) or torch.ones_like(keep_B)
        for step in range(20):
            distillation.begin_rows({"input_ids": texts(8)}, Noise(0, step, torch.arange(8)), 0.1, step)
    for keep_B in asked:
        place = (keep_B[1::2] * 0.8 / 0.64).log() / torch.tensor(0.1 / 0.8).log()
        gaps = place.sort().values.diff()
        assert gaps.min() > 0.1, "two rows of a step ask for nearly the same"
    assert len({round(float(keep_B[1]), 4) for keep_B in asked}) == 20


def test_adapters_are_trained_against_the_base_without_them() -> None:
    peft = pytest.importorskip("peft")
    from modlab.integrations.peft import lora_config

    base = routed()
    model = peft.get_peft_model(base, lora_config(base, r=2))
    with changes(model) as changed:
        result = modlab.train(model, texts(), distil(steps=3, lr=1e-2))
    assert any("lora_" in n for n in changed) and any(".mod_router" in n for n in changed)
    assert all("lora_" in n or ".mod_router" in n for n in changed)
    assert result.history["kl"].gt(0).all()


def test_rows_of_several_lengths() -> None:
    batches = modlab.data.mixed_lengths(texts(16), lengths=(32, 96), tokens=192, lines=0.0)
    result = modlab.train(routed(), batches, distil(steps=len(batches), keep_range=(0.1, 0.8)))
    assert result.steps == len(batches)
    assert result.tokens == sum(batch.numel() for batch in batches)


def test_an_early_word_where_the_gates_do_not_follow() -> None:
    slow = Reach(0.1)
    with pytest.warns(UserWarning, match=r"keep 0.89 where 0.62 is asked .*near 0.85"):
        for n in range(5):
            slow.see(0.1 * n, 0.9 - 0.005 * n, 1 - n / 8)
    good = Reach(0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for n in range(11):
            good.see(0.1 * n, 1.0 - 0.09 * n, max(0.1, 1 - 0.1 * n))
        slow.see(0.6, 0.85, 0.2)  # once is enough


def test_the_bar_shows_kl_and_ratio(capsys: pytest.CaptureFixture[str]) -> None:
    modlab.train(routed(), texts(), distil(steps=2))
    shown = capsys.readouterr().err
    assert "kl 0." in shown and "keep_ratio 0." in shown and "(target 0." in shown


@pytest.mark.parametrize(
    ("config", "teacher", "message"),
    [
        ({"kl": 1.0}, True, "learns from the model itself"),
        ({}, True, "learns from the model itself"),
        ({"keep_range": (0.1, 0.8), "batch_size": 1}, False, "need two rows"),
        ({"keep_range": (0.4, 0.8)}, False, "keep_ratio=0.3 between"),
        ({"row_weight": 1.0}, False, "needs objective='distil' and a keep_range"),
    ],
)
def test_refusals(config: dict[str, Any], teacher: bool, message: str) -> None:
    with pytest.raises(ModlabError, match=message):
        modlab.train(routed(), texts(), distil(**config), teacher=dense_llama(**SIZES) if teacher else None)


def test_a_dense_model_is_refused() -> None:
    with pytest.raises(ModlabError, match="needs routers"):
        modlab.train(dense_llama(**SIZES), texts(), distil())


def test_fitted_routers_begin_open(monkeypatch: pytest.MonkeyPatch) -> None:
    model = routed()
    modlab.fit_routers(model, texts(), modlab.FitConfig(context=48, keep_ratio=0.4), progress=False)
    result = modlab.train(model, texts(), distil(steps=1, keep_ratio=0.3))
    assert result.history["keep_ratio"].iloc[0] == pytest.approx(0.9, abs=0.05)
    assert model.mod.trained is None, "thresholds by saving were those of the fit"
    assert set(model.mod.thresholds.values()) == {0.5}
    assert all(isinstance(layer.mod_router.bias, Tensor) for layer in decoder_layers(model))
