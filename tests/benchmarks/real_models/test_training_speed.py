"""The speed of the product's fit and distillation is measured on any model, without a GPU too."""

from __future__ import annotations

from benchmarks.real_models.training_speed import measure
from tests.helpers.models import dense_llama


def test_it_says_how_fast_and_how_much() -> None:
    found = measure(
        dense_llama(num_hidden_layers=2), batch=2, length=160, steps=2, accumulate=2, checkpointing=True
    )
    assert set(found) == {
        "fit_seconds",
        "fit_tokens",
        "fit_peak_mib",
        "tokens_per_second",
        "train_peak_mib",
    }
    assert found["tokens_per_second"] > 0 and found["fit_tokens"] == 28 * 80
