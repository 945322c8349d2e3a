"""What a benchmark case is: its settings, its rows, and the register of all of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from modlab.config import KVCacheDtype, MoDConfig
from modlab.errors import ModlabError

Row = dict[str, Any]
ROW_KEYS = (
    "case",
    "shape",
    "context",
    "batch",
    "routed",
    "routed_layers",
    "num_layers",
    "keep_ratio",
    "dense_ms",
    "mod_ms",
    "speedup",
    "ideal",
    "kv_bytes",
    "dense_kv_bytes",
    "kv_saving",
)
"""Keys that every row has. `case` says what the times are of: "prefill" (ms to the first token), "decode" (ms
a further token), "train" (ms a step), "peak" (ms of the prefill whose memory is compared), "throughput" (ms a
token at the largest batch). More keys may follow.
"""
SCHEMA_VERSION = 2


@dataclass
class Settings:
    """What the command line chose."""

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    dtype: torch.dtype = torch.float32
    shape: str = "wide"
    contexts: Sequence[int] = (2048,)
    batch: int = 1
    routed: str = "alternate"
    skip: str = "layer"  # what a skipped token leaves out
    layers: int | None = None  # depth other than the shape's own
    ratios: Sequence[float] = (0.10, 0.25, 0.50, 1.00)
    repeats: int = 7
    decode_tokens: int = 40
    seed: int = 0
    only: Sequence[str] = ()  # parts of a case, where it has some; all by default
    kv_cache_dtype: KVCacheDtype = "auto"  # how converted models store keys and values

    @property
    def mod(self) -> MoDConfig:
        """The conversion of the benchmark's models, layers apart."""
        return MoDConfig(skip=self.skip, kv_cache_dtype=self.kv_cache_dtype)


Case = Callable[[Settings], Iterable[Row]]
CASES: dict[str, Case] = {}


def case(run: Case) -> Case:
    """Registers a benchmark under its function's name; its docstring's first line is what the list shows."""
    CASES[run.__name__] = run
    return run


def parts_of(name: str) -> Sequence[str]:
    """What `Settings.only` may name of a case; nothing where it is of one piece."""
    parts: Sequence[str] = getattr(CASES[name], "parts", ())
    return parts


def takes(name: str, kv_cache_dtype: KVCacheDtype) -> bool:
    """Whether a case can be run with that `Settings.kv_cache_dtype`."""
    return kv_cache_dtype in getattr(CASES[name], "kv_cache_dtypes", ("auto",))


class Skipped(ModlabError):
    """This case cannot run here; the message says what it lacks."""
