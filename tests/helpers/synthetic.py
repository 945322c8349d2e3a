"""Routing traces without a model, and a tokenizer without a download: for tests of what is drawn."""

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from modlab.traces.routing_trace import RoutingTrace


def make_trace(
    count: int = 60, depth: int = 6, p: float = 0.5, seed: int = 0, **fields: object
) -> RoutingTrace:
    """`count` tokens, every other of `depth` layers routed, random gates, decisions by threshold p.

    fields: what is to be different, by the names of RoutingTrace.
    """
    rng = np.random.default_rng(seed)
    routed = list(range(1, depth, 2))
    gate = rng.uniform(0.02, 0.98, size=(len(routed), count)).astype(np.float32)
    keep = gate >= np.float32(p)
    keep[:, :4] = True
    loss = rng.uniform(0.1, 5, count)
    loss[0] = np.nan
    made: dict[str, object] = {
        "tokens": [f"w{i} " if i % 9 else f"w{i}\n" for i in range(count)],
        "token_ids": np.arange(count),
        "gate": gate,
        "keep": keep,
        "layers": routed,
        "num_layers": depth,
        "thresholds": np.full(len(routed), p),
        "keep_first": 4,
        "loss": loss,
        "kv_bytes_per_token": 512,
        "model": "synthetic",
    }
    return RoutingTrace(**{**made, **fields})  # type: ignore[arg-type]


def make_tokenizer(vocab_size: int = 500) -> PreTrainedTokenizerFast:
    """Byte-level BPE, trained here on a few words: any text has tokens, an emoji has several."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["the router decides which token runs and which token skips"] * 3, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


def scatter_gates(model: object, scale: float = 1.0, seed: int = 0) -> None:
    """Random router weights in a converted model, so that its gates differ from token to token."""
    import torch

    from modlab.routing.router import Router

    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():  # type: ignore[attr-defined]
        if isinstance(module, Router):
            weight = torch.randn(module.weight.shape, generator=generator)
            module.weight.data.copy_(weight * scale / weight.norm())
            module.bias.data.zero_()
