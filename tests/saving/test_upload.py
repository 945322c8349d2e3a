"""Model card and upload; the hub's client is replaced at its boundary, everything before it is real."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import HfApi, ModelCard
from huggingface_hub.errors import EntryNotFoundError
from transformers import AutoModelForCausalLM

import modlab
from modlab import measure
from tests.helpers.models import scatter_gates

IDS = torch.randint(3, 500, (2, 40), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def model(make_llama):
    dense = make_llama()
    dense.name_or_path = "somebody/base-model"
    converted = modlab.convert(dense)
    scatter_gates(converted)
    return converted


@pytest.fixture
def hub(monkeypatch):
    """What would have gone to the hub: files by name, and the arguments of the call."""
    sent = SimpleNamespace(files={}, arguments={}, card=None)

    def upload_folder(self, *, folder_path, **arguments):
        ignored = arguments["ignore_patterns"] or []
        files = [p for p in Path(folder_path).iterdir() if p.name not in ignored]
        sent.files, sent.arguments = {p.name: p.read_bytes() for p in files}, arguments
        return SimpleNamespace(commit_url=f"https://hub/{arguments['repo_id']}/commit/1")

    def load(source, **arguments):
        if Path(source).is_file():
            return ModelCard(Path(source).read_text())
        if sent.card is None:
            raise EntryNotFoundError("no README.md")
        return ModelCard(sent.card)

    monkeypatch.setattr(HfApi, "create_repo", lambda self, repo_id, **_: SimpleNamespace(repo_id=repo_id))
    monkeypatch.setattr(HfApi, "upload_folder", upload_folder)
    monkeypatch.setattr(ModelCard, "load", load)
    return sent


def test_what_is_pushed_is_a_folder_that_loads(model, hub, tmp_path) -> None:
    evaluation = measure.evaluate(model, [IDS])
    evaluation.source = {"data": "texts.jsonl", "command": "modlab eval m --data texts.jsonl"}
    url = model.push_to_hub("somebody/mod", evaluation=evaluation, private=True, tags=["mine"])
    assert url.endswith("somebody/mod/commit/1") and hub.arguments["repo_id"] == "somebody/mod"
    expected = {"config.json", "generation_config.json", "model.safetensors", "README.md"}
    assert hub.files.keys() == expected | {"modlab_config.json", "modlab_router.safetensors"}
    for name, content in hub.files.items():
        (tmp_path / name).write_bytes(content)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again(IDS).logits, model(IDS).logits)
    assert again.mod_base_model == "somebody/base-model"

    card = ModelCard(hub.files["README.md"].decode())
    assert {"mixture-of-depths", "modlab", "mine"} <= set(card.data.tags)
    assert card.data.base_model == "somebody/base-model" and card.data.library_name == "transformers"
    assert {r.metric_type: r.metric_value for r in card.data.eval_results} == {
        "loss": round(evaluation.loss, 6),
        "keep_ratio": round(evaluation.keep_ratio, 6),
        "kv_saving": round(evaluation.kv_saving, 6),
    }
    for said in (
        "in 3 of its 6 layers",
        f"| tokens kept in routed layers | {evaluation.keep_ratio:.1%} |",
        f"{evaluation.kv_saving:.2f}x smaller",
        f"{evaluation.loss:.4f} nats",
        "78 predicted tokens) by `modlab eval m --data texts.jsonl`",
        'modlab.load("mod")',
        "[somebody/base-model](https://huggingface.co/somebody/base-model)",
    ):
        assert said in card.text, said


def test_save_pretrained_can_push(model, hub, tmp_path) -> None:
    model.save_pretrained(tmp_path / "my-mod", push_to_hub=True, commit_message="first")
    assert hub.arguments["repo_id"] == "my-mod" and hub.arguments["commit_message"] == "first"
    assert hub.files == {p.name: p.read_bytes() for p in (tmp_path / "my-mod").iterdir()}


def test_a_card_that_somebody_wrote_stays(model, hub, tmp_path) -> None:
    (tmp_path / "README.md").write_text("# Mine\n")
    model.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "# Mine\n"
    hub.card = "# Written on the hub\n"
    model.push_to_hub("somebody/mod")
    assert "README.md" not in hub.files and "modlab_router.safetensors" in hub.files


def test_card_without_figures_says_so_and_is_written_anew_with_them(model, tmp_path) -> None:
    model.save_pretrained(tmp_path)
    before = (tmp_path / "README.md").read_text()
    assert "were not measured" in before and "modlab eval" in before and "x smaller" not in before
    model.save_pretrained(tmp_path, evaluation=measure.evaluate(model, [IDS]))
    after = (tmp_path / "README.md").read_text()
    assert "were not measured" not in after and "x smaller" in after


def test_a_local_path_is_no_base_model(make_llama, tmp_path) -> None:
    """Where the files lay on the author's machine is nobody's business."""
    dense = make_llama()
    dense.name_or_path = str(tmp_path)
    modlab.convert(dense).save_pretrained(tmp_path / "mod")
    for name in ("README.md", "modlab_config.json"):
        assert str(tmp_path) not in (tmp_path / "mod" / name).read_text()
