"""One held-out loss for every caller."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM, Trainer, TrainingArguments

import modlab
from modlab import cli
from modlab.data import packed
from modlab.integrations.trainer import MoDCallback
from modlab.measure import evaluate
from modlab.training.config import TrainConfig
from modlab.training.loop import train
from tests.helpers.models import alternate_layers, scatter_gates, tiny_config
from tests.helpers.tokenizers import make_tokenizer
from tests.helpers.training import T, V, settings


def test_evaluate_is_the_mean_over_every_token(make: Callable[..., Any], rows: torch.Tensor) -> None:
    model = make()
    with torch.no_grad():
        logits = model(input_ids=rows[:11]).logits[:, :-1]
        expected = torch.nn.functional.cross_entropy(logits.reshape(-1, V), rows[:11, 1:].reshape(-1)).item()
    found = evaluate(model, rows[:11], batch_size=4)  # 4 + 4 + 3
    assert found.loss == pytest.approx(expected, rel=1e-5)
    assert found.predicted_tokens == 11 * (T - 1)
    padded = {"input_ids": torch.cat([rows[:2], torch.zeros_like(rows[:2, :3])], 1)[:, :T]}
    padded["attention_mask"] = torch.ones_like(padded["input_ids"])
    padded["attention_mask"][1, 20:] = 0
    assert evaluate(model, [padded]).predicted_tokens == T - 1 + 19


def test_every_caller_finds_one_loss(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A run's eval_loss, `modlab eval`, a sweep and a Trainer's own evaluation, on one held-out text."""
    tokenizer, text = make_tokenizer(), tmp_path / "text.jsonl"
    documents = [json.dumps({"text": f"def f{i}(a, b): return a + b * {i}\n" * 6}) for i in range(9)]
    text.write_text("\n".join(documents), encoding="utf-8")
    torch.manual_seed(0)
    model = modlab.convert(LlamaForCausalLM(tiny_config()), alternate_layers())
    scatter_gates(model)
    rows = packed(text, tokenizer, T, cache_dir=tmp_path / "cache")
    config = TrainConfig(out=tmp_path / "run", **settings(steps=1, lr=1e-9, mixed_precision="no"))
    history = train(model, rows, config, eval_data=rows, tokenizer=tokenizer).history
    of_train = history["eval_loss"].iloc[-1]

    found = evaluate(model, rows, batch_size=5)
    assert of_train == pytest.approx(found.loss, rel=1e-6)
    assert history["eval_keep_ratio"].iloc[-1] == pytest.approx(found.keep_ratio, rel=1e-6)
    assert 0.1 < found.keep_ratio < 0.9
    capsys.readouterr()
    folder = str(tmp_path / "run" / "model")
    cli.main(["eval", folder, "--data", str(text), "--split", "all", "--seq-len", str(T), "--json"])
    of_command = json.loads(capsys.readouterr().out)
    assert of_command["loss"] == pytest.approx(of_train, rel=1e-6)
    assert of_command["predicted_tokens"] == found.predicted_tokens
    swept = modlab.sweep(model, None, rows, [0.5], repeats=0, progress=False)
    assert swept["loss"].iloc[0] == pytest.approx(of_train, rel=1e-6)

    labelled = [{"input_ids": row, "labels": row} for row in rows["input_ids"]]
    # one row a batch: a Trainer takes the mean of its batches' losses
    arguments = TrainingArguments(
        tmp_path / "trainer", use_cpu=True, report_to=[], per_device_eval_batch_size=1
    )
    of_trainer = Trainer(model, arguments, eval_dataset=labelled, callbacks=[MoDCallback()]).evaluate()
    assert of_trainer["eval_loss"] == pytest.approx(of_train, rel=1e-5)


@pytest.mark.parametrize("routed", [False, True])
@pytest.mark.parametrize("side", ["left", "right", "inside"])
def test_a_run_counts_what_an_evaluation_counts(
    make: Callable[..., Any], rows: torch.Tensor, routed: bool, side: str
) -> None:
    """Padding, and labels of -100: the loss that is trained on is the loss that is measured."""
    mask, labels = torch.ones_like(rows[:4]), rows[:4].clone()
    place = {"left": slice(0, 9), "right": slice(20, T), "inside": slice(11, 14)}[side]
    mask[1, place] = mask[3, place] = 0
    labels[0, :6] = -100
    batches = [{"input_ids": rows[:4] * mask, "attention_mask": mask, "labels": labels}]
    model = make(mod=alternate_layers() if routed else None)
    config = TrainConfig(**settings(steps=1, lr=1e-9, mixed_precision="no"))
    history = train(model, batches, config, eval_data=batches).history
    assert history["loss"].iloc[-1] == pytest.approx(evaluate(model, batches).loss, rel=1e-5)
    assert history["eval_loss"].iloc[-1] == pytest.approx(evaluate(model, batches).loss, rel=1e-6)
