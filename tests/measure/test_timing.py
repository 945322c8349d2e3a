"""time_generate: the same number of tokens in every call."""

import pytest
import torch

from modlab import measure
from modlab.errors import ModlabError
from tests.measure.models import VOCAB, dense_model


def test_time_generate_counts_every_token(model, batches):
    prefill_ms, decode_ms = measure.time_generate(model, batches[0][:, :8], decode_tokens=4)
    assert prefill_ms > 0 and decode_ms > 0


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
