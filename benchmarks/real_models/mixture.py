"""Training rows: a stream of tokens, some rows with passages or short key-value lines that come again."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


class Mixture:
    """Rows drawn at random from a stream, the same for the same seed.

    Args:
        stream: token ids of all training texts.
        lines: [count, width], key-value lines, each padded with -1.
        passages: share of the rows in which passages are repeated at random distances.
        keyed: share of the rows in which lines are.
    """

    def __init__(
        self, stream: np.ndarray, lines: np.ndarray, seed: int = 0, passages: float = 0.25, keyed: float = 0.2
    ) -> None:
        self.stream, self.lines = stream, lines
        self.passages, self.keyed = passages, keyed
        self.random = np.random.default_rng(seed)

    def rows(self, B: int, T: int) -> Tensor:
        """[B, T] int64."""
        return torch.from_numpy(np.stack([self._row(T) for _ in range(B)]))

    def _row(self, T: int) -> np.ndarray:
        begin = self.random.integers(len(self.stream) - T)
        row = self.stream[begin : begin + T].astype(np.int64)
        kind = self.random.random()
        if kind < self.passages:
            self._repeat_passages(row)
        elif kind < self.passages + self.keyed:
            self._repeat_lines(row)
        return row

    def _repeat_passages(self, row: np.ndarray) -> None:
        T = len(row)
        for _ in range(max(1, T // 340)):
            length = int(self.random.choice([16, 32, 64, 128, 256]))
            if 4 * length > T:
                continue
            source = int(self.random.integers(T - 2 * length))
            copy = int(self.random.integers(source + length, T - length + 1))
            row[copy : copy + length] = row[source : source + length]

    def _repeat_lines(self, row: np.ndarray) -> None:
        T, width = len(row), self.lines.shape[1]
        spots = self.random.permutation(T // width - 1)[: max(2, T // 100) // 2 * 2] * width
        for one, other in spots.reshape(-1, 2):
            line = self.lines[self.random.integers(len(self.lines))]
            line = line[line >= 0]
            row[one : one + len(line)] = line
            row[other : other + len(line)] = line
