"""The ragged cache stores kept tokens and nothing else, and behaves as a cache of transformers."""

import copy

import pytest
import torch
from transformers import DynamicCache

import modlab
from modlab.cache.layer import NO_KEY, RaggedLayer
from modlab.errors import ModlabError
from tests.helpers.models import spread_gates
from tests.helpers.routing import IDS, MASK, expected_kept, random_routing

INDEX_BYTES = 4  # one int32 column a stored token


def token_bytes(model) -> int:
    """K and V of one token in one layer."""
    config = model.config
    return 2 * config.num_key_value_heads * config.head_dim * model.dtype.itemsize


@pytest.fixture
def routed(tiny_llama):
    with torch.no_grad(), modlab.routing_override(tiny_llama, random_routing()):
        yield tiny_llama


def run(model, ids, mask=None, cache=None):
    return model(ids, attention_mask=mask, past_key_values=cache, use_cache=True)


def test_stored_bytes_equal_kept_tokens_after_prefill(routed) -> None:
    cache = run(routed, IDS, MASK).past_key_values
    assert isinstance(cache, modlab.RaggedCache)
    kept = expected_kept(routed, MASK)
    assert torch.equal(cache.kept_tokens, kept)
    ragged = kept[routed.mod.layers].sum().item()
    assert cache.nbytes == kept.sum().item() * token_bytes(routed) + ragged * INDEX_BYTES
    assert cache.dense_nbytes == IDS.numel() * 6 * token_bytes(routed)


def test_decode_appends_only_kept_tokens_and_slack_is_bounded(routed) -> None:
    cache = run(routed, IDS[:, :24], MASK[:, :24]).past_key_values
    for t in range(24, 40):
        run(routed, IDS[:, t : t + 1], MASK[:, : t + 1], cache)
    kept = expected_kept(routed, MASK)
    assert torch.equal(cache.kept_tokens, kept)
    assert cache.get_seq_length() == 40
    for index in routed.mod.layers:
        layer = cache.layers[index]
        stored = sum(layer.lengths)
        slack = sum(RaggedLayer.slack(n) for n in layer.lengths)
        assert stored <= layer.keys.shape[1] <= stored + slack
        assert layer.keys.untyped_storage().nbytes() == layer.keys.shape[1] * token_bytes(routed) // 2


def test_freed_memory_is_never_read(routed) -> None:
    """New buffers are NaN (see `helpers/poison.py`): one stray read would show in the logits."""
    expected = routed(IDS, attention_mask=MASK).logits
    cache, logits = None, []
    for start, end in ((0, 17), (17, 30), *((t, t + 1) for t in range(30, 40))):
        out = run(routed, IDS[:, start:end], MASK[:, :end], cache)
        cache = out.past_key_values
        logits.append(out.logits)
    torch.testing.assert_close(torch.cat(logits, 1)[MASK.bool()], expected[MASK.bool()])


@pytest.mark.parametrize("operation", ["reorder", "repeat", "select", "crop", "deepcopy"])
def test_row_operations_agree_with_recomputing(routed, operation) -> None:
    ids, mask = IDS, MASK
    cache = run(routed, ids[:, :30], mask[:, :30]).past_key_values
    for t in range(30, 34):  # growth slack in the buffers, as in real use
        run(routed, ids[:, t : t + 1], mask[:, : t + 1], cache)
    length = 34
    if operation == "reorder":
        order = torch.tensor([2, 0, 0])
        cache.reorder_cache(order)
        ids, mask = ids[order], mask[order]
    elif operation == "repeat":
        cache.batch_repeat_interleave(2)
        ids, mask = ids.repeat_interleave(2, 0), mask.repeat_interleave(2, 0)
    elif operation == "select":
        cache.batch_select_indices(torch.tensor([2, 1]))
        ids, mask = ids[[2, 1]], mask[[2, 1]]
    elif operation == "crop":
        cache.crop(-10)
        length = 24
    else:
        twin = copy.deepcopy(cache)
        run(
            routed, ids[:, 34:36].flip(1), mask[:, :36], cache
        )  # what happens to one does not happen to the other
        cache = twin
    assert cache.get_seq_length() == length
    got = run(routed, ids[:, length:], mask, cache).logits
    torch.testing.assert_close(got, routed(ids, attention_mask=mask).logits[:, length:])
    assert torch.equal(cache.kept_tokens, expected_kept(routed, mask))


def test_reset_frees_everything(routed) -> None:
    cache = run(routed, IDS).past_key_values
    cache.reset()
    assert cache.nbytes == 0 and cache.get_seq_length() == 0
    again = run(routed, IDS, cache=cache).logits
    torch.testing.assert_close(again, routed(IDS).logits)


