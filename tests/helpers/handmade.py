"""Models that follow a rule written down by hand, so that what a probe has to say of them is known."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace

import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tests.helpers.models import tiny_config

SURE = 40.0  # logit of a token that a rule is sure of; the others have 0
Rule = Callable[[Tensor, Tensor], None]


class HandMade(nn.Module):
    """`rule(ids_T, logits_TV)` fills in logits, which start as zeros: a uniform distribution."""

    def __init__(self, rule: Rule, vocab_size: int = 128, context: int = 2048) -> None:
        super().__init__()
        self.rule = rule
        self.config = LlamaConfig(vocab_size=vocab_size, max_position_embeddings=context)
        self.anchor = nn.Parameter(torch.zeros(1))
        self.seen: list[Tensor] = []

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, use_cache: bool = True):
        self.seen.extend(input_ids)
        logits = torch.zeros(*input_ids.shape, self.config.vocab_size)
        for ids_T, logits_TV in zip(input_ids, logits, strict=True):
            self.rule(ids_T, logits_TV)
        return SimpleNamespace(logits=logits)


def copier(distance: int, wrong_at: int | None = None) -> Rule:
    """Predicts the token that stood `distance` before the one asked for; column `wrong_at` it cannot tell."""

    def rule(ids_T: Tensor, logits_TV: Tensor) -> None:
        for asked in range(distance, len(ids_T) + 1):
            if asked != wrong_at:
                logits_TV[asked - 1, ids_T[asked - distance]] = SURE

    return rule


def induction(longest: int) -> Rule:
    """Predicts what followed the latest place where the longest run of tokens before was the same.

    Runs of more than `longest` tokens are not told apart.
    """

    def rule(ids_T: Tensor, logits_TV: Tensor) -> None:
        ids = ids_T.tolist()
        places: list[dict[tuple[int, ...], int]] = [{} for _ in range(longest + 1)]
        for at in range(len(ids)):
            runs = [tuple(ids[at - n + 1 : at + 1]) for n in range(1, min(longest, at + 1) + 1)]
            for run in reversed(runs):
                if (before := places[len(run)].get(run)) is not None:
                    logits_TV[at, ids[before + 1]] = SURE
                    break
            for run in runs:
                places[len(run)][run] = at

    return rule


def bigram(seed: int = 0, vocab_size: int = 128) -> Rule:
    """Random logits that depend on the token before only."""
    table = torch.randn(vocab_size, vocab_size, generator=torch.Generator().manual_seed(seed))

    def rule(ids_T: Tensor, logits_TV: Tensor) -> None:
        logits_TV += table[ids_T]

    return rule


def following_llama(following: list[int] | Tensor, sure: float = SURE, **config: object) -> LlamaForCausalLM:
    """A real Llama in which token `following[i]` comes after token i: its layers add nothing.

    sure: the logit of that token before the final norm's scale; 0 gives a uniform distribution.
    """
    size = len(following)
    settings = {"vocab_size": size, "hidden_size": size, "num_hidden_layers": 1, "tie_word_embeddings": False}
    model = LlamaForCausalLM(tiny_config(**settings | config)).eval()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(size))
        model.lm_head.weight.zero_()
        model.lm_head.weight[torch.as_tensor(following), torch.arange(size)] = sure / math.sqrt(size)
    return model


LINES = [f"name_{i} = {i * 37 % 10000}\nthe router decides which token runs" for i in range(200)]
SPECIAL = ["<unk>", "<s>", "</s>"]
LEVEL = pre_tokenizers.ByteLevel(add_prefix_space=False)


def _wrapped(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


def _bpe(size: int, pre: pre_tokenizers.PreTokenizer = LEVEL) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(LINES, trainer)
    return _wrapped(tokenizer)


def _sentencepiece(joining: bool) -> PreTrainedTokenizerFast:
    """A blank before each text and blanks as part of tokens, as in Llama 2; bytes stand for the unknown."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    if not joining:
        split = pre_tokenizers.Split(Regex("▁+[^▁0-9]*|[0-9]|[^▁0-9]+"), "isolated")
        tokenizer.pre_tokenizer = split
    fallback = [f"<0x{i:02X}>" for i in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=SPECIAL + fallback, show_progress=False)
    tokenizer.train_from_iterator(LINES, trainer)
    return _wrapped(tokenizer)


def make_joining_tokenizer() -> PreTrainedTokenizerFast:
    """One whose tokens reach from a name over the blanks into a value."""
    return _sentencepiece(joining=True)


def make_tokenizers() -> dict[str, PreTrainedTokenizerFast]:
    """One tokenizer a kind: how digits, blanks and new lines become tokens differs."""
    wordpiece = Tokenizer(models.WordPiece(unk_token="<unk>"))
    wordpiece.pre_tokenizer = pre_tokenizers.BertPreTokenizer()  # new lines and blanks are lost
    wordpiece.train_from_iterator(
        LINES, trainers.WordPieceTrainer(vocab_size=300, special_tokens=SPECIAL, show_progress=False)
    )
    digits = pre_tokenizers.Digits(individual_digits=True)
    return {
        "numbers in few tokens": _bpe(700),
        "a token a digit": _bpe(300, pre_tokenizers.Sequence([digits, LEVEL])),
        "a token a byte": _bpe(259),
        "a blank before each text": _sentencepiece(joining=False),
        "words": _wrapped(wordpiece),
    }
