"""How many tokens each routed layer of a prompt keeps, guessed before it runs from the prompt before it.

The number shapes a layer's tensors, so the host asks for it in every routed layer, and until it has launched
the layer the GPU has nothing to do. With a guess nothing is asked until the end of the prompt: a layer runs
as many tokens as were guessed. Those that are too many are copies of one skipped token; they come after all
others, are seen by none of them, and are dropped. Where more tokens were kept than guessed the prompt runs
again, without guesses.

Shape letters: S tokens of the line, R tokens that run.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class Guesses:
    """What the engine knows of prompts of one row; off unless `Engine.guesses` is one of these.

    Attributes:
        room: a layer is guessed to keep so many times the share of the prompt before.
        multiple: guesses are multiples of it.
        least, most: tokens of a prompt for which it is done. Shorter ones wait little, longer ones have the
            GPU at work while the host waits, and would lose more by running again.
        shares: of the tokens, by layer, what the prompt before kept.
        right, wrong: prompts that ran on guesses, and that had to run again.
    """

    room: float = 1.25
    multiple: int = 64
    least: int = 512
    most: int = 16384
    shares: dict[int, float] = field(default_factory=dict)
    right: int = 0
    wrong: int = 0

    def of(self, tokens: int) -> dict[int, int]:
        """Tokens that each layer runs of a prompt; layers that may keep nearly all of them are left out."""
        if not self.least <= tokens <= self.most:
            return {}
        guessed = {
            layer: self.multiple * max(1, math.ceil(self.room * share * tokens / self.multiple))
            for layer, share in self.shares.items()
        }
        return {layer: size for layer, size in guessed.items() if size < tokens}

    def learn(self, kept: dict[int, int], tokens: int) -> None:
        """Remembers what the layers of a prompt have kept."""
        if self.least <= tokens <= self.most:
            self.shares = {layer: count / tokens for layer, count in kept.items()}


def guessed_places(keep_S: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """The kept tokens, then one skipped token as often as it takes, long [R = size]; and which places hold
    kept ones, bool [R]. Of more kept tokens than `size` the first."""
    found_R = torch.nonzero_static(keep_S, size=size, fill_value=-1)[:, 0]
    real_R = found_R >= 0
    return torch.where(real_R, found_R, keep_S.to(torch.uint8).argmin()), real_R
