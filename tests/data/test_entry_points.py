"""Every entry point takes what the others take: a text, a chat, token ids, batches; and refuses the same."""

from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from datasets import Dataset
from transformers import BatchEncoding

import modlab
from modlab import measure
from modlab.data.texts import token_ids
from modlab.errors import ModlabError
from tests.helpers.models import routed_llama
from tests.helpers.tokenizers import make_tokenizer

QUIET = {"progress": False}
WORDS = "the router decides which token runs and which token skips. "
CHAT = [{"role": "user", "content": WORDS * 12}, {"role": "assistant", "content": WORDS * 12}]


@pytest.fixture(scope="module")
def model() -> Any:
    return routed_llama(scale=4.0)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    made = make_tokenizer()
    made.chat_template = "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    return made


def recall(model: Any, data: Any, tokenizer: Any) -> Any:
    probe = {"distances": [8], "passage": 4, "prefix": 2, "rows": 2}
    return modlab.recall(model, data, tokenizer, **probe, **QUIET).to_numpy().tolist()


def health(model: Any, data: Any, tokenizer: Any) -> Any:
    settings = {"prompts": 2, "prompt_tokens": 4, "new_tokens": 4}
    return modlab.generation_health(model, data, tokenizer, **settings, **QUIET).to_dict()


def retrieval(model: Any, data: Any, tokenizer: Any) -> Any:
    settings = {"distances": [160], "pairs": 2, "lead": 4, "rows": 2}
    return modlab.retrieval(model, data, tokenizer, **settings, **QUIET).to_numpy().tolist()


def calibrated(model: Any, data: Any, tokenizer: Any) -> Any:
    before = dict(model.mod.thresholds)
    try:
        return dict(modlab.calibrate(model, data, keep_ratio=0.5, tokenizer=tokenizer, tolerance=0.05))
    finally:
        modlab.set_threshold(model, before)


def swept(model: Any, data: Any, tokenizer: Any) -> Any:
    return modlab.sweep(model, tokenizer, data, [0.0, 0.5], repeats=0, **QUIET).loss.tolist()


MEASURES = {
    "evaluate": lambda model, data, tokenizer: measure.evaluate(model, data, tokenizer).loss,
    "loss": lambda model, data, tokenizer: measure.loss(model, tokenizer, data),
    "sweep": swept,
    "calibrate": calibrated,
    "recall": recall,
    "retrieval": retrieval,
    "generation health": health,
    "aggregate": lambda model, data, tokenizer: modlab.aggregate_routing(
        model, tokenizer, data, **QUIET
    ).class_kept.tolist(),
}


def forms(ids: list[int]) -> dict[str, Any]:
    """One row of ids in the forms that people have it in."""
    return {
        "list": ids,
        "list of lists": [ids],
        "tensor": torch.tensor(ids),
        "batch": {"input_ids": torch.tensor([ids])},
        "encoding": BatchEncoding({"input_ids": [ids], "attention_mask": [[1] * len(ids)]}),
        "data set": Dataset.from_dict({"input_ids": [ids]}),
        "iterator": iter([ids]),
    }


@pytest.mark.parametrize("name", MEASURES)
def test_texts_chats_and_ids_are_one_to_every_measure(name: str, model: Any, tokenizer: Any) -> None:
    text, run = WORDS * 24, MEASURES[name]
    wanted = run(model, text, tokenizer)
    assert run(model, [text], tokenizer) == wanted
    assert run(model, Dataset.from_dict({"text": [text]}), tokenizer) == wanted
    for data in forms(token_ids(text, tokenizer)).values():
        assert run(model, data, tokenizer) == wanted
    told = run(model, token_ids(CHAT, tokenizer), tokenizer)
    for data in (CHAT, [CHAT], {"messages": CHAT}, Dataset.from_dict({"messages": [CHAT]})):
        assert run(model, data, tokenizer) == told


def test_a_trace_takes_them_too(model: Any, tokenizer: Any) -> None:
    for item in (WORDS, CHAT):
        ids = token_ids(item, tokenizer)
        wanted = modlab.trace(model, tokenizer, item)
        assert wanted.token_ids.tolist() == ids
        for form, data in forms(ids).items():
            if form in ("data set", "iterator"):
                continue  # several rows
            found = modlab.trace(model, tokenizer, data)
            assert found.token_ids.tolist() == ids
            assert found.text == tokenizer.decode(ids)
            assert (found.keep == wanted.keep).all()


