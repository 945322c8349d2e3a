"""The next token, chosen inside the step: the host looks on, one step behind.

Greedy search needs nothing of the host: the best token of each row, padding where a row has ended, and
whether all have. What transformers' `_sample` does in some ten small launches a token is then part of the
CUDA graph.

Shape letters: B rows, V vocabulary, C chunks of it, E end tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

ARGMAX_CHUNKS = 64
"""torch gives a row's argmax to one multiprocessor: 32 us for 128,256 logits on an H200; in chunks 5 us."""

MAX_ENDS = 32
"""End tokens that fit the table; a model has one to five."""

NO_TOKEN = -1


@dataclass
class Choice:
    """What is chosen, and by which rules, at fixed addresses.

    Attributes:
        token: what the next step decodes, long [B, 1].
        finished: rows that have met an end token, bool [B].
        ends: end tokens, long [E]; `NO_TOKEN` where there are fewer.
        pad: what a finished row goes on with, long [1].
        news: for the host, long [1 + B]: whether all rows are finished, then `token`.
    """

    token: Tensor
    finished: Tensor
    ends: Tensor
    pad: Tensor
    news: Tensor

    @classmethod
    def on(cls, device: torch.device, rows: int) -> Choice:
        """Zeros and no end tokens."""

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.long, device=device)

        return cls(zeros(rows, 1), zeros(rows).bool(), zeros(MAX_ENDS) + NO_TOKEN, zeros(1), zeros(1 + rows))

    def rules(self, ends: list[int], pad: int) -> list[tuple[Tensor, list[int]]]:
        """What to enter in the tables for a new generation: nobody has finished, these tokens end a row."""
        filled = ends + [NO_TOKEN] * (MAX_ENDS - len(ends))
        return [(self.finished, [0] * len(self.finished)), (self.ends, filled), (self.pad, [pad])]


def choose(logits_BV: Tensor, choice: Choice) -> None:
    """Enters each row's next token: its best, or padding once it has ended."""
    token_B = torch.where(choice.finished, choice.pad, best_token(logits_BV))
    finished_B = choice.finished | (token_B[:, None] == choice.ends).any(1)
    choice.token.copy_(token_B[:, None])
    choice.finished.copy_(finished_B)
    choice.news.copy_(torch.cat([finished_B.all()[None].long(), token_B]))


def end_step(logits_BV: Tensor, choice: Choice, position_B1: Tensor, column_B: Tensor) -> None:
    """Chooses, and moves positions and columns on: all that a step does after its logits."""
    choose(logits_BV, choice)
    position_B1.add_(1)
    column_B.add_(1)


def best_token(logits_BV: Tensor) -> Tensor:
    """Argmax over the vocabulary, long [B], by chunks; the first of equals wins."""
    padded = F.pad(logits_BV, (0, -logits_BV.shape[1] % ARGMAX_CHUNKS), value=-torch.inf)
    chunks_BCV = padded.unflatten(1, (ARGMAX_CHUNKS, -1))
    top_BC, at_BC = chunks_BCV.max(-1)
    chunk_B1 = top_BC.argmax(-1, keepdim=True)
    return (chunk_B1 * chunks_BCV.shape[2] + at_BC.gather(1, chunk_B1))[:, 0]
