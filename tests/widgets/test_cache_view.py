"""CacheView without a browser: what it shows is what the cache of `generate` does."""

from typing import Any

import numpy as np
import pytest
import torch

import modlab
from modlab.errors import ModlabError
from modlab.hf.names import given_cache
from modlab.widgets import CacheView, cache_view
from tests.helpers.models import dense_llama, routed_llama, scatter_gates

TEXT = "the router decides which token runs and which token skips, and so on to the end of the line. " * 2


@pytest.fixture(params=["layer", "kv_head"])
def model(request: pytest.FixtureRequest) -> Any:
    """A tiny Llama whose cache is routed, with a gate a layer or a KV head."""
    if request.param == "layer":
        return routed_llama(skip="kv")
    config = modlab.MoDConfig(skip="kv", layers="alternate", keep_recent=4, gates="kv_head")
    return scatter_gates(modlab.convert(dense_llama(), config))


def reference(model: Any, tokenizer: Any, count: int) -> Any:
    ids = torch.tensor([tokenizer(TEXT)["input_ids"]])
    return model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=count,
        do_sample=False,
        return_dict_in_generate=True,
    )


def test_it_shows_what_generate_kept(
    model: Any, word_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache_view, "TELL_EVERY", 0.0)
    view = CacheView(model, word_tokenizer, TEXT, max_new_tokens=12)
    assert len(view.heads) == len(view.layers) and view.written == {}
    told: list[dict[str, Any]] = []
    view.observe(lambda change: told.append(change.new), "written")
    output = reference(model, word_tokenizer, 12)
    ids, cache = output.sequences[0], given_cache(output)
    assert view.generate() == word_tokenizer.decode(ids[len(word_tokenizer(TEXT)["input_ids"]) :])
    told = [row for row in told if row]
    seen = len(ids) - 1  # the last token was not read
    assert view.written["done"] and view.written["tokens"][-1] == seen == len(view.tokens)
    assert view.trace.token_ids.tolist() == ids[:seen].tolist()
    assert view.written["kv_bytes"][-1] == cache.nbytes == view.summary["kv_bytes"]
    assert view.written["dense_bytes"][-1] == cache.dense_nbytes
    assert view.written["tokens_per_s"] > 0 and view.written["first_s"] > 0
    # Decisions are the model's own, whichever way a token came.
    whole = modlab.trace(model, word_tokenizer, ids[:seen].tolist())
    assert np.array_equal(view.trace.keep, whole.keep) and view.trace.layers == whole.layers
    assert [row["layer"] for row in view.heads] == whole.layers
    # On the way: one token more each time, bytes of that moment, not done.
    assert [row["tokens"][-1] for row in told[:12]] == list(range(seen - 11, seen + 1))
    assert not any(row["done"] for row in told[:12]) and told[0]["kv_bytes"][-1] < cache.dense_nbytes


def test_another_threshold_begins_with_the_text_again(model: Any, word_tokenizer: Any) -> None:
    view = CacheView(model, word_tokenizer, TEXT, max_new_tokens=4)
    length = len(view.tokens)
    view.generate()
    assert len(view.tokens) == length + 3
    view._handle_custom_msg({"type": "run", "p": 0.6, "id": 1}, [])
    view.wait(60)
    assert len(view.tokens) == length and view.written == {} and model.mod.thresholds[1] == 0.6
    view._handle_custom_msg({"type": "generate", "max_new_tokens": 6, "id": 2}, [])
    view.wait(60)
    assert len(view.tokens) == length + 5 and view.written["p"] == 0.6 and view.text == TEXT


def test_it_stops_and_refuses(model: Any, word_tokenizer: Any) -> None:
    view = CacheView(model, word_tokenizer, TEXT)
    hook = model.get_decoder().layers[2].register_forward_pre_hook(lambda *_: view.cancel())
    try:
        view._handle_custom_msg({"type": "generate", "max_new_tokens": 50, "id": 1}, [])
        assert view.wait(30)
    finally:
        hook.remove()
    assert view.job["state"] == "cancelled" and len(view.written.get("tokens", [])) < 50
    with pytest.raises(ModlabError, match="is dense: call modlab.convert"):
        CacheView(dense_llama(), word_tokenizer, TEXT)


def test_a_page_and_a_picture_name_the_heads(model: Any, word_tokenizer: Any) -> None:
    view = CacheView(model, word_tokenizer, TEXT)
    data, _ = view._repr_mimebundle_()
    assert view.heads[0]["name"] in data["image/svg+xml"] and 'const VIEW = "cache"' in view.to_html()


def test_an_expected_answer_is_found_or_lost(model: Any, word_tokenizer: Any) -> None:
    view = CacheView(model, word_tokenizer, TEXT, max_new_tokens=5)
    assert view.generate() and view.written["found"] is None  # nothing is expected
    words = view.written["text"]
    view = CacheView(model, word_tokenizer, TEXT, max_new_tokens=5, expect=words)
    assert view.written == {} and view.ask(0.5) and view.written["p"] == 0.5
    assert "found: wanted" in view._svg()
    view._handle_custom_msg({"type": "run", "p": 0.9, "id": 1}, [])  # a release of the slider asks, too
    assert view.wait(60) and view.written["p"] == 0.9 == model.mod.thresholds[1]
    assert view.written["found"] == (words in view.written["text"])
    lost = CacheView(model, word_tokenizer, TEXT, max_new_tokens=5, expect="no such thing")
    assert not lost.ask(0.5) and lost.written["found"] is False and "lost: wanted" in lost._svg()
    with pytest.raises(ModlabError, match="at least 0 and below 1"):
        lost.ask(1.5)
    assert model.mod.thresholds[1] == 0.5
