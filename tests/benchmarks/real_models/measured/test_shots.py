"""Choices behind shots: the cache of the shots, rows in batches and rows one by one give the same."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import modlab
from benchmarks.real_models.measured import shots
from benchmarks.real_models.measured.product import Product
from modlab.errors import ModlabError
from modlab.execution import whole_rows
from tests.helpers.models import scatter_gates
from tests.helpers.tokenizers import make_tokenizer


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
@pytest.mark.parametrize(
    ("task", "path"),
    [(task, path) for task in shots.SHOTS for path in (shots.CACHE, shots.ROWS, None) if task != "mmlu"]
    + [("mmlu", None)],
)
def test_answers_by_either_path_are_those_of_rows_one_by_one(
    product: Product, questions: Path, task: str, path: str | None, threshold: float | None
) -> None:
    with product.at(threshold):
        found = shots.measure(product, task, questions, 6, batch=4, path=path)
        (said,) = found["scores"].values()
        whole = [one for sheet in shots.sheets(task, questions, 6) for one in by_whole_rows(product, sheet)]
    assert said == whole and len(said) == 6
    assert ("kv_saving" in found) == (threshold is not None and task != "mmlu")
    assert found.get("kv_saving", 2.0) > 1.2
    assert found["path"] == (path or (shots.ROWS if task == "mmlu" else shots.CACHE))


@pytest.mark.parametrize("batch", [1, 5])
def test_likelihoods_by_either_path_are_the_same_and_routing_moves_them(
    product: Product, questions: Path, batch: int
) -> None:
    """Choices of several lengths in one batch; so close that no answer hangs on the path."""
    (sheet,) = shots.sheets("arc_challenge", questions, 6)
    before = product.ids(sheet.shots)
    choices = [
        shots.Choice(number, at, product.ids(asked.query), product.ids(text))
        for number, asked in enumerate(sheet.questions)
        for at, text in enumerate(asked.choices)
    ]
    assert len({len(one.ids) for one in choices}) > 1

    def by(path: str) -> torch.Tensor:
        cache = shots._cache_of(product, before)
        parts = [choices[i : i + batch] for i in range(0, len(choices), batch)]
        if path == shots.CACHE:
            return torch.tensor([said for part in parts for said in shots._behind(product, cache, part)])
        return torch.tensor([said for part in parts for said in shots._in_rows(product, before, part)])

    found = {}
    for threshold in (None, 0.6):
        with product.at(threshold):
            found[threshold] = by(shots.ROWS)
            torch.testing.assert_close(found[threshold], by(shots.CACHE), atol=1e-4, rtol=1e-5)
    assert (found[None] - found[0.6]).abs().max() > 0.01


def test_rows_of_choices_go_through_the_kernel_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """In Triton's interpreter where there is no GPU; with heads of a size that the kernel knows."""
    pytest.importorskip("triton")
    config = LlamaConfig(
        vocab_size=320, hidden_size=64, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=2048, initializer_range=0.3,
    )  # fmt: skip
    settings = modlab.MoDConfig(layers="all", gates="kv_head", keep_recent=16)
    torch.manual_seed(0)
    # On a GPU the kernel is for 16 bit; the interpreter's products are exact in 32.
    device, dtype, near = ("cuda", torch.bfloat16, 0.2) if torch.cuda.is_available() else ("cpu", None, 1e-4)
    model = scatter_gates(modlab.convert(LlamaForCausalLM(config), settings)).eval().to(device, dtype)
    product = Product("tiny", model, make_tokenizer(320))
    ran = []
    weighing = whole_rows.weighing_attention
    monkeypatch.setattr(whole_rows, "weighing_attention", lambda config: ran.append(1) or weighing(config))
    some = [shots.Choice(0, 0, [5, 6], [7]), shots.Choice(0, 1, [5], [8, 9])]
    shots_before = list(range(3, 60))
    monkeypatch.setattr(whole_rows, "on_gpu", lambda tensor: False)
    with product.at(0.6):
        masked = shots._in_rows(product, shots_before, some)
        assert not ran
        monkeypatch.setattr(whole_rows, "on_gpu", lambda tensor: True)
        by_kernel = shots._in_rows(product, shots_before, some)
    assert ran == [1] * 2, "in each layer"
    assert by_kernel == pytest.approx(masked, abs=near)
    with product.at(None):
        assert shots._in_rows(product, shots_before, some) != pytest.approx(masked, abs=near)


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
