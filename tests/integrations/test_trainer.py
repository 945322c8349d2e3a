"""Trainers of transformers and TRL, the real ones, train the routers of a converted model."""

from __future__ import annotations

import warnings

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from transformers import Trainer, TrainingArguments

import modlab
from modlab.errors import ModlabError
from modlab.integrations.trainer import MoDCallback
from modlab.measure import evaluate
from modlab.routing.state import record_routing
from modlab.routing.trained import Trained
from modlab.saving.restore import load_routers
from modlab.training import objectives
from tests.helpers.models import alternate_layers, scatter_gates
from tests.helpers.tokenizers import make_tokenizer

ROWS = torch.randint(3, 60, (32, 24), generator=torch.Generator().manual_seed(0))
DATA = Dataset.from_dict({"input_ids": ROWS.tolist(), "labels": ROWS.tolist()})


@pytest.fixture
def small(make_llama):
    return modlab.convert(make_llama(num_hidden_layers=4), alternate_layers())


def arguments(folder, **changes) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(folder),
        **{
            "max_steps": 4,
            "per_device_train_batch_size": 8,
            "learning_rate": 1e-3,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": [],
            "use_cpu": True,
            "disable_tqdm": True,
            "seed": 0,
            "max_grad_norm": 1e9,
            "weight_decay": 0.0,
            "lr_scheduler_type": "constant",
            **changes,
        },
    )


def routers(model) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if "router" in n}


def test_loss_is_the_models_plus_the_objective_and_only_while_training(small, tmp_path) -> None:
    scatter_gates(small)
    trainer = Trainer(small, arguments(tmp_path, max_steps=1), train_dataset=DATA)
    trainer.add_callback(MoDCallback(keep_ratio=0.25, ramp=0.0, lam=3.0))
    seen = []
    small.register_forward_pre_hook(lambda m, a, k: seen.append(k["input_ids"].clone()), with_kwargs=True)
    before = {n: p.detach().clone() for n, p in small.state_dict().items()}
    hooks = [dict(small._forward_hooks), dict(small._forward_pre_hooks)]
    trainer.train()
    logged = trainer.state.log_history[0]
    assert [dict(small._forward_hooks), dict(small._forward_pre_hooks)] == hooks, "none is left behind"

    small.load_state_dict(before)
    small.train()
    with record_routing(small, detach=False) as recording:
        own = small(input_ids=seen[0], labels=seen[0], use_cache=False).loss
    term = objectives.target_objective(recording.steps[0], 0.25, lam=3.0)
    assert term > 0.05
    assert logged["loss"] == pytest.approx((own + term).item(), rel=1e-4)
    assert logged["routing_objective"] == pytest.approx(term.item(), rel=1e-4)
    assert logged["keep_ratio"] == pytest.approx(objectives.keep_ratios(recording.steps[0]).mean().item())
    small.eval()
    assert small(input_ids=seen[0], labels=seen[0]).loss.item() == pytest.approx(own.item(), rel=1e-5)


@pytest.mark.parametrize("learning", [True, False])
def test_what_was_known_of_routers_ends_with_their_first_step(small, tmp_path, learning) -> None:
    small.mod.trained = known = Trained(savings={2.0: 0.5})
    for name, parameter in small.named_parameters():
        parameter.requires_grad_(learning or "router" not in name)
    callback = MoDCallback("auto" if learning else "none")
    Trainer(small, arguments(tmp_path, max_steps=1), train_dataset=DATA, callbacks=[callback]).train()
    assert small.mod.trained is (None if learning else known)


def test_same_steps_as_modlab_train(make_llama, tmp_path) -> None:
    """One optimiser step of each, same rows, same settings: same weights."""
    rows = ROWS[:8]
    ours, theirs = (modlab.convert(make_llama(num_hidden_layers=4), alternate_layers()) for _ in range(2))
    scatter_gates(ours), scatter_gates(theirs)
    settings = {"keep_ratio": 0.25, "ramp": 0.0, "what_if": 1.0}
    config = modlab.TrainConfig(
        calibrate=False,
        steps=1,
        lr=1e-3,
        warmup=0,
        min_lr_ratio=1.0,
        weight_decay=0.0,
        max_grad_norm=1e9,
        **settings,
    )
    modlab.train(ours, [{"input_ids": rows}], config)
    args = arguments(tmp_path, max_steps=1, adam_beta2=0.95)
    data = Dataset.from_dict({"input_ids": rows.tolist(), "labels": rows.tolist()})
    Trainer(theirs, args, train_dataset=data, callbacks=[MoDCallback(**settings)]).train()
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        # Adam's first step is lr * sign(gradient) where gradients are near 0
        torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-4, msg=name)


def test_accumulated_gradients_are_those_of_the_large_batch(make_llama, tmp_path) -> None:
    """The objective is weighted as the loss is; the load term is nearly linear in the micro-batches."""
    moved = []
    for batch, accumulate in ((8, 1), (2, 4)):
        model = modlab.convert(make_llama(num_hidden_layers=4), alternate_layers())
        trainer = Trainer(
            model,
            arguments(
                *(tmp_path / str(batch),),
                max_steps=1,
                per_device_train_batch_size=batch,
                gradient_accumulation_steps=accumulate,
                optim="sgd",
                learning_rate=1.0,
            ),
            train_dataset=DATA,
            callbacks=[MoDCallback(objective="load", alpha=0.5)],
        )
        before = routers(model)
        trainer.train()
        moved.append({name: after - before[name] for name, after in routers(model).items()})
    for name, large in moved[0].items():
        assert large.abs().sum() > 0.01, name
        torch.testing.assert_close(moved[1][name], large, atol=1e-5, rtol=1e-3, msg=name)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "gradient checkpointing"])