REFUSED = {
    "tokens": ([[3, 700]], "from 3 to 700, but the model has 512 tokens"),
    "negative": ([[3, -1]], "from -1 to 3"),
    "floats": ([[0.5, 1.5]], "whole numbers"),
    "key": ([{"input_ids": [3, 4], "pixel_values": [1, 2]}], "pixel_values"),
    "table": (pd.DataFrame({"text": [WORDS]}), r"columns \['text'\]"),
    "bytes": (b"text", "decode"),
    "surrogate": (["fine " + WORDS, "\ud800"], "half a surrogate"),
    "none": (None, "NoneType"),
    "ragged": ([{"input_ids": [[1, 2, 3], [4, 5]]}], "equal length"),
}


@pytest.mark.parametrize("name", MEASURES)
def test_data_without_a_real_token_is_refused(name: str, model: Any, tokenizer: Any) -> None:
    ids = torch.randint(3, 500, (1, 40))
    for data in ({"input_ids": ids, "attention_mask": torch.zeros_like(ids)}, ids[:0], [ids[:0]]):
        with pytest.raises(ModlabError):
            MEASURES[name](model, data, tokenizer)


@pytest.mark.parametrize("what", REFUSED)
@pytest.mark.parametrize("name", MEASURES)
def test_all_refuse_the_same(name: str, what: str, model: Any, tokenizer: Any) -> None:
    data, says = REFUSED[what]
    with pytest.raises(ModlabError, match=says):
        MEASURES[name](model, data, tokenizer)


@pytest.mark.parametrize("name", MEASURES)
def test_no_measure_takes_a_source_as_text(
    name: str, model: Any, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("t.txt").write_text(WORDS * 24)
    for data, says in (("t.txt", "content meant"), (["t.txt"], "content meant"), ("python", "packed")):
        with pytest.raises(ModlabError, match=says):
            MEASURES[name](model, data, tokenizer)
    with pytest.raises(ModlabError, match="content meant"):
        modlab.trace(model, tokenizer, "t.txt")


def test_a_fit_reads_a_source_and_refuses_the_name_in_a_list(
    tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("t.txt").write_text(WORDS * 60)
    config = modlab.FitConfig(context=48)
    model = routed_llama(skip="kv", layers="all", keep_recent=4)
    modlab.fit_routers(model, "t.txt", config, tokenizer=tokenizer, **QUIET)
    for data, says in ((["t.txt"], "content meant"), (WORDS, "text itself")):
        with pytest.raises(ModlabError, match=says):
            modlab.fit_routers(model, data, config, tokenizer=tokenizer, **QUIET)


@pytest.mark.parametrize("key", ["labels", "position_ids"])
def test_probes_refuse_what_they_do_not_use(key: str, model: Any, tokenizer: Any) -> None:
    data = [{"input_ids": list(range(3, 200)), key: list(range(197))}]
    for name in ("recall", "retrieval", "generation health"):
        with pytest.raises(ModlabError, match=key):
            MEASURES[name](model, data, tokenizer)
    measure.evaluate(model, data)


@pytest.mark.parametrize("what", ["tokens", "negative", "floats", "key", "none", "ragged"])
def test_training_refuses_the_same(what: str, model: Any) -> None:
    data, says = REFUSED[what]
    config = modlab.TrainConfig(steps=1, batch_size=1, num_workers=0, mixed_precision="no")
    with pytest.raises(ModlabError, match=says):
        modlab.train(routed_llama(), data, config)


@pytest.mark.parametrize("data", [["a text", "another"], [CHAT], WORDS, [{"text": WORDS}]])
def test_training_sends_texts_to_be_packed(data: Any) -> None:
    with pytest.raises(ModlabError, match=r"modlab\.data\.packed"):
        modlab.train(routed_llama(), data, modlab.TrainConfig(steps=1))


def test_views_show_them_as_text(model: Any, tokenizer: Any) -> None:
    told = tokenizer.apply_chat_template(CHAT, tokenize=False)
    ids = token_ids(WORDS, tokenizer)
    for item, text in (
        (WORDS, WORDS),
        (CHAT, told),
        ({"messages": CHAT}, told),
        (ids, tokenizer.decode(ids)),
    ):
        assert modlab.widgets.Thresholds(model, tokenizer, item).text == text
        assert modlab.widgets.Compare(model, tokenizer, item).prompt == text
    for wrong in ("\ud800", b"text", None):
        with pytest.raises(ModlabError):
            modlab.widgets.Thresholds(model, tokenizer, wrong)
        with pytest.raises(ModlabError):
            modlab.widgets.Compare(model, tokenizer, wrong)
