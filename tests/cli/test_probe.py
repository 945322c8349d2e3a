"""`modlab probe` with a model made here: what it prints is what the functions return."""

import json
from pathlib import Path

import pandas as pd
import pytest
import torch
from transformers import LlamaForCausalLM

import modlab
from modlab import cli
from tests.helpers.models import alternate_layers, scatter_gates, tiny_config
from tests.helpers.tokenizers import make_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A converted model and its tokenizer (`mod`), the dense one (`dense`), and some text (`text.txt`)."""
    folder = tmp_path_factory.mktemp("probe")
    tokenizer = make_tokenizer()
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        tiny_config(vocab_size=len(tokenizer), num_hidden_layers=2, max_position_embeddings=256)
    )
    model.eval().save_pretrained(folder / "dense")
    scatter_gates(modlab.convert(model, alternate_layers()))
    model.save_pretrained(folder / "mod")
    for name in ("dense", "mod"):
        tokenizer.save_pretrained(folder / name)
    words = "the router decides which token runs and which token skips a layer\n"
    (folder / "text.txt").write_text(words * 80)
    return folder


@pytest.fixture
def words(folder):
    flags = (
        "--distances 100,150,200 --rows 3 --passage 8 --pairs 2 --prompts 2 --prompt-tokens 10 --new-tokens 9"
    )
    return ["probe", str(folder / "mod"), "--data", str(folder / "text.txt"), *flags.split()]


def test_json_holds_what_the_functions_return(folder, words, capsys):
    assert cli.main([*words, "--judge", str(folder / "dense"), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    model, tokenizer = modlab.load(folder / "mod")
    rows = list(modlab.data.packed(str(folder / "text.txt"), tokenizer, seq_len=256))
    ids = [row["input_ids"] for row in rows]
    recall = modlab.recall(model, ids, distances=(100, 150, 200), rows=3, passage=8, progress=False)
    pd.testing.assert_frame_equal(pd.DataFrame(facts["recall"]), recall, check_dtype=False)
    retrieval = modlab.retrieval(
        model, ids, tokenizer, distances=(100, 150, 200), rows=3, pairs=2, progress=False
    )
    pd.testing.assert_frame_equal(pd.DataFrame(facts["retrieval"]), retrieval, check_dtype=False)
    health = modlab.generation_health(
        model,
        ids,
        judge=modlab.load(folder / "dense")[0],
        prompts=2,
        prompt_tokens=10,
        new_tokens=9,
        progress=False,
    )
    assert facts["generation"] == json.loads(json.dumps(health.to_dict()))
    assert 0 < facts["recall"][0]["second_keep_ratio"] < 1
    for key in ("device_name", "dtype", "versions", "date", "command", "judge"):
        assert facts[key]


def test_tables_name_what_was_left_out(words, capsys):
    words[words.index("--distances") + 1] = "100,240"
    assert cli.main([*words, "--only", "recall", "retrieval"]) == 0
    out = capsys.readouterr().out
    assert "second_loss" in out and "accuracy" in out and "greedy" not in out
    assert "distance 240 left out: a row of 280 tokens (prefix 32 + distance + passage 8) exceeds" in out


def test_single_rows_and_single_passages_are_json_too(words, capsys):
    assert cli.main([*words, "--only", "recall", "--by-row", "--json"]) == 0
    assert [line["row"] for line in json.loads(capsys.readouterr().out)["recall"]] == [0, 1, 2] * 3
    words[words.index("--rows") + 1] = "1"
    assert cli.main([*words, "--only", "recall", "--json"]) == 0
    (line, *_) = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)["recall"]
    assert line["second_stderr"] is None, "one passage has no standard error"


def test_mistakes_are_explained(folder, words, capsys, tmp_path):
    assert cli.main([*words, "--only", "recall", "--judge", "x"]) == 2
    assert "--only leaves generation out" in capsys.readouterr().err
    model, _ = modlab.load(folder / "dense")
    model.save_pretrained(tmp_path / "other")
    tokenizer = make_tokenizer()
    tokenizer.add_tokens("one more")
    tokenizer.save_pretrained(tmp_path / "other")
    assert cli.main([*words, "--judge", str(tmp_path / "other")]) == 2
    assert "has another tokenizer" in capsys.readouterr().err
    words[words.index("--distances") + 1] = "1000"
    assert cli.main(words) == 2
    assert "exceeds the context of 256; distances up to 216 fit" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main([*words[:4], "--distances", "far"])
    assert "not a list of whole numbers such as 256,1024" in capsys.readouterr().err


def test_the_demo_pair():
    """Both models of the pair on text that neither has been trained on."""
    text = (Path(modlab.__file__).parent / "widgets" / "views.py").read_text(encoding="utf-8")
    tables = {}
    for name in ("demo-dense", "demo"):
        model, tokenizer = modlab.load(name)
        tables[name] = modlab.recall(
            model, text, tokenizer, distances=(128, 512), passage=32, rows=4, progress=False
        )
    dense, routed = tables["demo-dense"], tables["demo"]
    assert (dense.second_loss < dense.first_loss).all() and (dense.second_keep_ratio == 1).all()
    assert (routed.second_keep_ratio < 0.5).all()
    health = modlab.generation_health(
        model, text, tokenizer, prompts=3, prompt_tokens=48, new_tokens=48, progress=False
    )
    assert health.greedy.loss < health.sampled.loss, "greedy search takes the likeliest tokens"
    assert sorted(health.greedy.keep_ratio_by_layer) == model.mod.layers


def test_paired_tables_have_both_sides(folder, words, capsys) -> None:
    assert cli.main([*words, "--only", "recall", "retrieval", "--paired", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert [line["distance"] for line in facts["recall"]] == [100, 150, 200]
    assert {"dense", "routed", "gap", "stderr"} <= set(facts["recall"][0])
    assert {"dense_right", "of_dense", "difference"} <= set(facts["retrieval"][0])
    words[1] = str(folder / "dense")
    assert cli.main([*words, "--paired"]) == cli.BAD_INPUT
    assert "is dense" in capsys.readouterr().err


def test_report_writes_a_page_and_its_figures(folder, tmp_path, capsys) -> None:
    flags = "--rows 1 --seq-len 100 --distances 100 --questions 2 --pairs 2"
    data = [f"one={folder / 'text.txt'}", str(folder / "text.txt")]
    out = ["--out", str(tmp_path / "page.html")]
    assert cli.main(["report", str(folder / "mod"), "--data", *data, *flags.split(), *out]) == 0
    read = json.loads((tmp_path / "page.json").read_text())
    assert set(read["rows"][0]["keep_by_text"]) == {"one", "text"} and read["versions"] and read["command"]
    assert "K/V" in capsys.readouterr().out and (tmp_path / "page.html").stat().st_size > 1000
    for wrong, says in (
        (["report", str(folder / "dense"), "--data", *data, *out], "is dense"),
        (["report", str(folder / "mod"), "--data", data[1], data[1], *out], "two texts have one name"),
        (["report", str(folder / "mod"), "--data", "=x", *out], "NAME=SOURCE"),
        (["report", str(folder / "mod"), "--data", *data, "--out", str(tmp_path / "page.txt")], "a page"),
        (["report", str(folder / "mod"), "--data", *data, "--kv-saving", "2", *out], "know no thresholds"),
    ):
        assert cli.main(wrong) == cli.BAD_INPUT
        assert says in capsys.readouterr().err
