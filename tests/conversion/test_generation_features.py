"""What else `generate` of transformers offers, held against the masked reference without a cache.

Two models: a random one whose tokens are kept at random, and the demo model with the routes it has learnt.
"""

from __future__ import annotations

import contextlib
import copy
import threading

import pytest
import torch
from transformers import (
    DynamicCache,
    LogitsProcessor,
    LogitsProcessorList,
    StaticCache,
    StoppingCriteria,
    StoppingCriteriaList,
    TextIteratorStreamer,
)

import modlab
from modlab.errors import ModlabError
from modlab.hf.names import cache_argument
from modlab.routing.state import masked_execution
from tests.helpers.routing import random_routing

PROMPT = "def read(path):\n    with open(path) as file:\n        return file.read()\n\n\ndef write(path"
OTHER = "import os\n\nfor name in os"
NEW = {"max_new_tokens": 12, "min_new_tokens": 12, "pad_token_id": 0, "do_sample": False}


@pytest.fixture(scope="module")
def demo():
    return modlab.load("demo")


@pytest.fixture(params=["random", "demo"])
def routed(request, demo, tiny_llama):
    """(converted model that skips tokens, prompt ids [1, T])."""
    model, tokenizer = demo
    if request.param == "demo":
        yield model, tokenizer(PROMPT, return_tensors="pt").input_ids
    else:
        ids = torch.randint(3, 512, (1, 40), generator=torch.Generator().manual_seed(4))
        with modlab.routing_override(tiny_llama, random_routing()):
            yield tiny_llama, ids


def reference(model, ids, **how) -> torch.Tensor:
    """The same generation, every token computed again at each step by the masked reference."""
    with masked_execution(model):
        return generate(model, ids, use_cache=False, **how)


def generate(model, ids, **how):
    torch.manual_seed(0)  # sampling draws the same numbers
    return model.generate(ids, **{**NEW, **how})


class NeverTwice(LogitsProcessor):
    """A processor of the user's own: no token that is already there."""

    def __call__(self, input_ids, scores):
        return scores.scatter(1, input_ids, -torch.inf)


class AfterFive(StoppingCriteria):
    def __init__(self, prompt: int) -> None:
        self.length = prompt + 5

    def __call__(self, input_ids, scores, **kwargs):
        return torch.full((len(input_ids),), input_ids.shape[1] >= self.length)


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"do_sample": True, "temperature": 0.8, "top_k": 20},
        {"do_sample": True, "num_return_sequences": 3},
        {"num_beams": 3, "num_return_sequences": 3},
        {"num_beams": 3, "do_sample": True, "length_penalty": 0.5},
        {"repetition_penalty": 1.5, "no_repeat_ngram_size": 2},
        {"bad_words_ids": [[5], [7, 8]], "sequence_bias": [[[11], 3.0]]},
        {"prefix_allowed_tokens_fn": lambda row, ids: list(range(20, 60))},
        {"logits_processor": LogitsProcessorList([NeverTwice()])},
        {"guidance_scale": 1.5},
    ],
    ids=[
        *("greedy", "sampling", "several samples", "beams", "sampled beams", "repetition", "biases"),
        *("constrained", "own processor", "classifier-free guidance"),
    ],
)
def test_equals_the_masked_reference(routed, how) -> None:
    model, ids = routed
    assert torch.equal(generate(model, ids, **how), reference(model, ids, **how))


def test_padded_batch_of_the_demo_equals_each_row_alone(demo) -> None:
    model, tokenizer = demo
    texts = [PROMPT, OTHER]
    tokenizer.padding_side = "left"
    batch = tokenizer(texts, return_tensors="pt", padding=True)
    together = generate(model, batch.input_ids, attention_mask=batch.attention_mask)
    for row, text in enumerate(texts):
        alone = reference(model, tokenizer(text, return_tensors="pt").input_ids)
        assert torch.equal(together[row, -12:], alone[0, -12:])


def test_stopping_criteria(routed) -> None:
    model, ids = routed
    how = {"stopping_criteria": StoppingCriteriaList([AfterFive(ids.shape[1])])}
    out = generate(model, ids, **how)
    assert out.shape[1] == ids.shape[1] + 5
    assert torch.equal(out, reference(model, ids)[:, : out.shape[1]])


