"""Divergence from the dense self: by hand, by the cache as by the masked path, in bytes and by position."""

from __future__ import annotations

import math

import pytest
import torch

import modlab
from modlab.errors import ModlabError
from modlab.measure import divergence
from modlab.measure.divergence import named_texts
from modlab.routing.state import masked_execution
from tests.helpers.models import dense_llama, routed_llama, scatter_gates

STREAM = torch.randint(3, 512, (1, 2000), generator=torch.Generator().manual_seed(0))
SMALL = {"seq_len": 60, "rows": 3, "far": 20, "progress": False}


def by_heads() -> torch.nn.Module:
    """Routed by KV head, with a hidden layer in each router, as routers that ship are."""
    config = modlab.MoDConfig(layers="all", gates="kv_head", router_hidden=4, keep_recent=4)
    model = scatter_gates(modlab.convert(dense_llama(), config), scale=1.0)
    for name, weight in model.named_parameters():
        if name.endswith("mod_router.out"):
            torch.nn.init.normal_(weight, generator=torch.Generator().manual_seed(1))
    return model


MODELS = {
    "kv": lambda: routed_llama(skip="kv"),
    "kv by head": by_heads,
    "layer": lambda: routed_llama(skip="layer"),
}


@pytest.mark.parametrize("kind", MODELS)
def test_pieces_through_the_cache_equal_the_masked_path(kind) -> None:
    """Hard eviction is the same whether dropped keys are gone from a cache or hidden by a mask."""
    model = MODELS[kind]()
    found = divergence(model, STREAM, piece=7, **SMALL).iloc[0]
    whole = divergence(model, STREAM, piece=60, batch_size=2, **SMALL).iloc[0]
    assert found.kl_far == pytest.approx(whole.kl_far, rel=1e-4)
    assert found.keep_ratio == pytest.approx(whole.keep_ratio)

    starts = torch.randperm(33, generator=torch.Generator().manual_seed(0))[:3] * 60
    rows = STREAM[0][starts[:, None] + torch.arange(60)]
    with torch.no_grad():
        dense = dense_llama()(rows).logits.double().log_softmax(-1)
        with masked_execution(model):
            routed = model(rows, use_cache=False).logits.double().log_softmax(-1)
    kl = (dense.exp() * (dense - routed)).sum(-1)
    assert float(kl[:, 20:].mean()) > 1e-6, "something was dropped"
    assert found.kl_far == pytest.approx(float(kl[:, 20:].mean()), rel=1e-3)
    assert found.kl_near == pytest.approx(float(kl[:, :20].mean()), rel=1e-3)
    assert found.kl_far_stderr == pytest.approx(float(kl[:, 20:].mean(1).std() / 3**0.5), rel=1e-3)
    same = (dense.argmax(-1) == routed.argmax(-1)).double()
    assert found.top1_far == pytest.approx(float(same[:, 20:].mean()))
    for side, name in ((dense, "dense_loss"), (routed, "loss")):
        told = -side[:, :-1].gather(-1, rows[:, 1:, None]).mean()
        assert found[name] == pytest.approx(float(told), rel=1e-5)


def test_bytes_are_those_that_the_products_cache_allocates() -> None:
    model = by_heads()
    table = divergence(model, {"one": STREAM, "two": STREAM.flip(1)}, piece=60, **SMALL)
    assert table.text.to_list() == ["one", "two"] and (table.tokens == 180).all()
    assert (table.kv_saving == table.dense_kv_bytes / table.kv_bytes).all()
    rows = STREAM[0][(torch.randperm(33, generator=torch.Generator().manual_seed(0))[:3] * 60)[:, None]
                     + torch.arange(60)]  # fmt: skip
    with torch.no_grad(), modlab.KVTracker(model) as kv:
        for row in rows:
            model(row[None], use_cache=True)
    assert table.kv_bytes[0] == sum(row["kv_bytes"] for row in kv.rows)
    assert table.dense_kv_bytes[0] == sum(row["dense_kv_bytes"] for row in kv.rows)


def test_a_model_that_keeps_everything_is_its_dense_self() -> None:
    model = routed_llama(skip="kv")
    modlab.set_threshold(model, 1e-6)
    found = divergence(model, STREAM, piece=16, **SMALL).iloc[0]
    assert abs(found.kl_far) < 1e-6 and found.top1_far == 1 and found.keep_ratio == 1
    assert found.loss == pytest.approx(found.dense_loss, rel=1e-5)


def test_the_profile_by_position_averages_to_the_whole() -> None:
    table = divergence(routed_llama(skip="kv"), {"a": STREAM}, seq_len=256, rows=2, far=128, progress=False)
    profile = table.attrs["by_position"]
    assert profile.text.to_list() == ["a", "a"] and profile.position.to_list() == [0, 128]
    assert profile.kl.to_list() == pytest.approx([table.kl_near[0], table.kl_far[0]])
    assert profile.top1.to_list() == pytest.approx([table.top1_near[0], table.top1_far[0]])


def test_what_there_are_no_positions_for_is_not_a_number() -> None:
    found = divergence(routed_llama(skip="kv"), STREAM, seq_len=40, rows=1, progress=False).iloc[0]
    assert math.isnan(found.kl_far) and math.isnan(found.top1_far) and found.kl_near > 0


def test_wrong_values_are_refused() -> None:
    with pytest.raises(ModlabError, match="is dense"):
        divergence(dense_llama(), STREAM, **SMALL)
    with pytest.raises(ModlabError, match="context is 2048"):
        divergence(routed_llama(), STREAM, **SMALL | {"seq_len": 4096})
    with pytest.raises(ModlabError, match="piece"):
        divergence(routed_llama(), STREAM, piece=0, **SMALL)
    with pytest.raises(ModlabError, match="no texts given"):
        divergence(routed_llama(), {}, **SMALL)
    assert set(named_texts({"input_ids": STREAM})) == {"text"}
    assert set(named_texts({"a": "x", "text": "y"})) == {"a", "text"}
