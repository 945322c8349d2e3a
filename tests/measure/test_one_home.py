"""Rules with one home, and all that ask it: a model's context, what a threshold may be."""

import argparse
import ast
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

import modlab
from modlab import probes
from modlab.cli.models import row_length
from modlab.errors import ModlabError
from modlab.hf.model import beyond_context, context_length
from modlab.measure import evaluate, piece_length
from modlab.routing.threshold import check_threshold
from modlab.training.checks import check_length
from tests.helpers.models import alternate_layers, narrow_config

CONTEXT = 48
PACKAGE = Path(modlab.__file__).parent


def model_of(rope=None, context=CONTEXT):
    torch.manual_seed(0)
    rope = {"rope_theta": 10000.0, **(rope or {"rope_type": "default"})}
    config = narrow_config(
        intermediate_size=64, max_position_embeddings=context, initializer_range=0.2, rope_parameters=rope
    )
    return LlamaForCausalLM(config).eval()


class Letters:
    """A tokenizer of a letter a token."""

    is_fast = True
    all_special_ids = ()

    def __len__(self):
        return 97

    def __call__(self, text, **settings):
        found = {"input_ids": [1 + ord(c) % 90 for c in text]}
        if settings.get("return_offsets_mapping"):
            found["offset_mapping"] = [(i, i + 1) for i in range(len(text))]
        return found


def rows_of(length, count=2):
    return torch.randint(1, 97, (count, length), generator=torch.Generator().manual_seed(length))


def seq_len(length):
    return argparse.Namespace(seq_len=length)


CALLERS = {
    "forward": lambda model, n: model(rows_of(n), use_cache=False),
    "trace": lambda model, n: modlab.trace(model, Letters(), "x" * n),
    "train": lambda model, n: check_length(model, n, "batches"),
    "command line": lambda model, n: row_length(seq_len(n), model),
    "generation health": lambda model, n: probes.generation_health(
        model, rows_of(300, 2), prompts=1, prompt_tokens=n - 4, new_tokens=4, progress=False
    ),
}


@pytest.mark.parametrize("name", CALLERS)
def test_all_refuse_from_the_same_length_on(name):
    model = modlab.convert(model_of(), alternate_layers())
    CALLERS[name](model, CONTEXT)
    with pytest.raises(ModlabError, match=rf"\b{CONTEXT}\b"):
        CALLERS[name](model, CONTEXT + 1)


@pytest.mark.parametrize("name", CALLERS)
def test_none_refuses_where_rotary_frequencies_follow_the_text(name):
    """Dynamic NTK is made for longer texts, and a larger `max_position_embeddings` would change the model."""
    model = modlab.convert(model_of({"rope_type": "dynamic", "factor": 4.0}), alternate_layers())
    CALLERS[name](model, 2 * CONTEXT)


def test_pieces_and_probes_stay_within_the_context():
    model = model_of()
    assert piece_length(model, None, None) == piece_length(model, Letters(), 999) == CONTEXT
    assert evaluate(model, rows_of(2 * CONTEXT)).predicted_tokens == 2 * 2 * (CONTEXT - 1)
    unlimited = model_of({"rope_type": "dynamic", "factor": 4.0})
    assert piece_length(unlimited, None, None) is None
    assert evaluate(unlimited, rows_of(2 * CONTEXT)).predicted_tokens == 2 * (2 * CONTEXT - 1)


@pytest.mark.parametrize("length", [0, 1, -3])
def test_pieces_of_no_prediction_are_refused(length):
    with pytest.raises(ModlabError, match=f"seq_len={length}"):
        evaluate(model_of(), rows_of(20), seq_len=length)


@torch.no_grad()
@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "default"},
        {"rope_type": "linear", "factor": 4.0},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": CONTEXT},
        {"rope_type": "yarn", "factor": 4.0},
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        },
    ],
    ids=lambda rope: rope["rope_type"],
)
def test_the_advice_to_raise_the_context_keeps_the_model_what_it_is(rope):
    ids, dense = rows_of(2 * CONTEXT), model_of(rope)
    want = dense(ids, use_cache=False).logits
    model = modlab.convert(model_of(rope), alternate_layers())
    with pytest.raises(ModlabError, match="raise config.max_position_embeddings"):
        model(ids, use_cache=False)
    model.config.max_position_embeddings = 2 * CONTEXT
    torch.testing.assert_close(model(ids, use_cache=False).logits, want)


def test_no_advice_where_it_would_change_the_model_or_cannot_help():
    longrope = {
        "rope_type": "longrope",
        "long_factor": [1.0] * 4,
        "short_factor": [1.0] * 4,
        "original_max_position_embeddings": 16,
    }
    assert beyond_context(model_of(longrope)) == "shorten it"
    learned = modlab.families.tiny_model("gpt2")
    assert context_length(learned) and beyond_context(learned) == "shorten it"


def test_nobody_reads_the_context_but_its_home():
    """Nothing names the setting but what builds configs, and the arithmetic of rotary frequencies."""
    allowed = {"hf/model.py", "bench/models.py", "families/tiny_models.py", "engine/refusals.py"}
    found = set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            name = getattr(node, "attr", None) or getattr(node, "value", None)
            if name == "max_position_embeddings":
                found.add(path.relative_to(PACKAGE).as_posix())
    assert found <= allowed
    assert "hf/model.py" in found


@pytest.mark.parametrize("p", [1, True, False, -0.5, float("nan"), "0.5", None, np.bool_(True)])
def test_a_threshold_is_checked_in_the_same_words_everywhere(p):
    model = modlab.convert(model_of(), alternate_layers())
    trace = modlab.trace(model, Letters(), "hello")
    frame = modlab.sweep(model, None, [rows_of(20)], [0.2, 0.6], repeats=0, progress=False)
    frontier = modlab.widgets.Frontier(frame, model)
    calls = [
        lambda: check_threshold(p),
        lambda: modlab.set_threshold(model, p),
        lambda: trace.preview_keep(p),
        lambda: trace.preview_saving([p, 0.5]),
        lambda: frontier.choose(p),
        lambda: modlab.widgets.Compare(model, Letters(), "hello", p=(0.5, p)),
    ]
    for call in calls:
        with pytest.raises(ModlabError, match="at least 0 and below 1"):
            call()
    if isinstance(p, int | float) and p is not False:  # which a trait takes for 0.0
        explorer = modlab.widgets.RoutingHeatmap(trace)
        with pytest.raises(ModlabError, match="at least 0 and below 1"):
            explorer.threshold = p


@pytest.mark.parametrize("p", [0.5, np.float32(0.5), np.float64(0.5)])
def test_thresholds_of_numpy_are_taken(p):
    assert check_threshold(p) == 0.5 and type(check_threshold(p)) is float
