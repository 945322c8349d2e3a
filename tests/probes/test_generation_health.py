"""Generation health of models whose text is known beforehand, and of small ones with real routing."""

import json
import math

import pytest
import torch

import modlab
from modlab.errors import ModlabError
from modlab.probes.writing import SeededSampling
from tests.helpers.handmade import HandMade, bigram, following_llama
from tests.helpers.models import alternate_layers, scatter_gates

V = 512
AROUND = torch.arange(1, V + 1) % V  # token i + 1 after token i: nothing comes twice in V tokens
FIVES = torch.arange(V) // 5 * 5 + (torch.arange(V) + 1) % 5  # 5k ... 5k + 4, and again
FIVES[FIVES >= V] = V - 1
SMALL = {"prompts": 5, "prompt_tokens": 12, "new_tokens": 24, "progress": False}


@pytest.fixture(scope="module")
def stream():
    """Random tokens from 3 on: those before are the tiny config's special ones."""
    return torch.randint(3, V, (1, 2000), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def routed(make_llama):
    return make_routed(make_llama)


def make_routed(make_llama, **config):
    """Converted, layers 1 and 3 of 4, with gates that differ from token to token."""
    settings = {"eos_token_id": None, "num_hidden_layers": 4, **config}
    model = modlab.convert(make_llama(**settings), alternate_layers())
    scatter_gates(model)
    return model


def health(model, stream, **settings):
    return modlab.generation_health(model, stream, **SMALL | settings)


def prompt_before(continuation, stream):
    """The prompt that this piece of the stream follows."""
    (prompt,) = [p[:12] for p in stream[0].unfold(0, 36, 36) if p[12:].tolist() == continuation]
    return prompt


def test_a_model_that_goes_round_in_fives(stream):
    text = health(following_llama(FIVES, eos_token_id=None), stream).greedy
    assert (text.texts, text.tokens, text.ended) == (5, 5 * 24, 0)
    assert text.repeated_ngrams == pytest.approx(1 - 5 / 21)
    assert text.in_loops == text.ends_in_loop == 1 and text.longest_loop == 24
    assert text.distinct[4] == pytest.approx(text.distinct[2] * 23 / 21)
    for ids in text.continuations:
        assert len(set(ids)) == 5 and ids == (ids[:5] * 5)[:24]
    assert text.loss == pytest.approx(0, abs=1e-3)


def test_a_model_that_never_says_a_thing_twice(stream):
    text = health(following_llama(AROUND, eos_token_id=None), stream).greedy
    assert text.repeated_ngrams == text.in_loops == text.ends_in_loop == text.longest_loop == 0
    for ids in text.continuations:
        assert ids == [(ids[0] + i) % V for i in range(24)]


def test_prompts_go_on_where_the_text_does(stream):
    model = following_llama(AROUND, eos_token_id=None)
    found = health(model, stream)
    for real, greedy in zip(found.heldout.continuations, found.greedy.continuations, strict=True):
        last = int(prompt_before(real, stream)[-1])
        assert greedy[0] == (last + 1) % V, "the first new token follows the prompt's last one"
    assert found.heldout.tokens == 120 and found.heldout.loss > 10


def test_heldout_text_goes_through_the_same_measures():
    periodic = torch.arange(3, 10).repeat(300)[None]
    text = health(following_llama(AROUND, eos_token_id=None), periodic).heldout
    assert text.in_loops == 1 and text.longest_loop == 24
    assert text.repeated_ngrams == pytest.approx(1 - 7 / 21)
    assert text.distinct[1] == pytest.approx(7 / 120)


def test_texts_are_cut_after_their_end_token(stream):
    ends = list(range(20, V, 60))
    model = following_llama(AROUND, eos_token_id=ends, pad_token_id=0)
    text = health(model, stream).greedy
    for ids in text.continuations:
        assert not set(ids[:-1]) & set(ends)
        assert ids[-1] in ends or len(ids) == 24
    lengths = [len(ids) for ids in text.continuations]
    assert len(set(lengths)) > 1 and text.tokens == sum(lengths)
    assert text.ended == sum(ids[-1] in ends for ids in text.continuations) / 5
    assert 0 < text.ended < 1


def test_losses_are_those_of_model_and_judge(make_llama, stream):
    model, judge = make_llama(eos_token_id=None), make_llama(seed=1)
    found = health(model, stream, judge=judge)
    by_hand = []
    for real in found.heldout.continuations:
        row = torch.cat([prompt_before(real, stream), torch.tensor(real)])
        with torch.no_grad():
            logits = judge(row[None]).logits[0]
        by_hand.append(torch.nn.functional.cross_entropy(logits[11:-1], row[12:]))
    assert found.heldout.judge_loss == pytest.approx(float(torch.stack(by_hand).mean()), rel=1e-5)
    assert found.greedy.judge_loss > found.greedy.loss, "what is likeliest here is not so there"
    assert health(model, stream).greedy.judge_loss is None
    itself = health(model, stream, judge=model)
    assert itself.sampled.judge_loss == pytest.approx(itself.sampled.loss)


def test_keep_ratios_are_of_the_new_tokens(routed, stream):
    def new_ones_by_turns(layer, gate, positions):
        return (positions >= 12) & (positions % layer == 0)  # layers 1 and 3

    with modlab.routing_override(routed, new_ones_by_turns):
        text = health(routed, stream).greedy
    assert text.keep_ratio_by_layer == pytest.approx({1: 1, 3: 8 / 24})  # of 12 ... 35
    assert text.keep_ratio == pytest.approx((1 + 8 / 24) / 2)
    assert health(modlab.revert(routed), stream).greedy.keep_ratio == 1


def test_keep_ratios_are_those_of_generation_itself(routed, stream):
    """One forward over the finished text decides as the steps that wrote it."""
    both = health(routed, stream, prompts=1)
    found = both.greedy
    prompt = prompt_before(both.heldout.continuations[0], stream)[None]
    with modlab.record_routing(routed) as recording:
        made = routed.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=25, do_sample=False
        )
    assert made[0, 12:36].tolist() == found.continuations[0]
    steps = recording.steps[1:]  # after the prompt one new token each; the 25th is never read
    assert len(steps) == 24
    for layer, ratio in found.keep_ratio_by_layer.items():
        assert ratio == pytest.approx(sum(float(step.keep[layer].sum()) for step in steps) / 24)
    assert 0 < found.keep_ratio < 1