def test_stop_string(demo) -> None:
    model, tokenizer = demo
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    text = tokenizer.decode(reference(model, ids)[0, ids.shape[1] :])
    stop = text.strip()[3:6]
    out = generate(model, ids, stop_strings=[stop], tokenizer=tokenizer, min_new_tokens=0)
    stopped = tokenizer.decode(out[0, ids.shape[1] :])
    assert stop in stopped and text.startswith(stopped) and len(stopped) < len(text)


def test_streamer_yields_the_text_as_it_comes(demo) -> None:
    model, tokenizer = demo
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=60)
    thread = threading.Thread(target=generate, args=(model, ids), kwargs={"streamer": streamer})
    thread.start()
    pieces = list(streamer)
    thread.join()
    assert "".join(pieces) == tokenizer.decode(reference(model, ids)[0, ids.shape[1] :])


def test_prompt_lookup(routed) -> None:
    model, ids = routed
    ids = ids[:, :9].repeat(1, 4)  # so that there is something to look up
    assert torch.equal(generate(model, ids, prompt_lookup_num_tokens=3), reference(model, ids))


def test_assisted_decoding_with_the_demo_and_its_dense_twin(demo) -> None:
    model, tokenizer = demo
    dense, _ = modlab.load("demo-dense")
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    assert torch.equal(generate(model, ids, assistant_model=dense), reference(model, ids))
    assert torch.equal(generate(dense, ids, assistant_model=model), generate(dense, ids))


def test_early_exit_drafts(routed) -> None:
    """A draft of the first layers; `config.num_hidden_layers` is lower for a while, the routes are not."""
    model, ids = routed
    assert torch.equal(generate(model, ids, assistant_early_exit=3), reference(model, ids))


def test_a_prefix_is_computed_once_and_used_twice(routed) -> None:
    model, ids = routed
    prefix, first, second = ids[:, :20], ids, torch.cat([ids[:, :20], ids[:, 5:12]], 1)
    cache = modlab.RaggedCache(model)
    name = cache_argument(model)
    with torch.no_grad():
        model(prefix, **{name: cache}, use_cache=True)
    kept = cache.kept_tokens
    for whole in (first, second):
        out = generate(model, whole, **{name: copy.deepcopy(cache)})
        assert torch.equal(out, reference(model, whole))
    assert torch.equal(cache.kept_tokens, kept)

    generate(model, first, **{name: cache})  # without a copy: crop it back
    cache.crop(20 - cache.get_seq_length())
    assert torch.equal(cache.kept_tokens, kept)
    assert torch.equal(generate(model, second, **{name: cache}), reference(model, second))


def test_a_chat_goes_on_with_the_cache_of_the_turn_before(routed) -> None:
    model, ids = routed
    name = cache_argument(model)
    cache, turn = modlab.RaggedCache(model), ids
    for question in (ids[:, 3:9], ids[:, 11:15], ids[:, 2:4]):
        answer = generate(model, turn, **{name: cache})
        assert torch.equal(answer, reference(model, turn))
        turn = torch.cat([answer, question], 1)


def contrastive(model, input_ids, logits_processor, stopping_criteria, generation_config, **kwargs):
    """Contrastive search (arXiv 2202.06417) as a decoding loop of the user's own: of the k likeliest tokens
    the one least like what was said. Rows of the cache are repeated, then all but one are dropped."""
    k, alpha = generation_config.top_k, 0.6
    cached = kwargs.get("use_cache", True)
    name = cache_argument(model)
    cache = modlab.RaggedCache(model) if cached else None

    def states(ids):
        how = {name: cache} if cached else {}
        out = model(ids, output_hidden_states=True, use_cache=cached, **how)
        return out.logits[:, -1], out.hidden_states[-1]

    logits, past = states(input_ids)
    while not stopping_criteria(input_ids, None).all():
        p, tokens = logits.softmax(-1).topk(k)
        tried = torch.cat([input_ids.expand(k, -1), tokens.T], 1)
        if cached:
            cache.batch_repeat_interleave(k)
            logits, hidden = states(tokens.T)
        else:
            logits, hidden = states(tried)
        alike = torch.cosine_similarity(past.expand(k, -1, -1), hidden[:, -1:], dim=-1).amax(1)
        best = ((1 - alpha) * p[0] - alpha * alike).argmax()[None]
        if cached:
            cache.batch_select_indices(best)
        past = torch.cat([past, hidden[best, -1:]], 1)
        input_ids, logits = tried[best], logits[best]
    return input_ids


