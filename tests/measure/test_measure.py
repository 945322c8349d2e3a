"""Loss, sweep and calibration, on a tiny model whose routers were given spread-out gates."""

import math
import warnings

import pandas as pd
import pytest
import torch

import modlab
from modlab import measure
from modlab.errors import ModlabError
from tests.helpers.models import alternate_layers
from tests.measure.models import VOCAB, dense_model, spread_gates


@pytest.fixture
def model():
    return spread_gates(modlab.convert(dense_model(), alternate_layers()))


@pytest.fixture(scope="module")
def batches():
    generator = torch.Generator().manual_seed(2)
    return [torch.randint(0, VOCAB, (2, 100), generator=generator) for _ in range(3)]


class Letters:
    """A tokenizer as far as `as_batches` needs one."""

    def __call__(self, text, **settings):
        return {"input_ids": [ord(c) % VOCAB for c in text]}


def test_loss_is_the_models_own(batches):
    model = dense_model()
    with torch.no_grad():
        expected = torch.stack([model(b, labels=b).loss for b in batches]).mean()
    assert measure.loss(model, None, batches) == pytest.approx(float(expected), rel=1e-6)
    result = measure.evaluate(model, batches)
    assert result.keep_ratio == 1.0
    assert result.predicted_tokens == 3 * 2 * 99
    assert result.kv_saving == 1.0
    assert result.perplexity == pytest.approx(math.exp(float(expected)), rel=1e-5)


def test_loss_ignores_padding(batches):
    model = dense_model()
    ids = batches[0][:1, :20]
    alone = measure.loss(model, None, ids)
    padded = torch.cat([torch.zeros(1, 7, dtype=torch.long), ids], 1)
    mask = torch.cat([torch.zeros(1, 7, dtype=torch.long), torch.ones_like(ids)], 1)
    got = measure.evaluate(model, {"input_ids": padded, "attention_mask": mask})
    assert got.loss == pytest.approx(alone, rel=1e-5)
    assert got.predicted_tokens == 19
    after = {name: value.flip(1) for name, value in {"input_ids": padded, "attention_mask": mask}.items()}
    assert measure.evaluate(model, after).predicted_tokens == 19


def test_long_inputs_are_cut_and_short_leftovers_dropped():
    pieces = measure.as_batches(torch.arange(21)[None], seq_len=10)
    assert [p["input_ids"].tolist()[0] for p in pieces] == [list(range(10)), list(range(10, 20))]


def test_default_pieces_are_the_context_for_tokens_and_shorter_for_texts():
    model = dense_model()
    assert measure.piece_length(model, None, None) == 256
    model.config.max_position_embeddings = 8192
    assert measure.piece_length(model, None, None) == 8192
    assert measure.piece_length(model, Letters(), None) == measure.TEXT_PIECE
    assert measure.piece_length(model, Letters(), 4096) == 4096
    assert measure.piece_length(model, None, 10000) == 8192


def test_batches_from_texts_rows_and_datasets():
    assert measure.as_batches("abc", Letters())[0]["input_ids"].tolist() == [
        [97 % VOCAB, 98 % VOCAB, 99 % VOCAB]
    ]
    assert measure.as_batches([{"input_ids": [1, 2, 3]}])[0]["input_ids"].shape == (1, 3)
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_dict({"input_ids": [[1, 2, 3], [4, 5, 6]]})
    assert len(measure.as_batches(rows)) == 2


@pytest.mark.parametrize(
    ("data", "tokenizer", "message"),
    [
        ("", Letters(), "0 token"),
        (["abc", "x"], Letters(), "text 1"),
        ("abc", None, "tokenizer"),
        ([], None, "nothing to measure"),
        ([{"labels": [1, 2]}], None, "input_ids"),
    ],
)
def test_bad_data_is_refused(data, tokenizer, message):
    with pytest.raises(ModlabError, match=message):
        measure.as_batches(data, tokenizer)


def test_modes_are_restored(batches):
    model = dense_model().train()
    measure.loss(model, None, batches)
    assert model.training


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
        "prefill_ms",
        "decode_ms",
    ]
    assert set(named) <= set(frame.columns)
    assert not frame[named].isna().any().any()
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


