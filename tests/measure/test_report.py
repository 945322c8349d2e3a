"""The report: its figures are those of the functions it calls, at each saving asked for; page and JSON."""

from __future__ import annotations

import json

import pandas as pd
import pytest
import torch

import modlab
from modlab.cli.report import _sentence
from modlab.errors import ModlabError
from modlab.measure import divergence, report
from modlab.measure.report_page import _by_position
from modlab.probes import recall_gap, retrieval_gap, ruler
from modlab.routing.trained import Trained
from tests.helpers.models import dense_llama, scatter_gates
from tests.helpers.tokenizers import make_tokenizer

STREAM = torch.randint(3, 128, (1, 3000), generator=torch.Generator().manual_seed(0))
ASKED = {"seq_len": 200, "rows": 2, "distances": (100, 150), "questions": 3, "pairs": 2, "progress": False}


@pytest.fixture(scope="module")
def model():
    config = modlab.MoDConfig(layers="all", gates="kv_head", keep_recent=4)
    sizes = {"vocab_size": len(make_tokenizer()), "max_position_embeddings": 1024, "num_hidden_layers": 2}
    found = scatter_gates(modlab.convert(dense_llama(**sizes), config), 2.0)
    found.mod.trained = Trained(savings={2.0: 0.4, 4.0: 0.8})
    return found


def test_figures_are_those_of_the_functions(model, tmp_path) -> None:
    before = dict(model.mod.thresholds)
    texts = {"a": STREAM, "b & <b>": STREAM.flip(1)}
    with pytest.warns(UserWarning, match="left out"):
        asked = ASKED | {"distances": (100, 150, 5000), "lengths": (1000,), "samples": 1, "name": "tiny"}
        found = report(model, texts, make_tokenizer(), savings=(2, 4), **asked)
    assert model.mod.thresholds == before
    assert [setting.asked for setting in found.settings] == [2, 4]
    for setting in found.settings:
        modlab.set_kv_saving(model, setting.asked)
        alone = divergence(model, texts, seq_len=200, rows=2, progress=False)
        pd.testing.assert_frame_equal(setting.divergence, alone)
        far = {"distances": (100, 150), "rows": 3, "batch_size": 1, "progress": False}
        pd.testing.assert_frame_equal(setting.recall, recall_gap(model, STREAM, **far))
        both = retrieval_gap(model, STREAM, make_tokenizer(), pairs=2, **far)
        pd.testing.assert_frame_equal(setting.retrieval, both)
        tasks = ruler(model, STREAM, make_tokenizer(), lengths=(1000,), samples=1, progress=False)
        pd.testing.assert_frame_equal(setting.tasks, tasks)
        assert setting.kv_saving == alone.dense_kv_bytes.sum() / alone.kv_bytes.sum()
    model.mod.thresholds.update(before)
    one, other = found.settings
    assert one.kv_saving < other.kv_saving and one.kl_far != one.kl_far, "no position is far in 200 tokens"

    found.source = {"command": "modlab report", "date": "today"}
    figures = found.write(tmp_path / "page.html")
    read = json.loads(figures.read_text())
    assert read["model"] == "tiny" and read["command"] == "modlab report" and len(read["rows"]) == 2
    row = read["rows"][0]
    assert row["ratio_asked"] == 2 and row["ratio"] == one.kv_saving and row["kl_far"] is None
    assert set(row["recall_gap"]) == {"100", "150"} and set(row["keep_by_text"]) == set(texts)
    assert set(row["tasks"]["needle 1000"]) == {"score", "dense", "stderr"}
    page = (tmp_path / "page.html").read_text()
    assert "b &amp; &lt;b&gt;" in page and "<b>" not in page.split("</style>")[1].split("<script")[0]
    for shown in ("2x asked", "4x asked", "largest recall gap", "frequent words", "date today"):
        assert shown in page
    assert "http://" not in page.split("<script")[0]


def test_what_was_not_measured_is_said_in_words(model, tmp_path) -> None:
    """Rows that end before position 1,024, one question a distance, a dense model that answers none."""
    asked = ASKED | {"questions": 1, "distances": (100,)}
    found = report(model, STREAM, make_tokenizer(), **asked)
    (setting,) = found.settings
    setting.retrieval = setting.retrieval.assign(dense_right=0, of_dense=float("nan"))
    said = _sentence(setting)
    assert "KL not measured before position 1,024" in said and "none: dense gives no right answer" in said
    assert "nan" not in said
    decides = found.to_html().split("<script")[0]
    assert "nan" not in decides and "dense gives no right answer" in decides


def test_share_of_denses_answers_is_over_all_distances(model) -> None:
    (setting,) = report(model, STREAM, make_tokenizer(), **ASKED).settings
    assert setting.asked is None and setting.tasks is None
    setting.retrieval = pd.DataFrame({"dense_right": [3, 0, 1], "of_dense": [1 / 3, float("nan"), 1.0]})
    assert setting.of_dense == pytest.approx(0.5)


