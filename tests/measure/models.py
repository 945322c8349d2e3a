"""The models that the tests of this folder measure: tiny, with gates that differ from token to token."""

import torch
from transformers import LlamaForCausalLM

from tests.helpers.models import tiny_config

VOCAB = 96


def dense_model(seed=0):
    torch.manual_seed(seed)
    config = tiny_config(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=64, max_position_embeddings=256, pad_token_id=None
    )
    return LlamaForCausalLM(config).eval()


def spread_gates(model, seed=1, scale=1.0):
    """Random routers: gates of a trained model differ from token to token, those of a fresh one do not."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "router" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    return model


class Letters:
    """A tokenizer of a letter a token."""

    def __call__(self, text, **settings):
        return {"input_ids": [ord(c) % VOCAB for c in text]}
