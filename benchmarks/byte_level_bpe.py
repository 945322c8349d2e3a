"""The tokenizer of the models that this project trains itself: byte-level BPE, every digit a token."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


def train_byte_level_bpe(texts: Iterable[str], vocabulary: int) -> Any:
    """A `tokenizers.Tokenizer`. `<s>`, token 0, stands in front of every document and so also ends the one
    before; `<pad>` is token 1.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<s>", "<pad>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    bpe.train_from_iterator(texts, trainer)
    bpe.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 0)]
    )
    return bpe