@pytest.mark.parametrize("per_layer", [False, True])
@pytest.mark.parametrize("wanted", [0.25, 0.6])
def test_calibrate_reaches_the_ratio(model, batches, wanted, per_layer):
    got = modlab.calibrate(model, batches, keep_ratio=wanted, per_layer=per_layer, tolerance=0.02)
    assert sorted(got) == model.mod.layers
    assert dict(got) == model.mod.thresholds
    result = measure.evaluate(model, batches)
    assert result.keep_ratio == pytest.approx(wanted, abs=0.02)
    assert got.keep_ratio == pytest.approx(result.keep_ratio)
    assert got.keep_ratio_by_layer == pytest.approx(result.keep_ratio_by_layer)
    if per_layer:
        assert all(ratio == pytest.approx(wanted, abs=0.02) for ratio in result.keep_ratio_by_layer.values())
    else:
        assert len(set(got.values())) == 1


def test_calibrate_counts_padding_out(model, batches):
    ids = torch.cat([torch.zeros(2, 60, dtype=torch.long), batches[0]], 1)
    mask = torch.cat([torch.zeros(2, 60, dtype=torch.long), torch.ones_like(batches[0])], 1)
    padded = modlab.calibrate(model, [{"input_ids": ids, "attention_mask": mask}], keep_ratio=0.4)
    plain = modlab.calibrate(model, batches[:1], keep_ratio=0.4)
    assert dict(padded) == pytest.approx(dict(plain), abs=1e-3)


@pytest.mark.parametrize("per_layer", [False, True])
def test_calibrate_says_when_gates_cannot_be_split(batches, per_layer):
    fresh = modlab.convert(dense_model(), alternate_layers())
    before = dict(fresh.mod.thresholds)
    with pytest.raises(ModlabError, match="not reachable.*\n.*train the routers"):
        modlab.calibrate(fresh, batches, keep_ratio=0.5, per_layer=per_layer)
    assert fresh.mod.thresholds == before


def test_calibrate_says_when_the_first_tokens_are_too_many(model):
    with pytest.raises(ModlabError, match="always kept, which is 0.400"):
        modlab.calibrate(model, torch.arange(10)[None], keep_ratio=0.1)


@pytest.mark.parametrize("wanted", [0.0, 1.0, -1, 25])
def test_calibrate_refuses_ratios_outside_the_unit_interval(model, batches, wanted):
    with pytest.raises(ModlabError, match=f"keep_ratio={wanted}"):
        modlab.calibrate(model, batches, keep_ratio=wanted)


def test_time_generate_counts_every_token(model, batches):
    prefill_ms, decode_ms = measure.time_generate(model, batches[0][:, :8], decode_tokens=4)
    assert prefill_ms > 0 and decode_ms > 0


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


@pytest.mark.parametrize("decode_tokens", [0, 1, 6])
def test_no_token_ends_a_timed_text(batches, decode_tokens):
    """The same number of tokens, though every token of the vocabulary ends a text; padding is passed on."""
    model, given = dense_model(), []
    model.generation_config.eos_token_id = list(range(VOCAB))
    model.generation_config.num_beams = 3
    model.register_forward_pre_hook(
        lambda module, args, kwargs: given.append(kwargs["attention_mask"][:, :8]), with_kwargs=True
    )
    mask = torch.ones_like(batches[0][:, :8])
    mask[0, :3] = 0
    measure.time_generate(model, batches[0][:, :8], decode_tokens, mask)
    assert len(given) == decode_tokens + 1
    assert all(torch.equal(one, mask) for one in given)


def test_a_text_that_ends_early_gives_no_time(batches):
    model = dense_model()
    with pytest.raises(ModlabError, match="2 tokens of 9"):
        stop = lambda ids, scores, **more: torch.full((len(ids),), ids.shape[1] >= 10)  # noqa: E731
        measure.time_generate(model, batches[0][:, :8], 8, stopping_criteria=[stop])
