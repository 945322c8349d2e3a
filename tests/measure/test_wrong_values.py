"""Arguments of the wrong type or size: one error that names them, from every measure, probe and trace."""

import math

import pytest
import torch

import modlab
from modlab import data, measure
from modlab.errors import ModlabError, check_count, check_number
from tests.helpers.models import routed_llama
from tests.helpers.tokenizers import make_tokenizer

ROWS = torch.randint(3, 500, (4, 40), generator=torch.Generator().manual_seed(0))
QUIET = {"progress": False}


@pytest.fixture(scope="module")
def model():
    return routed_llama()


WRONG = {
    "thresholds=0.5": lambda m: modlab.sweep(m, None, [ROWS], 0.5, repeats=0, **QUIET),
    "thresholds='0.5'": lambda m: modlab.sweep(m, None, [ROWS], "0.5", repeats=0, **QUIET),
    "threshold p='a'": lambda m: modlab.sweep(m, None, [ROWS], ["a"], repeats=0, **QUIET),
    "threshold p=nan": lambda m: modlab.sweep(m, None, [ROWS], [math.nan], repeats=0, **QUIET),
    "repeats=-1": lambda m: modlab.sweep(m, None, [ROWS], [0.5], repeats=-1, **QUIET),
    "repeats=1.5": lambda m: modlab.sweep(m, None, [ROWS], [0.5], repeats=1.5, **QUIET),
    "prompt_tokens=0": lambda m: modlab.sweep(m, None, [ROWS], [0.5], prompt_tokens=0, **QUIET),
    "decode_tokens=0": lambda m: modlab.sweep(m, None, [ROWS], [0.5], decode_tokens=0, **QUIET),
    "seq_len=2.5": lambda m: modlab.sweep(m, None, [ROWS], [0.5], seq_len=2.5, **QUIET),
    "keep_ratio='0.5'": lambda m: modlab.calibrate(m, [ROWS], keep_ratio="0.5"),
    "keep_ratio=True": lambda m: modlab.calibrate(m, [ROWS], keep_ratio=True),
    "tolerance=-1": lambda m: modlab.calibrate(m, [ROWS], keep_ratio=0.5, tolerance=-1),
    "max_passes=0": lambda m: modlab.calibrate(m, [ROWS], keep_ratio=0.5, max_passes=0),
    "batch_size='8'": lambda m: measure.evaluate(m, [ROWS], batch_size="8"),
    "max_batches=-1": lambda m: measure.evaluate(m, [ROWS], max_batches=-1),
    "decode_tokens=-1": lambda m: measure.time_generate(m, ROWS[:1], -1),
    r"not NoneType": lambda m: measure.evaluate(None, [ROWS]),
    r"modlab.load\('demo'\)": lambda m: measure.evaluate("demo", [ROWS]),
    r"not str.*modlab.load": lambda m: modlab.recall("demo", ROWS, **QUIET),
    "tokenizer is needed": lambda m: modlab.trace(m, None, "text"),
    "The tokenizer is needed, also": lambda m: modlab.trace(m, None, [5, 6]),
    "rows='3'": lambda m: modlab.retrieval(m, ROWS, make_tokenizer(), rows="3", **QUIET),
    "distance='a'": lambda m: modlab.recall(m, ROWS, distances=["a"], **QUIET),
    "distances=12": lambda m: modlab.recall(m, ROWS, distances=12, **QUIET),
    "passage=0": lambda m: modlab.recall(m, ROWS, passage=0, **QUIET),
    "temperature='a'": lambda m: modlab.generation_health(m, ROWS, temperature="a", **QUIET),
    "prompt_tokens=0.5": lambda m: modlab.generation_health(m, ROWS, prompt_tokens=0.5, **QUIET),
    "seq_len='16'": lambda m: data.packed(["a"], make_tokenizer(), "16"),
    "seed=-1": lambda m: data.packed(["a"], make_tokenizer(), 16, seed=-1),
    "limit_tokens=-1": lambda m: data.packed(["a"], make_tokenizer(), 16, limit_tokens=-1),
    "heldout_fraction='x'": lambda m: data.documents(["a"], heldout_fraction="x"),
    "The source is a int": lambda m: data.documents(5),
    "The source is a dict": lambda m: data.documents({"text": ["a"]}),
    "The source is empty": lambda m: data.documents(""),
}


@pytest.mark.parametrize("says", WRONG)
def test_the_error_names_the_argument(says, model):
    before = dict(model.mod.thresholds)
    with pytest.raises(ModlabError, match=says):
        WRONG[says](model)
    assert model.mod.thresholds == before


def test_counts_and_numbers_of_any_library_are_taken():
    import numpy as np

    assert check_count("n", np.int64(3)) == 3 and check_number("x", np.float32(0.5)) == 0.5
    assert check_count("n", 0, 0) == 0
    for value in (0, True, 1.0, "1", None, 10**30 * -1):
        with pytest.raises(ModlabError, match="n="):
            check_count("n", value)
    for value in (True, "1", None, math.inf, math.nan, 1j):
        with pytest.raises(ModlabError, match="x="):
            check_number("x", value)
