"""Text that a model writes: `model.generate` with its own cache and none of its generation config's filters.

Shape letters: M prompts, B rows of one call, P tokens of a prompt, T tokens with the continuation.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from modlab.data.batches import check_vocabulary
from modlab.hf.model import device_of, eval_mode, vocabulary_size
from modlab.hf.ranks import over_ranks


class SeededSampling(LogitsProcessor):
    """Makes greedy search a draw from softmax(logits / temperature), with a random stream for each row.

    The argmax of logits less the logarithm of exponential noise is such a draw (torch.multinomial does the
    same). With `do_sample` the rows of a batch would share one stream, and a sample would depend on its
    neighbours and on the batch size.
    """

    def __init__(self, temperature: float, seeds: Sequence[int]) -> None:
        self.temperature = temperature
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        rows = [torch.empty(scores.shape[1]).exponential_(generator=g) for g in self.generators]
        return scores.float() / self.temperature - torch.stack(rows).log().to(scores.device)


def write(
    model: Any,
    prompt_MP: Tensor,
    new_tokens: int,
    temperature: float | None,
    seed: int,
    batch_size: int,
    bar: Any = None,
    accelerator: Any = None,
) -> list[Tensor]:
    """Each prompt [P] with its continuation by `model.generate`, long [T] on the CPU, cut after the first end
    token.

    Args:
        temperature: of sampling; None for greedy search.
        seed: of sampling.
        bar: a tqdm bar that counts prompts.
        accelerator: an `accelerate.Accelerator`: its processes share the calls, and each gets all rows.
    """
    check_vocabulary({"input_ids": prompt_MP}, vocabulary_size(model), "what is asked")
    device = device_of(model)
    ends = torch.tensor(end_tokens(model))
    prompt_tokens = prompt_MP.shape[1]

    def made(start: int) -> list[Tensor]:
        ids_BP = prompt_MP[start : start + batch_size].to(device)
        processors = LogitsProcessorList()
        if temperature is not None:
            seeds = [seed * 2**20 + start + row for row in range(len(ids_BP))]
            processors.append(SeededSampling(temperature, seeds))
        with eval_mode(model), plain_generation(model):
            made_BT = model.generate(
                ids_BP,
                attention_mask=torch.ones_like(ids_BP),
                logits_processor=processors,
                max_new_tokens=new_tokens,
            ).cpu()
        rows = []
        for made_T in made_BT:
            ended = torch.isin(made_T[prompt_tokens:], ends).nonzero().flatten()
            rows.append(made_T[: prompt_tokens + int(ended[0]) + 1] if len(ended) else made_T)
        return rows

    starts = range(0, len(prompt_MP), batch_size)
    parts = over_ranks(
        made, starts, accelerator, bar=bar, size=lambda start: min(batch_size, len(prompt_MP) - start)
    )
    return [row for part in parts for row in part]


@contextlib.contextmanager
def plain_generation(model: Any) -> Iterator[None]:
    """Nothing of the model's generation config inside but its special tokens: no penalty, filter or beam."""
    own, ends = model.generation_config, end_tokens(model)
    pad = own.pad_token_id if own.pad_token_id is not None else next(iter(ends), 0)
    model.generation_config = GenerationConfig(eos_token_id=ends or None, pad_token_id=pad)
    try:
        yield
    finally:
        model.generation_config = own


def end_tokens(model: Any) -> list[int]:
    """The tokens that end a text."""
    ends = model.generation_config.eos_token_id
    return [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
