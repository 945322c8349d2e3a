"""RULER-kind tasks: prompts hold what is asked for, answers are scored as written, sides are paired."""

from __future__ import annotations

import random

import pytest
import torch

import modlab
from modlab.errors import ModlabError
from modlab.probes import long_tasks, ruler
from modlab.probes.ruler_tasks import TASKS, Page, Question
from tests.helpers.models import alternate_layers, dense_llama, scatter_gates
from tests.helpers.tokenizers import make_tokenizer

STREAM = torch.randint(3, 128, (1, 6000), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


def question(task: str, tokenizer, length: int = 900, seed: int = 0):
    text = tokenizer("the river runs down to the sea and nobody asks why it does " * 200)["input_ids"]
    return TASKS[task](Page(tokenizer, text, length, random.Random(seed)))


def test_a_converted_model_is_dense_where_routing_is_off(tokenizer) -> None:
    model = scatter_gates(modlab.convert(dense_llama(), alternate_layers()))
    settings = {"lengths": (700,), "tasks": "needle", "samples": 2, "by_row": True, "progress": False}
    with modlab.routing_off(model):
        alone = ruler(model, STREAM, tokenizer, **settings)
        with pytest.raises(ModlabError, match="while routing is off"):
            ruler(model, STREAM, tokenizer, dense=alone.rename(columns={"score": "dense"}), **settings)
    both = ruler(model, STREAM, tokenizer, dense=alone.rename(columns={"score": "dense"}), **settings)
    assert list(alone) == ["task", "length", "row", "score"]
    assert both["dense"].tolist() == alone["score"].tolist() and "routed" in both


@pytest.mark.parametrize("task", TASKS)
def test_a_prompt_has_its_length_and_holds_its_answers(tokenizer, task) -> None:
    asked = question(task, tokenizer)
    assert len(asked.prompt) == 900
    read = tokenizer.decode(asked.prompt)
    assert all(answer in read for answer in asked.answers)
    assert len(set(asked.answers)) == len(asked.answers)
    assert question(task, tokenizer).prompt == asked.prompt != question(task, tokenizer, seed=1).prompt
    assert asked.score("... ".join(asked.answers)) == 1 and asked.score("nothing") == 0
    assert asked.score(asked.answers[0]) == pytest.approx(1 / len(asked.answers))


def test_needles_of_other_names_lie_among_the_one_asked_for(tokenizer) -> None:
    asked = question("needle of keys", tokenizer)
    assert tokenizer.decode(asked.prompt).count("One of the secret numbers of") == 4
    assert len(asked.answers) == 1
    assert len(question("needle of values", tokenizer).answers) == 4


def test_the_words_asked_for_are_the_commonest(tokenizer) -> None:
    asked = question("frequent words", tokenizer, length=1500)
    words = tokenizer.decode(asked.prompt).split("comes.")[1].split("Question:")[0].split()
    counts = sorted({word: words.count(word) for word in set(words)}.items(), key=lambda item: -item[1])
    assert counts[0][0] == "..." and {word for word, _ in counts[1:4]} == set(asked.answers)


def test_a_chain_of_variables_is_one_chain(tokenizer) -> None:
    asked = question("variables", tokenizer)
    lines = [line for line in tokenizer.decode(asked.prompt).split("\n") if line.startswith("VAR ")]
    told = dict(
        line.removeprefix("VAR ").split(" = ") for line in lines[5:]
    )  # the first five are the example
    assert list(told) == list(asked.answers)
    for before, name in zip(asked.answers, asked.answers[1:], strict=False):
        assert told[name] == f"VAR {before}"


def test_both_sides_answer_the_same_questions(tokenizer, monkeypatch) -> None:
    seen = []

    def write(model, prompts, new_tokens, temperature, seed, batch_size, bar):
        seen.append(prompts)
        assert prompts.shape[1] + new_tokens == 1000
        ids = tokenizer("The number is 1234567." if model.mod.is_off else "no")["input_ids"]
        return [torch.cat([row, torch.tensor(ids)]) for row in prompts]

    monkeypatch.setattr(long_tasks, "write", write)
    monkeypatch.setattr(Question, "score", lambda self, text: float("1234567" in text))
    sizes = {"vocab_size": len(tokenizer), "max_position_embeddings": 1024}
    model = modlab.convert(dense_llama(**sizes), alternate_layers(skip="kv", keep_recent=4))
    asked = {"lengths": (1000,), "tasks": ["needle", "variables"], "samples": 3, "progress": False}
    table = ruler(model, STREAM, tokenizer, **asked)
    assert all(torch.equal(one, other) for one, other in zip(seen[::2], seen[1::2], strict=True))
    assert table.task.to_list() == ["needle", "variables"] and table.samples.to_list() == [3, 3]
    assert (table.dense == 1).all() and (table.routed == 0).all() and (table.difference == -1).all()
    assert (table.stderr == 0).all()
    rows = ruler(model, STREAM, tokenizer, by_row=True, **asked)
    assert len(rows) == 6 and set(rows) == {"task", "length", "row", "dense", "routed"}
    seen.clear()
    again = ruler(model, STREAM, tokenizer, by_row=True, dense=rows[::-1], **asked)
    assert again.equals(rows) and again.attrs == rows.attrs and len(seen) == 2  # the routed side alone

    monkeypatch.setattr(long_tasks, "write", None)  # nothing runs before the refusals
    for other in ({"seed": 1}, {"samples": 2}, {"tasks": ["needle"]}, {"lengths": (999,)}):
        with pytest.raises(ModlabError, match="of other material or settings"):
            ruler(model, STREAM, tokenizer, dense=rows, **asked | other)
    with pytest.raises(ModlabError, match="of other material or settings"):
        ruler(model, STREAM.roll(1), tokenizer, dense=rows, **asked)
    with pytest.raises(ModlabError, match="doubled or some are missing"):
        ruler(model, STREAM, tokenizer, dense=rows[:3], **asked)
    with pytest.raises(ModlabError, match="take what ruler"):
        ruler(model, STREAM, tokenizer, dense=rows.drop(columns="dense"), **asked)
    with pytest.raises(ModlabError, match="is dense"):
        ruler(dense_llama(**sizes), STREAM, tokenizer, dense=rows, **asked)


def test_a_dense_model_writes_its_answers(tokenizer) -> None:
    model = dense_llama(vocab_size=len(tokenizer), max_position_embeddings=1024)
    table = ruler(model, STREAM, tokenizer, lengths=(600,), tasks="needle", samples=2, progress=False)
    assert set(table) == {"task", "length", "samples", "score", "stderr"} and 0 <= table.score[0] <= 1


def test_a_question_in_tokens_that_the_model_does_not_know_is_refused(tokenizer) -> None:
    model = dense_llama(vocab_size=128, max_position_embeddings=1024)
    with pytest.raises(ModlabError, match="what is asked holds token ids .* the model has 128 tokens"):
        ruler(model, STREAM, tokenizer, lengths=(600,), tasks="needle", samples=1, progress=False)
    with pytest.raises(ModlabError, match="what is asked holds token ids .* the model has 128 tokens"):
        modlab.retrieval(model, STREAM, tokenizer, distances=(128,), rows=2, lead=4, progress=False)


def test_wrong_values_are_refused(tokenizer) -> None:
    model = scatter_gates(modlab.convert(dense_llama(), alternate_layers()))
    with pytest.raises(ModlabError, match="no task 'haystack'"):
        ruler(model, STREAM, tokenizer, tasks=["haystack"])
    with pytest.raises(ModlabError, match="context is 2048"):
        ruler(model, STREAM, tokenizer, lengths=(4096,))
    with pytest.raises(ModlabError, match="the question alone takes"):
        ruler(model, STREAM, tokenizer, lengths=(100,), samples=1, progress=False)