def test_keep_ratio_reaches_its_target(small, tmp_path, checkpointing) -> None:
    args = arguments(
        tmp_path,
        max_steps=60,
        learning_rate=2e-2,
        logging_steps=10,
        per_device_train_batch_size=16,
        gradient_checkpointing=checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False} if checkpointing else None,
    )
    trainer = Trainer(small, args, train_dataset=DATA, callbacks=[MoDCallback(keep_ratio=0.5, ramp=0.3)])
    trainer.train()
    history = [entry for entry in trainer.state.log_history if "keep_ratio" in entry]
    assert len(history) == 6 and history[0]["keep_ratio"] > 0.8  # the ramp is on its way
    assert evaluate(small, [ROWS]).keep_ratio == pytest.approx(0.5, abs=0.2)
    assert history[-1]["loss"] < history[0]["loss"]
    assert small.mod.what_if and not small.mod.of_thread.recordings


def test_a_resumed_run_is_the_uninterrupted_one_with_its_routers(make_llama, tmp_path) -> None:
    def run(folder, **more):
        model = modlab.convert(make_llama(num_hidden_layers=4), alternate_layers())
        args = arguments(folder, max_steps=6, save_strategy="steps", save_steps=3)
        trainer = Trainer(model, args, train_dataset=DATA, callbacks=[MoDCallback(keep_ratio=0.3)])
        trainer.train(**more)
        return model

    whole = run(tmp_path)
    middle = modlab.convert(make_llama(num_hidden_layers=4), alternate_layers())
    load_routers(middle, tmp_path / "checkpoint-3" / "modlab_router.safetensors")
    assert any(not torch.equal(p, whole.get_parameter(n)) for n, p in routers(middle).items())
    resumed = run(tmp_path, resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    for name, parameter in whole.named_parameters():
        torch.testing.assert_close(resumed.get_parameter(name), parameter, msg=name)


def test_the_best_checkpoint_comes_back_with_its_routers(small, tmp_path) -> None:
    args = arguments(
        tmp_path,
        learning_rate=0.5,  # diverges, so that the first checkpoint is the best
        save_strategy="steps",
        save_steps=1,
        eval_strategy="steps",
        eval_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="loss",
    )
    trainer = Trainer(small, args, train_dataset=DATA, eval_dataset=DATA, callbacks=[MoDCallback()])
    trainer.train()
    best = trainer.state.best_model_checkpoint
    assert best is not None and not best.endswith("checkpoint-4")
    for name, saved in load_file(f"{best}/modlab_router.safetensors").items():
        assert torch.equal(small.get_parameter(name), saved)


def test_dense_models_are_refused(make_llama, tmp_path) -> None:
    trainer = Trainer(make_llama(), arguments(tmp_path), train_dataset=DATA, callbacks=[MoDCallback()])
    with pytest.raises(ModlabError, match="convert"):
        trainer.train()


def test_settings_that_cannot_work_are_refused() -> None:
    with pytest.raises(ModlabError, match="keep_ratio=1.5"):
        MoDCallback(keep_ratio=1.5)


def test_checkpointing_that_keeps_the_gradient_from_the_routers_is_refused(small, tmp_path) -> None:
    args = arguments(
        tmp_path, gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": True}
    )
    with pytest.raises(ModlabError, match="use_reentrant"):
        Trainer(small, args, train_dataset=DATA, callbacks=[MoDCallback()]).train()


def test_a_trainer_with_a_loss_of_its_own_is_refused(small, tmp_path) -> None:
    class Own(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            inputs.pop("labels")
            return model(**inputs).logits.square().mean()

    with pytest.raises(ModlabError, match="did not ask the model for a loss"):
        Own(small, arguments(tmp_path), train_dataset=DATA, callbacks=[MoDCallback()]).train()


def test_rows_in_which_every_key_is_recent_are_remarked_on(make_llama, tmp_path) -> None:
    for recent in (ROWS.shape[1], 4):
        model = modlab.convert(make_llama(num_hidden_layers=4), modlab.MoDConfig(keep_recent=recent))
        trainer = Trainer(
            model,
            arguments(tmp_path, max_steps=2),
            train_dataset=DATA,
            callbacks=[MoDCallback(keep_ratio=0.5)],
        )
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            trainer.train()
        said = [str(w.message) for w in caught if "keep_recent" in str(w.message)]
        assert len(said) == (recent > 4), said


def test_sft_trainer_of_trl(make_llama, tmp_path) -> None:
    trl = pytest.importorskip("trl")
    model = modlab.convert(make_llama(num_hidden_layers=4), modlab.MoDConfig(keep_recent=4))
    texts = Dataset.from_dict({"text": ["the router decides which token runs and which token skips"] * 32})
    config = trl.SFTConfig(
        output_dir=str(tmp_path),
        max_steps=4,
        per_device_train_batch_size=4,
        report_to=[],
        use_cpu=True,
        bf16=False,
        learning_rate=1e-2,
        logging_steps=1,
        save_strategy="no",
        max_length=32,
        disable_tqdm=True,
    )
    before = routers(model)
    trainer = trl.SFTTrainer(
        model=model,
        args=config,
        train_dataset=texts,
        processing_class=make_tokenizer(),
        callbacks=[MoDCallback(keep_ratio=0.3, ramp=0.0)],
    )
    trainer.train()
    history = [entry for entry in trainer.state.log_history if "routing_objective" in entry]
    assert len(history) == 4 and history[0]["routing_objective"] > 0.1
    for name, parameter in routers(model).items():
        assert not torch.equal(parameter, before[name]), name
    trainer.save_model(str(tmp_path / "saved"))
    again, _ = modlab.load(tmp_path / "saved")
    ids = ROWS[:2]
    assert torch.equal(again(ids).logits, model.eval()(ids).logits)
