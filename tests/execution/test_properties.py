"""Properties of every routing, batch, padding, document and chunking; hypothesis looks for a counterexample.

The yardstick is the oracle (`families/oracle.py`), which shares no code with what it judges.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

import modlab
from modlab.families.oracle import Decisions, oracle_logits
from modlab.routing.state import masked_execution
from tests.helpers.batches import (
    FULL,
    LEAVE,
    LONGEST,
    ROUTED,
    SIDES,
    VOCAB,
    Batch,
    assert_real_equal,
    batches,
    build,
    cases,
    dense,
    threshold_at_a_gap,
)

pytestmark = pytest.mark.timeout(3600)  # for what hangs; how long the examples take decides nothing


@torch.no_grad()
def expected_logits(batch: Batch) -> torch.Tensor:
    """What the oracle says of the batch under its forced routing [B, T, V]; the masked reference agrees."""
    model, inputs = batch.model, batch.inputs()
    with batch.forced(), masked_execution(model), modlab.record_routing(model) as recording:
        masked = model(**inputs, use_cache=False).logits
    expected = oracle_logits(dense(batch.which), Decisions.recorded(model, recording.steps[0]), **inputs)
    assert_real_equal(masked, expected, batch.mask)
    return expected


@cases(200)
@given(batches(sides=(*SIDES, "documents")))
def test_every_way_of_running_is_what_the_oracle_says(batch) -> None:
    expected = expected_logits(batch)
    with torch.no_grad(), batch.forced():
        assert_real_equal(batch.model(**batch.inputs(), use_cache=False).logits, expected, batch.mask)
        if not batch.starts:  # documents of one row have no cache
            cached = batch.model(**batch.inputs(), use_cache=True)
            assert_real_equal(cached.logits, expected, batch.mask)


@cases(60)
@given(batches(models=list(LEAVE)))
def test_who_goes_on_computes_the_same_once_the_prompt_has_left(batch) -> None:
    """Routers decide for themselves about keys and values; each row's last token goes on."""
    model, inputs, goes_on = batch.model, batch.inputs(), batch.mask[:, -1].bool()
    with (
        threshold_at_a_gap(model, **inputs),
        torch.no_grad(),
        modlab.record_routing(model) as recording,
    ):
        everybody = model(**inputs, use_cache=False).logits
        expected = oracle_logits(dense(batch.which), Decisions.recorded(model, recording.steps[0]), **inputs)
        for use_cache in (False, True):
            left = model(**inputs, use_cache=use_cache, logits_to_keep=1).logits
            assert_real_equal(left[goes_on], expected[goes_on, -1:], torch.ones(int(goes_on.sum()), 1))
    assert_real_equal(everybody, expected, batch.mask)


@cases(120)
@given(batches(), st.lists(st.integers(1, LONGEST - 1), max_size=4), st.booleans())
@example(  # one column at a time, padding first
    Batch(0, 2, 6, ((0, 1, 2, 3, 4), ()), (), 0.5, 1), [1, 2, 3, 4, 5], False
)
def test_chunks_do_not_change_the_result(batch, cuts, own_cache) -> None:
    expected = expected_logits(batch)
    edges = [0, *sorted({cut for cut in cuts if cut < batch.length}), batch.length]
    cache = modlab.RaggedCache(batch.model) if own_cache else None
    logits = []
    with torch.no_grad(), batch.forced():
        for start, stop in zip(edges, edges[1:], strict=False):
            out = batch.model(**batch.inputs(start, stop), past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            logits.append(out.logits)
    assert_real_equal(torch.cat(logits, 1), expected, batch.mask)


@cases(40)
@given(batches(min_rows=2), st.integers(0, 999))
def test_changing_row_0_never_changes_another_row(batch, seed) -> None:
    """Routing by the routers themselves: logits and decisions of the other rows stay what they were."""
    model, inputs = batch.model, batch.inputs()
    other = inputs["input_ids"].clone()
    other[0] = torch.randint(0, VOCAB, (batch.length,), generator=torch.Generator().manual_seed(seed))
    with threshold_at_a_gap(model, **inputs), torch.no_grad(), modlab.record_routing(model) as recording:
        before = model(**inputs, use_cache=True)
        after = model(**inputs | {"input_ids": other}, use_cache=True)
    first, second = recording.steps
    for layer in model.mod.layers:
        assert torch.equal(first.keep[layer][1:], second.keep[layer][1:])
    assert_real_equal(after.logits[1:], before.logits[1:], batch.mask[1:])


@cases(60)
@given(batches(sides=("left", "right", "inside"), min_rows=2, models=FULL))
def test_a_padded_row_is_routed_as_it_would_be_alone(batch) -> None:
    model = batch.model
    with (
        threshold_at_a_gap(model, **batch.inputs()),
        torch.no_grad(),
        modlab.record_routing(model) as recording,
    ):
        together = model(**batch.inputs(), use_cache=True)
        real = batch.mask.bool()
        for row in range(batch.rows):
            alone = model(batch.ids[row][real[row]][None], use_cache=True)
            torch.testing.assert_close(alone.logits[0], together.logits[row][real[row]], rtol=1e-4, atol=2e-5)
    batched, *singles = recording.steps
    for row, single in enumerate(singles):
        for layer in model.mod.layers:
            assert torch.equal(batched.keep[layer][row][real[row]], single.keep[layer][0])
            assert not batched.keep[layer][row][~real[row]].any()


@cases(50)
@given(batches(sides=("documents",)))
def test_a_document_is_routed_as_it_would_be_alone(batch) -> None:
    model = batch.model
    with (
        threshold_at_a_gap(model, **batch.inputs()),
        torch.no_grad(),
        modlab.record_routing(model) as recording,
    ):
        together = model(**batch.inputs(), use_cache=False)
        for row, starts in enumerate(batch.starts):
            for start, stop in zip(starts, (*starts[1:], batch.length), strict=True):
                alone = model(batch.ids[row : row + 1, start:stop], use_cache=False)
                part = together.logits[row, start:stop]
                torch.testing.assert_close(part, alone.logits[0], rtol=1e-4, atol=2e-5)
                for layer, keep in recording.steps[-1].keep.items():
                    assert torch.equal(recording.steps[0].keep[layer][row, start:stop], keep[0])


def test_the_models_here_do_skip_and_do_keep() -> None:
    """Guards the tests above: with gates all on one side they would show little."""
    ids = torch.randint(0, VOCAB, (3, LONGEST), generator=torch.Generator().manual_seed(0))
    for which in ROUTED:
        model = build(which)
        with (
            threshold_at_a_gap(model, input_ids=ids),
            torch.no_grad(),
            modlab.record_routing(model) as recording,
        ):
            model(ids, use_cache=False)
        for keep in recording.steps[0].keep.values():
            assert 0 < int(keep[:, 1:].sum()) < keep[:, 1:].numel()
    with pytest.raises(AssertionError):  # and the comparison does notice a difference
        assert_real_equal(torch.zeros(1, 2, 3), torch.ones(1, 2, 3), torch.ones(1, 2))
