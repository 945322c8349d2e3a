"""Retrieval against rules that look values up, with tokenizers that cut numbers in different ways."""

import math
import re

import pytest
import torch

import modlab
from modlab.errors import ModlabError
from tests.helpers.handmade import (
    HandMade,
    copier,
    induction,
    make_joining_tokenizer,
    make_tokenizers,
)
from tests.helpers.models import alternate_layers, scatter_gates

TOKENIZERS = make_tokenizers()
BYTES = TOKENIZERS["a token a byte"]
WORDS = "the router decides which token runs and which token skips a layer of depth\n"
SMALL = {"rows": 6, "pairs": 4, "lead": 10, "progress": False}


def text_of(tokenizer):
    return torch.tensor(tokenizer(WORDS * 200, add_special_tokens=False)["input_ids"])[None]


def hand_made(rule, tokenizer=BYTES):
    return HandMade(rule, vocab_size=len(tokenizer))


def probe(model, tokenizer=BYTES, distances=(150,), **settings):
    return modlab.retrieval(model, text_of(tokenizer), tokenizer, distances=distances, **SMALL | settings)


# What is asked, and what counts.


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_a_model_that_looks_the_name_up_is_always_right(kind):
    tokenizer = TOKENIZERS[kind]
    table = probe(hand_made(induction(12), tokenizer), tokenizer, distances=(150, 300))
    assert table.distance.to_list() == [150, 300] and table.rows.to_list() == [6, 6]
    assert table.accuracy.to_list() == table.token_accuracy.to_list() == [1.0, 1.0]
    assert table.loss.to_list() == pytest.approx([0, 0], abs=1e-6)


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_the_question_stands_at_its_distance(kind):
    tokenizer = TOKENIZERS[kind]
    right = probe(hand_made(copier(150), tokenizer), tokenizer)
    assert right.accuracy[0] == 1.0 and right.loss[0] == pytest.approx(0, abs=1e-6)
    for off in (149, 151):
        assert probe(hand_made(copier(off), tokenizer), tokenizer).accuracy[0] < 0.5


def test_a_model_that_takes_the_latest_value_is_wrong_unless_it_is_the_only_one():
    latest = hand_made(induction(2))  # sees "= ", whatever the name
    assert probe(latest).accuracy[0] == 0
    assert probe(latest, pairs=1).accuracy[0] >= 0.5  # two tokens are too few to copy 8887 or 8787 by


def test_a_uniform_guess():
    table = probe(hand_made(lambda ids, logits: None))
    assert table.loss[0] == pytest.approx(math.log(len(BYTES)))
    assert table.tokens[0] == 6 * 4  # four digits a value, the blank before them is given
    assert table.accuracy[0] == 0


def test_rows_read_as_they_should():
    model = hand_made(induction(12))
    probe(model, distances=(120, 150))
    near, far = ([BYTES.decode(row) for row in rows] for rows in (model.seen[:6], model.seen[6:]))
    assert len(set(near)) == 6
    for short, long in zip(near, far, strict=True):
        lines = re.findall(r"\nname_(\d\d) = (\d{4})(?=\n|$)", long)
        assert len(lines) == 5 and lines[0] == lines[-1]
        assert len({name for name, _ in lines[:-1]}) == len({value for _, value in lines[:-1]}) == 4
        assert re.findall(r"\nname_(\d\d) = (\d{4})(?=\n|$)", short) == lines, "the same at every distance"
        question = long.rindex("\nname_")
        assert question - long.index("\nname_") == 150 and long.index("\nname_") == 10
        assert re.sub(r"\nname_\d\d = \d{4}\n?", "", long) in WORDS * 200, "the rest is running text"


@pytest.mark.parametrize("digit", range(4))
def test_one_wrong_digit_is_a_wrong_answer(digit):
    column = 10 + 150 + len("\nname_17 = ") + digit
    table = probe(hand_made(copier(150, wrong_at=column)), by_row=True)
    assert not table.right.any() and (table.token_accuracy == 3 / 4).all()
    assert table.loss.to_list() == pytest.approx([math.log(len(BYTES)) / 4] * 6)


