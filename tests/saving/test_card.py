"""A model card shows names, paths and commands as they are: as text."""

from __future__ import annotations

import re

import pytest
import torch
from huggingface_hub import ModelCard

import modlab
from modlab import measure
from modlab.saving.card import code, model_card, plain
from tests.helpers.models import alternate_layers, dense_llama, leaving_llama, routed_llama

HOSTILE = [
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "![x](http://tracker)",
    "[click](javascript:alert(1))",
    "a`b``c```d",
    "```\n# heading\n```",
    "x\n---\nlicense: mine\n---\n",
    "a | b | c",
    '"); import os; os.system("x") #',
    "--> <!-- written by somebody -->",
    '\\"); print(1) #',
    "$x$ **bold** _it_ ~~no~~",
]


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_name_stays_text(name) -> None:
    model = modlab.convert(dense_llama(), alternate_layers())
    evaluation = measure.evaluate(model, [torch.randint(3, 500, (1, 20))])
    evaluation.source = {
        "data": name,
        "command": f"modlab eval {name}",
        "device_name": name,
        "versions": {name: name},
    }
    text = model_card(model, name, evaluation, routers_of=f"/models/{name}")
    card = ModelCard(text)
    assert card.data.license is None and card.data.library_name == "transformers"
    fenced = re.compile(r"^(`{3,})python\n(.*?)\n\1$", re.M | re.S)
    (program,) = [found[1] for found in fenced.findall(card.text)]
    compile(program, "card", "exec")
    call = program.splitlines()[-1]
    assert eval(call[call.index("load(") + 5 : call.rindex(")  #")]) == name
    outside = re.sub(r"(`+)(?!`).+?(?<!`)\1(?!`)", "", fenced.sub("", card.text))
    outside = outside.replace("<!-- written by modlab -->", "")
    assert not re.search(r"<[a-zA-Z!/]", outside), "HTML"
    assert not re.search(r"(?<!\\)\]\((?!https://(arxiv|huggingface))", outside), "a link"
    headings = [line for line in fenced.sub("", card.text).splitlines() if line.startswith("#")]
    assert headings == [f"# {plain(name)}", "## How to load"]


def test_text_and_code() -> None:
    assert plain("a_b <c> & d\n# e") == "a\\_b &lt;c&gt; &amp; d \\# e"
    assert code("a`b") == "``a`b``" and code("`a`") == "`` `a` ``" and code("a\nb") == "`a b`"


def test_a_plain_name_stays_plain(tmp_path) -> None:
    model = modlab.convert(dense_llama(), alternate_layers())
    model.save_pretrained(tmp_path / "my model")
    text = (tmp_path / "my model" / "README.md").read_text()
    assert "# my model\n" in text and 'modlab.load("my model")' in text
    assert "modlab eval 'my model' --data SOURCE" in text and "--card" not in text


def test_the_card_is_headed_by_the_folder_that_a_path_means(tmp_path, monkeypatch) -> None:
    (tmp_path / "named" / "below").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "named" / "below")
    modlab.convert(dense_llama(), alternate_layers()).save_pretrained("..")
    assert "# named\n" in (tmp_path / "named" / "README.md").read_text()
    assert [path.name for path in tmp_path.iterdir()] == ["named"]


def test_a_rule_that_decides_without_gates_has_no_router_and_no_threshold() -> None:
    text = model_card(leaving_llama("prompt"), "x")
    assert "in 2 of its 6 layers a fixed rule decides for each token whether it runs" in text
    assert "\n| routing | the upper layers, by position |\n" in text
    assert not re.search(r"a router|threshold|straight", text)
    text = model_card(leaving_llama("kv+prompt"), "x")
    assert "a router decides for each token" in text and "\n| threshold p | 0.5 |\n" in text


def test_a_card_says_in_how_many_bits_keys_and_values_are() -> None:
    said = "\n| keys and values | in {}, a step a token and KV head |\n"
    model = routed_llama(skip="kv")
    assert "| keys and values |" not in model_card(model, "x")
    for dtype, bits in {"int8": "eight bits", "k6v4": "six bits (keys) and four (values)"}.items():
        modlab.set_kv_cache_dtype(model, dtype)
        assert said.format(bits) in model_card(model, "x")
