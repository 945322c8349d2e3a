"""`model.generate` works as users know it, with the ragged cache, without being asked."""

import pytest
import torch
from transformers import TextStreamer

import modlab
from modlab.errors import ModlabError
from modlab.hf.names import cache_argument
from tests.helpers.routing import IDS, MASK, expected_kept, random_routing

GREEDY = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"num_beams": 3, "num_return_sequences": 2},
        {"do_sample": True, "top_p": 0.9},
        {"prefill_chunk_size": 7},
        {"num_return_sequences": 2, "do_sample": True},
    ],
    ids=["greedy", "beams", "sampling", "chunked prefill", "several"],
)
def test_matches_the_dense_model_while_every_gate_is_open(make_llama, how) -> None:
    dense, model = make_llama(), modlab.convert(make_llama())
    outputs = []
    for each in (dense, model):
        torch.manual_seed(0)
        outputs.append(each.generate(IDS, attention_mask=MASK, **{**GREEDY, **how}))
    assert torch.equal(*outputs)


@pytest.mark.parametrize(
    "how", [{}, {"num_beams": 3}, {"prefill_chunk_size": 7}], ids=["greedy", "beams", "chunks"]
)
def test_routed_generation_equals_recomputing_without_a_cache(tiny_llama, how) -> None:
    with modlab.routing_override(tiny_llama, random_routing()):
        cached = tiny_llama.generate(IDS, attention_mask=MASK, **GREEDY, **how)
        how.pop("prefill_chunk_size", None)
        recomputed = tiny_llama.generate(IDS, attention_mask=MASK, use_cache=False, **GREEDY, **how)
    assert torch.equal(cached, recomputed)


def test_each_row_of_a_padded_batch_generates_what_it_would_alone(tiny_llama) -> None:
    with modlab.routing_override(tiny_llama, random_routing()):
        together = tiny_llama.generate(IDS, attention_mask=MASK, **GREEDY)
        for row in range(3):
            alone = tiny_llama.generate(IDS[row : row + 1, MASK[row].bool()], **GREEDY)
            assert torch.equal(together[row, 40:], alone[0, -12:])


def test_cache_is_ragged_and_carries_over_to_the_next_turn(tiny_llama) -> None:
    with modlab.routing_override(tiny_llama, random_routing()):
        out = tiny_llama.generate(IDS[:1], return_dict_in_generate=True, **GREEDY)
        cache = out.past_key_values
        assert isinstance(cache, modlab.RaggedCache)
        seen = torch.ones(1, cache.get_seq_length(), dtype=torch.long)
        assert torch.equal(cache.kept_tokens, expected_kept(tiny_llama, seen))
        turn = torch.cat([out.sequences, IDS[1:2, :6]], 1)
        carried = tiny_llama.generate(turn, **{cache_argument(tiny_llama): cache}, **GREEDY)
        fresh = tiny_llama.generate(turn, **GREEDY)
    assert torch.equal(carried, fresh)


def test_own_cache_can_be_passed(tiny_llama) -> None:
    cache = modlab.RaggedCache(tiny_llama)
    tiny_llama.generate(IDS, **{cache_argument(tiny_llama): cache}, **GREEDY)
    assert cache.get_seq_length() == 40 + 12 - 1


def test_assisted_decoding_with_the_converted_model_as_target_and_as_draft(make_llama) -> None:
    dense, model = make_llama(), modlab.convert(make_llama())
    with modlab.routing_override(model, random_routing()):
        plain = model.generate(IDS[:1], **GREEDY)
        as_target = model.generate(IDS[:1], assistant_model=dense, **GREEDY)
        as_draft = dense.generate(IDS[:1], assistant_model=model, **GREEDY)
    assert torch.equal(as_target, plain)
    assert torch.equal(as_draft, dense.generate(IDS[:1], **GREEDY))


def test_streamer(tiny_llama) -> None:
    class Tokens(TextStreamer):
        def __init__(self) -> None:
            self.tokens: list[int] = []

        def put(self, value) -> None:
            self.tokens += value.flatten().tolist()

        def end(self) -> None:
            self.tokens.append(-1)

    streamer = Tokens()
    out = tiny_llama.generate(IDS[:1], streamer=streamer, **GREEDY)
    assert streamer.tokens == [*out[0].tolist(), -1]


def test_prompt_longer_than_the_context(make_llama) -> None:
    model = modlab.convert(make_llama(max_position_embeddings=16))
    with pytest.raises(ModlabError, match="40 tokens, the model's context is 16"):
        model.generate(IDS, **GREEDY)