def test_wrong_values_are_refused_before_anything_is_measured(model, tmp_path) -> None:
    with pytest.raises(ModlabError, match="know thresholds for 2x to 4x"):
        report(model, STREAM, make_tokenizer(), savings=(2, 16), **ASKED)
    with pytest.raises(ModlabError, match="is dense"):
        report(dense_llama(), STREAM, make_tokenizer(), **ASKED)
    with pytest.raises(ModlabError, match="give a page's name"):
        report(model, STREAM, make_tokenizer(), **ASKED).write(tmp_path / "page.txt")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "wrong",
    [
        {"questions": 0},
        {"pairs": -1},
        {"samples": 0},
        {"batch_size": 0},
        {"distances": (100, 0)},
        {"lengths": (-5,)},
    ],
)
def test_wrong_counts_are_refused_before_anything_is_measured(model, wrong, monkeypatch) -> None:
    monkeypatch.setattr("modlab.measure.reporting.divergence", lambda *_, **__: pytest.fail("measured"))
    with pytest.raises(ModlabError, match="give a whole number of at least 1"):
        report(model, STREAM, make_tokenizer(), **ASKED | wrong)


@pytest.mark.parametrize("lies", ['[{"text": "mine"}]', '{"what": "speed"}', "no JSON"])
def test_only_a_reports_own_figures_are_overwritten(model, tmp_path, lies) -> None:
    found = report(model, {"<a href='//b'>": STREAM}, make_tokenizer(), **ASKED)
    found.write(tmp_path / "page.html")
    found.write(tmp_path / "page.html")
    assert "<a href=" not in (tmp_path / "page.html").read_text().rpartition("</script>")[2]
    (tmp_path / "texts.json").write_text(lies)
    with pytest.raises(ModlabError, match="would be overwritten"):
        found.write(tmp_path / "texts.html")
    assert (tmp_path / "texts.json").read_text() == lies and not (tmp_path / "texts.html").exists()


def test_names_of_texts_are_text_in_the_legend_too(model) -> None:
    found = report(model, {"<a href='//b'>": STREAM}, make_tokenizer(), **ASKED)
    (line,) = _by_position(found).data
    assert line.name == "present thresholds, &lt;a href=&#x27;//b&#x27;&gt;"


def test_what_has_been_measured_outlives_an_interruption(model, tmp_path) -> None:
    before = dict(model.mod.thresholds)

    def interrupted(found) -> None:
        found.write(tmp_path / "page.html")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        report(model, {"a": STREAM}, make_tokenizer(), savings=(2, 4), each=interrupted, **ASKED)
    (row,) = json.loads((tmp_path / "page.json").read_text())["rows"]
    assert row["ratio_asked"] == 2 and model.mod.thresholds == before


@pytest.mark.parametrize("wrong", [{"lengths": (5000,)}, {"seq_len": 5000}], ids=["tasks", "rows"])
def test_what_is_beyond_the_context_is_refused_before_anything_runs(model, wrong) -> None:
    ran = []
    hook = model.register_forward_pre_hook(lambda *_: ran.append(1))
    try:
        with pytest.raises(ModlabError, match="=5000: the model's context is 1024"):
            report(model, {"a": STREAM}, make_tokenizer(), savings=(2,), **ASKED | wrong)
    finally:
        hook.remove()
    assert not ran


def test_a_report_of_a_model_in_eight_bits_asks_for_both_savings_and_says_so() -> None:
    config = modlab.MoDConfig(layers="all", gates="kv_head", keep_recent=4, kv_cache_dtype="int8")
    sizes = {"vocab_size": len(make_tokenizer()), "max_position_embeddings": 1024, "num_hidden_layers": 2}
    model = scatter_gates(modlab.convert(dense_llama(**sizes), config), 2.0)
    model.mod.trained = Trained(savings={2.0: 0.4, 4.0: 0.8})
    found = report(model, STREAM, make_tokenizer(), savings=(3, 10), **ASKED)
    everything, less = found.settings
    assert everything.divergence.keep_ratio[0] == 1 > less.divergence.keep_ratio[0]
    assert 2.5 < everything.kv_saving < 3.56 < less.kv_saving, "of single precision, an index included"
    assert 0 < everything.divergence.kl_near[0] < 1e-3, "rounded, nothing dropped"
    assert found.to_dict()["kv_cache_dtype"] == "int8" and "in eight bits" in found.to_html()
    with pytest.raises(ModlabError, match=r"know thresholds for 7\.111x to 14\.22x"):
        report(model, STREAM, make_tokenizer(), savings=(3, 20), **ASKED)