def test_first_layer_routed_and_nothing_kept(make_llama) -> None:
    """Layer 0 counts seen tokens though it stores none: the next forward's positions are right."""
    model = modlab.convert(make_llama(), modlab.MoDConfig(skip="layer", layers=[0]))
    with (
        torch.no_grad(),
        modlab.routing_override(model, lambda i, g, p: torch.zeros_like(g, dtype=torch.bool)),
    ):
        cache = run(model, IDS[:, :30]).past_key_values
        assert cache.get_seq_length() == 30 and cache.kept_tokens[0].tolist() == [0, 0, 0]
        assert cache.dense_nbytes == 3 * 30 * 6 * token_bytes(model)
        got = run(model, IDS[:, 30:], cache=cache).logits
        torch.testing.assert_close(got, model(IDS).logits[:, 30:])


def test_sliding_window_layers_forget_what_they_cannot_see() -> None:
    from transformers import MistralConfig, MistralForCausalLM

    from modlab.families.tiny_models import tiny_config

    config = tiny_config(MistralConfig)
    config.sliding_window = 12
    torch.manual_seed(0)
    model = modlab.convert(MistralForCausalLM(config).eval(), modlab.MoDConfig(skip="layer", layers="all"))
    ids = torch.randint(3, config.vocab_size, (2, 120), generator=torch.Generator().manual_seed(2))
    with torch.no_grad(), modlab.routing_override(model, random_routing(0.6)):
        expected = model(ids, use_cache=False).logits
        cache, logits = None, []
        for start, end in ((0, 50), (50, 53), *((t, t + 1) for t in range(53, 120))):
            out = run(model, ids[:, start:end], cache=cache)
            cache = out.past_key_values
            logits.append(out.logits)
        torch.testing.assert_close(torch.cat(logits, 1), expected)
        assert cache.kept_tokens.max() <= 11 + RaggedLayer.slack(11)
        assert cache.dense_nbytes == len(ids) * 11 * config.num_hidden_layers * token_bytes(model)


def test_key_columns_mark_what_is_not_there() -> None:
    layer = RaggedLayer()
    layer.begin([3, 1], 5, torch.device("cpu"))
    layer.stage([0], torch.tensor([[0, 2, 4]]))
    layer.stage([1], torch.tensor([[3]]))
    assert layer.key_columns([0, 1]).tolist() == [[0, 2, 4], [3, NO_KEY, NO_KEY]]


def test_wrong_caches_are_refused(routed) -> None:
    with pytest.raises(ModlabError, match=r"pass modlab.RaggedCache\(model\)"):
        run(routed, IDS, cache=DynamicCache(config=routed.config))
    cache = run(routed, IDS).past_key_values
    with pytest.raises(ModlabError, match=r"holds 3 row\(s\), the input has 2"):
        run(routed, IDS[:2, :1], cache=cache)
    with pytest.raises(ModlabError, match="40 are cached and 1 are new"):
        run(routed, IDS[:, :1], MASK, cache)


@pytest.mark.parametrize(
    "changes",
    [{"skip": "kv"}, {"skip": "attention"}, {"skip": "mlp"}, {"layers": [1, 2]}],
    ids=str,
)
def test_a_cache_of_another_conversion_is_refused(make_llama, changes) -> None:
    """It stores other tokens in other layers; some pairs would even fit."""
    layers = {"skip": "layer", "layers": [1, 3]}
    one = modlab.convert(make_llama(), modlab.MoDConfig(**layers))
    other = modlab.convert(make_llama(), modlab.MoDConfig(**{**layers, **changes}))
    cache = run(other, IDS[:, :9]).past_key_values
    with pytest.raises(ModlabError, match="made for another conversion"):
        run(one, IDS[:, 9:12], cache=cache)
    again = modlab.convert(make_llama(), modlab.MoDConfig(**layers, p=0.7))
    assert run(again, IDS[:, 9:12], cache=run(one, IDS[:, :9]).past_key_values).logits.isfinite().all()


@torch.no_grad()
@pytest.mark.parametrize(("skip", "gates"), [("kv", "layer"), ("kv", "kv_head"), ("layer", "layer")])
def test_a_cache_with_dropped_tokens_is_not_read_by_the_reverted_model(make_llama, skip, gates) -> None:
    model = modlab.convert(make_llama(), modlab.MoDConfig(skip=skip, gates=gates, keep_recent=4))
    whole = run(model, IDS[:1]).past_key_values  # every gate is open
    spread_gates(model)
    dropped = run(model, IDS[:1]).past_key_values
    dense = modlab.revert(model)
    expected = dense(torch.cat([IDS[:1], IDS[:1, :1]], dim=1)).logits[:, -1]
    torch.testing.assert_close(
        run(dense, IDS[:1, :1], cache=whole).logits[:, -1], expected, rtol=1e-4, atol=1e-4
    )
    with pytest.raises(ModlabError, match="begin with a new cache"):
        run(dense, IDS[:1, :1], cache=dropped)
