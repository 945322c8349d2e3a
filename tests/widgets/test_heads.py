"""Names of heads: each says what its head keeps, with the figures behind it."""

from dataclasses import replace

import numpy as np
import pytest

from modlab.traces.routing_trace import RoutingTrace
from modlab.widgets.heads import kinds, name_heads, names_in_words, phi
from tests.helpers.traces import make_trace

WORDS = ["the", " cat", " saw", " a", " mouse", ",", " and", " it", " ran", ".", "\n"] * 6 + [
    " elephant",
    " ox",
]
IDS = np.asarray([WORDS.index(word) for word in WORDS])


def trace_of(*keeps: np.ndarray, **fields: object) -> RoutingTrace:
    """One row a mask, of layers 1, 3, 5, ...; no first tokens."""
    keep = np.stack(keeps)
    made = {"gate": np.where(keep, 0.9, 0.1), "keep": keep, "keep_first": 0, "token_ids": IDS}
    return make_trace(len(WORDS), 2 * len(keep), tokens=list(WORDS), **{**made, **fields})


def test_a_head_is_named_after_the_kind_that_it_keeps() -> None:
    of_kind = kinds(list(WORDS), IDS)
    for name in ("words", "punctuation", "line ends", "line beginnings", "rare tokens"):
        (head,) = name_heads(trace_of(of_kind[name]))
        assert head["name"] == name and f"are {name}, which are" in head["says"]
        assert head["share"] == pytest.approx(of_kind[name].mean())
        assert head["kinds"][0]["kept"] == 1 and name in {row["name"] for row in head["kinds"]}


def test_everything_nothing_and_a_mix() -> None:
    mix = np.arange(len(WORDS)) % 2 == 0
    everything, nothing = np.ones(len(WORDS), bool), np.zeros(len(WORDS), bool)
    names = [head["name"] for head in name_heads(trace_of(everything, nothing, mix))]
    assert names == ["everything", "next to nothing", "a mix"]  # no recent tokens stay in this one


def test_a_head_that_asks_for_first_tokens_only() -> None:
    gate = np.full((2, len(WORDS)), 0.1)
    gate[0, :2] = 0.9
    keep = np.zeros((2, len(WORDS)), bool)
    keep[:, :2] = True  # kept whatever the gate
    heads = name_heads(trace_of(*keep, gate=gate, keep_first=2, keep_recent=7, skip="kv"))
    assert [head["name"] for head in heads] == ["first tokens", "recent tokens"]
    assert all("the latest 8" in head["says"] and head["share"] == 0 for head in heads)


def test_examples_are_counted() -> None:
    keep = np.asarray([word == "," for word in WORDS])
    keep[WORDS.index(",")] = False
    (head,) = name_heads(trace_of(keep))
    assert head["keeps"] == [[",", 5, 6]]
    assert all(kept == 0 and times == 6 for _, kept, times in head["drops"])


def test_names_are_listed_by_layer_and_head() -> None:
    everything = np.ones(len(WORDS), bool)
    trace = trace_of(everything, everything, ~everything)
    assert names_in_words(name_heads(trace)) == [
        "everything (2): layer 1, 3",
        "next to nothing (1): layer 5",
    ]
    heads = replace(trace, layers=[1, 1, 3], skip="kv")
    assert names_in_words(name_heads(heads))[0] == "everything (2): layer.KV head 1.0, 1.1"


def test_phi_of_masks_that_agree_differ_or_say_nothing() -> None:
    a = np.asarray([True, True, False, False])
    assert phi(a, a) == pytest.approx(1) and phi(a, ~a) == pytest.approx(-1) and phi(a, a | True) == 0
