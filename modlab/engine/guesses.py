"""How many tokens each routed layer of a prompt keeps, guessed before it runs from the prompts before it.

The number shapes a layer's tensors, so the host asks for it in every routed layer, and until it has launched
the layer the GPU has nothing to do. With a guess nothing is asked until the end of the prompt: a layer runs
as many tokens as were guessed. Those that are too many are copies of one skipped token; they come after all
others, are seen by none of them, and are dropped. Where more tokens were kept than guessed the prompt runs
again, without guesses.

How much a layer keeps is a property of a text, and a wrong guess costs what several right ones save. So a
prompt runs on guesses only after several in a row that they would have been right for, which costs nothing to
find out. It is off unless asked for (`enable_fast_generation(guess=True)`): products of other sizes round in
another way, and then what ran before has a say in a prompt's last bits.

Shape letters: S tokens of the line, R tokens that run.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class Guesses:
    """What the engine knows of the latest prompts of one row.

    Attributes:
        room: a layer is guessed to keep so many times the largest share of the latest prompts.
        multiple: guesses are multiples of it.
        least, most: tokens of a prompt for which it is done. Shorter ones wait little, longer ones have the
            GPU at work while the host waits, and would lose more by running again.
        steady: prompts in a row for which guesses must have been right, or would have been, before one runs
            on them; so many are remembered. A prompt of 4,096 tokens that runs twice costs what five right
            guesses save, where nine tenths of the tokens skip every other layer of the 8B shape, on an H200
            (docs/log.md): even if every prompt that runs on guesses fails, a tenth is lost.
        latest: shares of the tokens, by layer, that prompts have kept, the latest last.
        streak: of prompts up to the latest one, how many guesses were right for.
        right, wrong: prompts that ran on guesses, and that had to run again.
    """

    room: float = 1.25
    multiple: int = 64
    least: int = 512
    most: int = 8192
    steady: int = 8
    latest: deque[dict[int, float]] = field(default_factory=deque)
    streak: int = 0
    right: int = 0
    wrong: int = 0

    def of(self, tokens: int) -> dict[int, int]:
        """Tokens that each layer runs of a prompt; layers that may keep nearly all of them are left out."""
        return self._sizes(tokens) if self.streak >= self.steady else {}

    def learn(self, kept: dict[int, int], tokens: int) -> None:
        """Remembers what the layers of a prompt have kept."""
        if not self.least <= tokens <= self.most:
            return
        fits = all(kept[layer] <= size for layer, size in self._sizes(tokens).items())
        self.streak = self.streak + 1 if fits and self.latest else 0
        self.latest.append({layer: count / tokens for layer, count in kept.items()})
        while len(self.latest) > max(self.steady, 1):
            self.latest.popleft()

    def _sizes(self, tokens: int) -> dict[int, int]:
        if not self.latest or not self.least <= tokens <= self.most:
            return {}
        largest = {layer: max(shares[layer] for shares in self.latest) for layer in self.latest[-1]}
        guessed = {
            layer: self.multiple * max(1, math.ceil(self.room * share * tokens / self.multiple))
            for layer, share in largest.items()
        }
        return {layer: size for layer, size in guessed.items() if size < tokens}


def guessed_places(keep_S: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """The kept tokens, then one skipped token as often as it takes, long [R = size]; and which places hold
    kept ones, bool [R]. Of more kept tokens than `size` the first."""
    found_R = torch.nonzero_static(keep_S, size=size, fill_value=-1)[:, 0]
    real_R = found_R >= 0
    return torch.where(real_R, found_R, keep_S.to(torch.uint8).argmin()), real_R