def test_samples_follow_the_softmax():
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0])
    draws = torch.zeros(4)
    sampler = SeededSampling(0.7, [5])
    for _ in range(4000):
        draws[sampler(torch.zeros(1, 1), logits[None]).argmax()] += 1
    expected = (logits / 0.7).softmax(0)
    error = ((draws / 4000 - expected) / (expected * (1 - expected) / 4000).sqrt()).abs()
    assert (error < 4).all()


@pytest.mark.parametrize("ends", [None, list(range(100, 140))])
def test_batches_change_nothing(make_llama, stream, ends):
    """Nor does padding after an end token: nearly uniform samples meet one of 40 among 512 now and then."""
    model = make_routed(make_llama, eos_token_id=ends)
    one, three = (health(model, stream, judge=model, batch_size=size) for size in (1, 3))
    for kind in ("greedy", "sampled", "heldout"):
        a, b = getattr(one, kind), getattr(three, kind)
        assert a.continuations == b.continuations
        facts_a, facts_b = a.to_dict(), b.to_dict()
        for name in ("loss", "judge_loss"):
            assert facts_b.pop(name) == pytest.approx(facts_a.pop(name), rel=1e-5)
        assert facts_a == facts_b
    if ends is not None:
        assert len({len(ids) for ids in one.sampled.continuations}) > 1


