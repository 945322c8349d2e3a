"""lm-evaluation-harness itself, on local tasks: scores of a converted model, and what it kept for them."""

from __future__ import annotations

import inspect
import json
import sys
from pathlib import Path

import pytest
import torch
import yaml

import modlab
from modlab.cli import main
from modlab.errors import ModlabError
from modlab.integrations.lm_eval import evaluate_tasks
from tests.helpers.models import alternate_layers, scatter_gates

pytest.importorskip("lm_eval")

DOCUMENTS = [
    {"query": "import os\nfor name in os.", "choices": ["listdir('.')", "zzqq qqzz"], "gold": 0},
    {"query": "def add(a, b):\n    return a", "choices": [" ]]]] ((", " + b"], "gold": 1},
    {"query": "class Reader:\n    def __init__(", "choices": ["self", "}}}}"], "gold": 0},
]


@pytest.fixture(scope="module")
def demo():
    return modlab.load("demo")


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))


def choice_task(folder: Path, name: str, documents: Path) -> str:
    task = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(documents)}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{query}}",
        "doc_to_choice": "choices",
        "doc_to_target": "gold",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc"}],
        "metadata": {"version": 1.0},
    }
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(task))
    return str(path)


@pytest.fixture
def documents(tmp_path) -> Path:
    path = tmp_path / "documents.jsonl"
    path.write_text("".join(json.dumps(document) + "\n" for document in DOCUMENTS))
    return path


def own_answers(model, tokenizer) -> list[int]:
    """The choice of highest summed log-likelihood, computed here."""
    answers = []
    for document in DOCUMENTS:
        totals = []
        for choice in document["choices"]:
            context = tokenizer(document["query"])["input_ids"]
            whole = tokenizer(document["query"] + choice)["input_ids"]
            with torch.no_grad():
                scores = model(torch.tensor([whole])).logits[0].log_softmax(-1)
            start = len(context)
            totals.append(sum(scores[i - 1, whole[i]].item() for i in range(start, len(whole))))
        answers.append(totals.index(max(totals)))
    return answers


def test_scores_are_the_models_own(demo, tmp_path, documents) -> None:
    model, tokenizer = demo
    task = choice_task(tmp_path, "local_choice", documents)
    hooks = dict(model._forward_hooks)
    result = evaluate_tasks(model, tokenizer, [task])
    answers = own_answers(model, tokenizer)
    expected = sum(a == d["gold"] for a, d in zip(answers, DOCUMENTS, strict=True)) / len(DOCUMENTS)
    assert result.scores["local_choice"]["acc"] == pytest.approx(expected)
    assert set(result.keep_ratio_by_layer) == set(model.mod.layers)
    assert 0.05 < result.keep_ratio < 0.9 and result.kv_saving > 1.1
    assert not model.mod.of_thread.recordings and dict(model._forward_hooks) == hooks


def test_a_dense_model_keeps_everything(tmp_path, documents) -> None:
    model, tokenizer = modlab.load("demo-dense")
    result = evaluate_tasks(model, tokenizer, [choice_task(tmp_path, "local_choice", documents)], limit=1)
    assert result.keep_ratio == 1.0 and result.kv_saving == pytest.approx(1.0)


def test_batches_change_no_score(demo, tmp_path, documents) -> None:
    model, tokenizer = demo
    task = choice_task(tmp_path, "local_choice", documents)
    alone, together = (evaluate_tasks(model, tokenizer, [task], batch_size=b) for b in (1, 4))
    assert alone.scores == together.scores


def test_generation_tasks_use_the_ragged_cache(demo, tmp_path) -> None:
    model, tokenizer = demo
    documents = tmp_path / "documents.jsonl"  # long enough that the buffers' room to grow does not matter
    text = inspect.getsource(json)
    rows = [{"query": text[i : i + 1200], "choices": ["x"], "gold": 0} for i in (0, 3000)]
    documents.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {
        "task": "local_generation",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(documents)}},
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": "{{query}}",
        "doc_to_target": "{{choices[gold]}}",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 8, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
    }
    path = tmp_path / "local_generation.yaml"
    path.write_text(yaml.safe_dump(task))
    result = evaluate_tasks(model, tokenizer, [str(path)])
    assert "exact_match" in result.scores["local_generation"]
    assert result.kv_saving > 1.0 and 0 < result.keep_ratio < 1


