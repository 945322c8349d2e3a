"""Choices behind shots: what the cache of the shots gives is what whole rows give."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.real_models.measured import shots
from benchmarks.real_models.measured.product import Product
from modlab.errors import ModlabError


def by_whole_rows(product: Product, sheet: shots.Sheet) -> list[float]:
    """Each choice in a row of its own, shots included."""
    before, right = product.ids(sheet.shots), []
    for asked in sheet.questions:
        said = []
        for choice, length in zip(asked.choices, asked.lengths, strict=True):
            query, told = before + product.ids(asked.query), product.ids(choice)
            states = product.states(torch.tensor([query + told]))[0, len(query) - 1 : -1]
            loss = torch.nn.functional.cross_entropy(
                states @ product.head_VD.T, torch.tensor(told), reduction="sum"
            )
            said.append(-loss.item() / length)
        right.append(float(np.argmax(said) == asked.gold))
    return right


@pytest.mark.parametrize("threshold", [None, 0.6])
@pytest.mark.parametrize("task", list(shots.SHOTS))
def test_answers_behind_a_cache_are_those_of_whole_rows(
    product: Product, questions: Path, task: str, threshold: float | None
) -> None:
    with product.at(threshold):
        found = shots.measure(product, task, questions, 6, batch=4)
        (said,) = found["scores"].values()
        whole = [one for sheet in shots.sheets(task, questions, 6) for one in by_whole_rows(product, sheet)]
    assert said == whole and len(said) == 6
    assert ("kv_saving" in found) == (threshold is not None and task != "mmlu")
    assert found.get("kv_saving", 2.0) > 1.2


def test_questions_are_none_of_the_shots(questions: Path) -> None:
    (sheet,) = shots.sheets("arc_challenge", questions, 6)
    assert sheet.shots.count("\n\n") >= 21 and len(sheet.questions) == 6
    assert not any(asked.query in sheet.shots for asked in sheet.questions)
    made = shots.sheets("mmlu", questions, 6)
    assert len(made) == 2 and all("mmlu_test" not in sheet.shots for sheet in made)
    assert "\nA. w\nB. x\nC. y\nD. z\nAnswer: A\n\n" in made[0].shots


def test_an_unknown_task_and_a_missing_file_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModlabError, match="choose some of arc_challenge"):
        shots.sheets("piqa", tmp_path, 3)
    with pytest.raises(ModlabError, match=r"arc_challenge\.jsonl is not there"):
        shots.sheets("arc_challenge", tmp_path, 3)
