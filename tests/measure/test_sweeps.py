"""sweep: a row a threshold, thresholds back in place, refusals."""

import math
import warnings

import pandas as pd
import pytest
import torch
from transformers import LlamaForCausalLM

import modlab
from modlab import measure
from modlab.errors import ModlabError
from tests.helpers.models import alternate_layers, tiny_config
from tests.measure.models import VOCAB, dense_model, spread_gates


def test_sweep_columns_and_meaning(model, batches):
    before = dict(model.mod.thresholds)
    frame = modlab.sweep(
        model, None, batches, [0.0, 0.2, 0.5, 0.8], repeats=1, decode_tokens=3, per_layer=True, progress=False
    )
    assert isinstance(frame, pd.DataFrame)
    assert list(frame.threshold) == [0.0, 0.2, 0.5, 0.8]
    named = [
        "threshold",
        "keep_ratio",
        "kv_bytes",
        "kv_saving",
        "loss",
        "perplexity",
        "recall_loss",
        "prefill_ms",
        "decode_ms",
    ]
    assert set(named) <= set(frame.columns)
    assert not frame[named].drop(columns="recall_loss").isna().any().any()  # 600 tokens are too few for it
    assert (frame[["prefill_ms", "decode_ms"]] > 0).all().all()
    assert frame.keep_ratio[0] == 1.0
    assert frame.keep_ratio.is_monotonic_decreasing
    assert frame.keep_ratio[3] < 0.9
    assert frame.kv_bytes.is_monotonic_decreasing
    assert frame.kv_bytes[3] < 0.9 * frame.kv_bytes[0]
    assert frame.perplexity.to_list() == pytest.approx([math.exp(v) for v in frame.loss])
    layers = [f"keep_ratio_{layer}" for layer in model.mod.layers]
    assert frame[layers].mean(axis=1).to_list() == pytest.approx(frame.keep_ratio.to_list())
    assert model.mod.thresholds == before


def test_sweep_with_every_gate_open_is_the_same_model_without_skipping(model, batches):
    with modlab.routing_override(
        model, lambda layer, gate, positions: torch.ones_like(gate, dtype=torch.bool)
    ):
        expected = measure.loss(model, None, batches)
    frame = modlab.sweep(model, None, batches, [0.0], repeats=0, progress=False)
    assert frame.loss[0] == pytest.approx(expected, rel=1e-6)
    assert frame.prefill_ms.isna().all()


def test_sweep_bytes_are_the_caches(model, batches):
    modlab.set_threshold(model, 0.5)
    expected = 0
    with torch.no_grad():
        for batch in batches:
            expected += model(batch, use_cache=True).past_key_values.nbytes
    frame = modlab.sweep(model, None, batches, [0.5], repeats=0, progress=False)
    assert frame.kv_bytes[0] == expected


def test_sweep_says_where_texts_are_too_short_to_save_anything(batches):
    model = spread_gates(modlab.convert(dense_model(), modlab.MoDConfig(keep_recent=batches[0].shape[1])))
    with pytest.warns(UserWarning, match="at most 100 tokens"):
        short = modlab.sweep(model, None, batches, thresholds=[0.1, 0.9], repeats=0, progress=False)
    assert short.kv_bytes.nunique() == 1
    model.mod.config.keep_recent = 20
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        long = modlab.sweep(model, None, batches, thresholds=[0.1, 0.9], repeats=0, progress=False)
    assert long.kv_bytes.nunique() == 2


def test_sweep_restores_thresholds_after_an_error(model, batches, monkeypatch):
    modlab.set_threshold(model, {layer: 0.3 + 0.1 * i for i, layer in enumerate(model.mod.layers)})
    before = dict(model.mod.thresholds)
    model.train()
    calls = []

    def failing(*args, **kwargs):
        calls.append(dict(model.mod.thresholds))
        raise RuntimeError("out of memory")

    monkeypatch.setattr("modlab.measure.sweeps.time_generate", failing)
    with pytest.raises(RuntimeError, match="out of memory"):
        modlab.sweep(model, None, batches, [0.6, 0.7], progress=False)
    assert set(calls[0].values()) == {0.6}
    assert model.mod.thresholds == before
    assert model.training


def test_sweep_refuses_what_it_cannot_do(model, batches):
    before = dict(model.mod.thresholds)
    with pytest.raises(ModlabError, match=r"1\.0"):
        modlab.sweep(model, None, batches, [0.5, 1.0], progress=False)
    with pytest.raises(ModlabError, match="no thresholds"):
        modlab.sweep(model, None, batches, [], progress=False)
    with pytest.raises(ModlabError, match="convert"):
        modlab.sweep(dense_model(), None, batches, progress=False)
    assert model.mod.thresholds == before


@pytest.mark.data
def test_a_real_model_and_its_tokenizer(data_dir):
    """Texts go through the tokenizer, the open row is the dense model, calibration reaches its ratio."""
    model, tokenizer = modlab.load(str(data_dir / "models" / "stories260K"))
    texts = ["Once upon a time there was a little dog who wanted to see the moon. " * 6, "The day came."]
    dense = measure.loss(model, tokenizer, texts)
    spread_gates(modlab.convert(model, alternate_layers()), scale=0.3)
    frame = modlab.sweep(model, tokenizer, texts, [0.0, 0.5], repeats=1, decode_tokens=2, progress=False)
    assert frame.loss[0] == pytest.approx(dense, rel=1e-5)
    assert frame.keep_ratio[1] < 1.0 and frame.loss[1] > dense
    got = modlab.calibrate(model, texts, tokenizer=tokenizer, keep_ratio=0.5, tolerance=0.02)
    assert got.keep_ratio == pytest.approx(0.5, abs=0.02)


def test_far_recall_has_a_column_because_the_mean_loss_hides_it(batches):
    torch.manual_seed(0)
    config = tiny_config(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        max_position_embeddings=512,
        pad_token_id=None,
    )
    model = spread_gates(
        modlab.convert(LlamaForCausalLM(config).eval(), modlab.MoDConfig(layers="all", keep_recent=4))
    )
    rows = [torch.randint(0, VOCAB, (2, 500), generator=torch.Generator().manual_seed(2))]
    frame = modlab.sweep(model, None, rows, [0.0, 0.7], repeats=0, recall_rows=3, progress=False)
    assert frame.attrs["recall_distance"] == 256
    for p, found in zip(frame.threshold, frame.recall_loss, strict=True):
        modlab.set_threshold(model, p)
        alone = modlab.recall(model, rows, distances=[256], rows=3, progress=False)
        assert found == pytest.approx(alone.second_loss[0])
    assert frame.recall_loss[0] != frame.recall_loss[1]
    without = modlab.sweep(model, None, rows, [0.5], repeats=0, recall_rows=0, progress=False)
    assert without.recall_loss.isna().all() and without.attrs["recall_distance"] is None
    short = modlab.sweep(model, None, batches, [0.5], repeats=0, progress=False)
    assert short.recall_loss.isna().all(), "600 tokens in all"