def test_command_line(tmp_path, documents, make_llama, demo, capsys) -> None:
    choice_task(tmp_path, "local_choice", documents)
    model = modlab.convert(make_llama(vocab_size=4096), alternate_layers())
    scatter_gates(model)
    model.save_pretrained(tmp_path / "model")
    demo[1].save_pretrained(tmp_path / "model")
    words = ["eval", str(tmp_path / "model"), "--tasks", "local_choice", "--include-path", str(tmp_path)]
    words += ["--device", "cpu"]
    assert main([*words, "--json"]) == 0
    out = capsys.readouterr().out
    said = json.loads(out[out.index("{\n") :])
    assert 0 <= said["scores"]["local_choice"]["acc"] <= 1 and said["task_versions"]["local_choice"] == 1.0
    assert 0 < said["keep_ratio"] < 1 and said["kv_saving"] > 0.5
    assert [row["layer"] for row in said["layers"]] == [1, 3, 5]
    assert main([*words, "--limit", "1"]) == 0
    out = capsys.readouterr().out
    assert "local_choice  acc" in out and "keep_ratio 0." in out


@pytest.mark.long
def test_an_unknown_task_is_named(demo) -> None:
    with pytest.raises(ModlabError, match="no task 'nosuchtask'"):
        evaluate_tasks(*demo, ["nosuchtask"])


def test_what_cannot_be_evaluated_is_said(demo, tmp_path, monkeypatch, capsys) -> None:
    with pytest.raises(ModlabError, match="no task file"):
        evaluate_tasks(*demo, [str(tmp_path / "none.yaml")])
    for words in (["eval", "demo"], ["eval", "demo", "--data", "python", "--tasks", "x"]):
        assert main(words) == 2
        assert "--data SOURCE or --tasks NAME" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "lm_eval.evaluator", None)
    assert main(["eval", "demo", "--tasks", "arc_easy"]) == 2
    assert "pip install 'modlab[eval]'" in capsys.readouterr().err


@pytest.mark.data
@pytest.mark.parametrize("name", ["arc_easy", "piqa"])
@pytest.mark.long
def test_real_evaluation_sets_on_a_real_model(data_dir, tmp_path, name) -> None:
    """Converted with open gates a model scores as the dense one does."""
    scores = []
    for convert in (False, True):
        model, tokenizer = modlab.load(data_dir / "models" / "babyllama-tok105", dtype=torch.float32)
        if convert:
            modlab.convert(model)
        # Its tokens are characters and its context holds 256: longer answers are the next test's.
        rows = [json.loads(line) for line in (data_dir / "eval" / f"{name}.jsonl").open(encoding="utf-8")]
        rows = [row for row in rows if max(map(len, row["choices"])) < 200][:40]
        documents = tmp_path / f"{name}.jsonl"
        documents.write_text("".join(json.dumps(row) + "\n" for row in rows))
        task = choice_task(tmp_path, f"local_{name}", documents)
        result = evaluate_tasks(model, tokenizer, [task])
        scores.append(result.scores[f"local_{name}"])
    assert len(rows) == 40 and scores[0] == scores[1] and 0.1 < scores[0]["acc"] < 0.95


def test_an_answer_longer_than_the_context_is_named(demo, tmp_path) -> None:
    documents = tmp_path / "long.jsonl"
    documents.write_text(json.dumps({"query": "x", "choices": ["a b c " * 900, "d"], "gold": 0}) + "\n")
    with pytest.raises(ModlabError, match="longer than the model's context of 2,048 tokens"):
        evaluate_tasks(*demo, [choice_task(tmp_path, "local_long", documents)])