def test_what_comes_before_the_value_does_not_count():
    table = probe(hand_made(copier(150, wrong_at=10 + 150 + len("\nname_17 = ") - 1)))
    assert table.accuracy[0] == 1 and table.loss[0] == pytest.approx(0, abs=1e-6)


@pytest.fixture(params=["a token a byte", "numbers in few tokens"])
def tokenizer(request):
    return TOKENIZERS[request.param]


@pytest.fixture
def routed(make_llama, tokenizer):
    model = modlab.convert(
        make_llama(vocab_size=len(tokenizer), max_position_embeddings=400), alternate_layers()
    )
    scatter_gates(model)
    return model


def test_batches_change_nothing(routed, tokenizer):
    one, four = (probe(routed, tokenizer, batch_size=size, by_row=True) for size in (1, 4))
    assert four.loss.to_list() == pytest.approx(one.loss.to_list(), rel=1e-5)
    for name in ("row", "right", "tokens", "keep_ratio"):
        assert four[name].to_list() == one[name].to_list()
    assert 0 < one.keep_ratio.mean() < 1


def test_means_are_over_tokens(routed, tokenizer):
    rows, table = probe(routed, tokenizer, by_row=True), probe(routed, tokenizer)
    assert table.tokens[0] == rows.tokens.sum()
    for name in ("loss", "token_accuracy"):
        assert table[name][0] == pytest.approx((rows[name] * rows.tokens).sum() / rows.tokens.sum())
    assert table.keep_ratio[0] == pytest.approx(rows.keep_ratio.mean())


def test_the_keep_ratio_is_of_the_asked_assignment(make_llama):
    model = modlab.convert(make_llama(vocab_size=len(BYTES)), alternate_layers())
    size = len("\nname_17 = 4823")
    for until, share in ((10, 0), (11, 1 / size), (10 + size - 1, (size - 1) / size), (10 + size, 1)):
        with modlab.routing_override(model, lambda layer, gate, position, until=until: position < until):
            assert probe(model).keep_ratio[0] == pytest.approx(share)


def test_seeds():
    def rows(seed):
        model = hand_made(induction(12))
        probe(model, seed=seed)
        return [row.tolist() for row in model.seen]

    assert rows(1) == rows(1)
    assert rows(1) != rows(2)


def test_right_is_what_greedy_search_writes():
    """On the demo model, which finds some of the values."""
    model, tokenizer = modlab.load("demo")
    text = WORDS * 100
    settings = {"distances": (64,), "pairs": 2, "rows": 8, "progress": False}
    table = modlab.retrieval(model, text, tokenizer, by_row=True, **settings)
    fake = HandMade(lambda ids, logits: None, vocab_size=len(tokenizer))
    modlab.retrieval(fake, text, tokenizer, **settings)
    for row, right, tokens in zip(fake.seen, table.right, table.tokens, strict=True):
        prompt = row[None, :-tokens]
        made = model.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=int(tokens), do_sample=False
        )
        assert (made[0].tolist() == row.tolist()) == right
    assert 0 < table.right.sum() < 8


def test_a_tokenizer_that_joins_names_and_values_is_refused():
    with pytest.raises(ModlabError, match="joins names and values, so"):
        probe(hand_made(induction(2)), make_joining_tokenizer())


def test_a_tokenizer_without_digits_is_refused():
    class Letters:
        def __call__(self, text, **kwargs):
            return {"input_ids": [ord(c) if c.isalpha() else 0 for c in text]}

    with pytest.raises(ModlabError, match="Letters.*gives different numbers the same tokens"):
        modlab.retrieval(hand_made(induction(2)), text_of(BYTES), Letters(), **SMALL)


def test_what_does_not_fit_is_refused_or_left_out():
    model = hand_made(induction(12))
    with pytest.raises(ModlabError, match="distance of 60 tokens is too short: at least 64 .*4 assignments"):
        probe(model, distances=(60,))
    model.config.max_position_embeddings = 180
    with pytest.warns(UserWarning, match="retrieval: distances left out. 156 tokens: a row of 181 tokens"):
        assert probe(model, distances=(155, 156)).distance.to_list() == [155]
    for settings, message in (({"pairs": 0}, "pairs=0"), ({"pairs": 91}, "1 to 90"), ({"rows": 0}, "rows=0")):
        with pytest.raises(ModlabError, match=message):
            probe(model, **settings)
