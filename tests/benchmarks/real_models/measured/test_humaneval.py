"""Prompts of one length, programs that end with their function."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import modlab
from benchmarks.real_models.measured import humaneval
from benchmarks.real_models.measured.product import Product
from benchmarks.real_models.measured.sandbox import all_pass
from modlab.errors import ModlabError


def test_prompts_are_of_one_length_and_end_with_the_problem(product: Product, questions: Path) -> None:
    asked = humaneval.problems(questions)
    asked[1] = {**asked[1], "prompt": "def other(longer, than, the, others):\n"}
    prompt_NP = humaneval.prompts(product.tokenizer, asked, behind=300)
    for problem, row in zip(asked, prompt_NP, strict=True):
        own = product.ids(problem["prompt"].rstrip() + "\n")
        assert row[-len(own) :].tolist() == own and len(row) - len(own) >= 300
    assert not torch.equal(prompt_NP[0, :300], prompt_NP[2, :300])  # other code, by the problem


@pytest.mark.parametrize(
    ("written", "function"),
    [
        ("    return x\n\n\ndef more():\n", "    return x\n\n"),
        ("    y = [\n]\n    return y\nprint(1)", "    y = [\n]\n    return y"),
        ("    return x", "    return x"),
    ],
)
def test_a_function_ends_where_a_line_begins_at_the_margin(written: str, function: str) -> None:
    assert humaneval.function_of(written) == function


def test_a_right_body_passes_and_a_wrong_one_does_not(questions: Path) -> None:
    asked = humaneval.problems(questions)
    texts = [asked[0]["canonical_solution"], "    return None\n", "    retrun\n"]
    assert all_pass(humaneval.programs(asked, texts)) == [True, False, False]


def test_writing_stops_once_every_function_is_over(product: Product) -> None:
    over = product.ids("    return 1\nx")
    still = product.ids("    return 1\n ")
    long = max(len(over), len(still), humaneval.LOOK)
    rows = torch.tensor([([7] * long + ids)[-long:] for ids in (over, still)])
    ended = humaneval.Ended(product.tokenizer, long - humaneval.LOOK * (long // humaneval.LOOK), [9])
    assert not ended(rows, None).any() and ended(rows[:1], None).all()
    rows[1, -1] = 9
    assert ended(rows, None).all()


def test_a_folder_without_the_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModlabError, match=r"HumanEval\.jsonl\.gz is not there"):
        humaneval.problems(tmp_path)


def test_fast_generation_writes_the_same(converted: Path, product: Product, questions: Path) -> None:
    fast = Product.load(converted, None, "cpu", fast=True)
    prompt_NP = humaneval.prompts(product.tokenizer, humaneval.problems(questions), behind=150)
    texts = []
    for one in (product, fast):
        with one.at(0.6):
            texts.append(humaneval.written(one.model, one.tokenizer, prompt_NP, 12, 2))
    assert texts[0] == texts[1]
    assert modlab.fast_generation_report(fast.model)["last"]["fast"] and fast.routing.thresholds[0] == 0.5