def test_seeds(routed, stream):
    one, again, other = (health(routed, stream, seed=seed).sampled.continuations for seed in (1, 1, 2))
    assert one == again and one != other
    torch.manual_seed(3)
    drawn = torch.rand(1)
    torch.manual_seed(3)
    health(routed, stream)
    assert torch.rand(1) == drawn, "the user's own random numbers are left alone"


def test_rows_differ_and_a_low_temperature_is_greedy(stream):
    uniform = following_llama(AROUND, sure=0.0, eos_token_id=None)
    text = health(uniform, stream, new_tokens=100).sampled
    assert len(set(map(tuple, text.continuations))) == 5
    assert text.loss == pytest.approx(math.log(V), rel=1e-4)
    assert 0.5 < text.distinct[1] < 0.72  # 500 draws from 512: 1 - 1/e of them differ
    model = following_llama(AROUND, sure=1.0, eos_token_id=None)
    cold = health(model, stream, temperature=1e-3)
    assert cold.sampled.continuations == cold.greedy.continuations


def test_the_models_own_generation_settings_do_not_count(stream):
    plain = health(following_llama(FIVES, eos_token_id=None), stream)
    model = following_llama(FIVES, eos_token_id=None)
    own = model.generation_config
    own.do_sample, own.repetition_penalty, own.no_repeat_ngram_size = True, 50.0, 3
    own.temperature, own.top_k, own.top_p, own.num_beams = 3.0, 2, 0.3, 2
    own.max_length, own.min_new_tokens, own.num_return_sequences = 20, 3, 2
    own.cache_implementation, own.return_dict_in_generate = "static", True
    assert health(model, stream) == plain
    assert model.generation_config is own and own.num_beams == 2


def test_fast_generation_writes_the_same(routed, stream):
    plain = health(routed, stream)
    modlab.enable_fast_generation(routed, compile=False)
    fast = health(routed, stream)
    assert modlab.fast_generation_report(routed)["last"]["fast"]
    assert fast.greedy.continuations == plain.greedy.continuations
    assert fast.sampled.continuations == plain.sampled.continuations


def test_results_as_a_dict_and_a_table(routed, stream):
    found = health(routed, stream, judge=routed)
    facts = json.loads(json.dumps(found.to_dict()))
    assert set(facts) == {"greedy", "sampled", "heldout", "settings"}
    assert facts["settings"]["new_tokens"] == 24
    assert facts["greedy"]["keep_ratio_by_layer"].keys() == {"1", "3"}
    assert "continuations" not in facts["greedy"] and "continuations" not in repr(found)
    table = found.frame()
    assert table.index.to_list() == ["greedy", "sampled", "heldout"]
    assert table.loc["sampled", "keep_ratio_3"] == found.sampled.keep_ratio_by_layer[3]
    assert table.loc["heldout", "distinct_2"] == found.heldout.distinct[2]
    assert table.loc["greedy", "judge_loss"] == found.greedy.judge_loss


def test_what_cannot_be_measured_is_refused(routed, make_llama, stream):
    with pytest.raises(ModlabError, match="exceed the context of 2,048"):
        health(routed, stream, new_tokens=2037)
    with pytest.raises(ModlabError, match="exceed the context of 30 tokens"):
        health(routed, stream, judge=HandMade(bigram(), context=30))
    with pytest.raises(ModlabError, match="judge knows 300 tokens, the model 512"):
        health(routed, stream, judge=make_llama(vocab_size=300))
    with pytest.raises(ModlabError, match="hold 2,000 tokens, which gives 55 rows of 36"):
        health(routed, stream, prompts=56)
    for wrong in ({"new_tokens": 0}, {"n": 0}, {"batch_size": 0}, {"temperature": 0.0}):
        with pytest.raises(ModlabError, match="give a (whole )?number"):
            health(routed, stream, **wrong)