def test_a_decoding_loop_of_the_users_own(routed) -> None:
    model, ids = routed
    how = {"custom_generate": contrastive, "top_k": 4, "min_new_tokens": None}
    with torch.no_grad():
        out = generate(model, ids, **how)
        with masked_execution(model):
            expected = generate(model, ids, use_cache=False, **how)
    assert out.shape[1] == ids.shape[1] + 12 and torch.equal(out, expected)


@pytest.mark.parametrize(
    "how",
    [
        {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.5},
        {"penalty_alpha": 0.6, "top_k": 4},
        {"dola_layers": "high"},
        {"num_beams": 2, "force_words_ids": [[5, 6]]},
    ],
    ids=["group beam", "contrastive", "dola", "constrained beam"],
)
def test_modes_that_transformers_moved_to_the_hub_are_refused_by_transformers(tiny_llama, how) -> None:
    """No dense model has them either; a hub repository's own code needs `trust_remote_code`."""
    with pytest.raises(ValueError, match="trust_remote_code"):
        generate(tiny_llama, torch.tensor([[5, 6, 7]]), **how)


@pytest.mark.parametrize("kind", ["static", "offloaded_static", "offloaded", "quantized"])
def test_cache_implementations_that_cannot_skip_are_refused(tiny_llama, kind) -> None:
    with pytest.raises(ModlabError, match=f"'{kind}'.*ragged cache"):
        generate(tiny_llama, torch.tensor([[5, 6, 7]]), cache_implementation=kind)


def test_the_dynamic_cache_by_name_is_the_ragged_one(routed) -> None:
    model, ids = routed
    out = generate(model, ids, cache_implementation="dynamic", return_dict_in_generate=True)
    assert torch.equal(out.sequences, reference(model, ids))


@pytest.mark.parametrize("kind", [DynamicCache, StaticCache])
def test_caches_of_transformers_are_refused(tiny_llama, kind) -> None:
    more = {"max_cache_len": 32} if kind is StaticCache else {}
    cache = kind(config=tiny_llama.config, **more)
    with pytest.raises(ModlabError, match=f"{kind.__name__}.*RaggedCache"):
        generate(tiny_llama, torch.tensor([[5, 6, 7]]), **{cache_argument(tiny_llama): cache})


def test_continuous_batching_is_refused_before_it_starts(tiny_llama) -> None:
    with pytest.raises(ModlabError, match="continuous batching"):
        tiny_llama.generate_batch([[5, 6, 7]])


def test_eager_attention_generates_the_same(routed) -> None:
    model, ids = routed
    expected = reference(model, ids)
    with contextlib.ExitStack() as stack:
        stack.callback(model.set_attn_implementation, model.config._attn_implementation)
        model.set_attn_implementation("eager")
        assert torch.equal(generate(model, ids), expected)


def test_flex_attention_is_refused(tiny_llama) -> None:
    tiny_llama.set_attn_implementation("flex_attention")
    with pytest.raises(ModlabError, match="set_attn_implementation\\('sdpa'\\)"):
        tiny_llama(torch.tensor([[5, 6, 7]]))


def test_flash_attention_on_a_cpu_is_refused_by_transformers(tiny_llama) -> None:
    with pytest.raises((ImportError, ValueError), match="(?i)flash"):
        tiny_llama.set_attn_implementation("flash_attention_2")


@pytest.mark.long
def test_compiled_model_computes_the_same_and_leaves_routed_layers_alone(make_llama) -> None:
    model = modlab.convert(make_llama(num_hidden_layers=2))
    ids = torch.randint(3, 512, (2, 21), generator=torch.Generator().manual_seed(1))
    few = {"max_new_tokens": 4, "min_new_tokens": 4}
    torch._dynamo.reset()
    with torch.no_grad(), modlab.routing_override(model, random_routing()):
        plain, tokens = model(ids, use_cache=False).logits, generate(model, ids, **few)
        model.compile()
        torch.testing.assert_close(model(ids, use_cache=False).logits, plain, atol=1e-5, rtol=1e-4)
        assert torch.equal(generate(model, ids, **few), tokens)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
