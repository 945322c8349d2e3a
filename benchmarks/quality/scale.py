"""Sizes and budgets: the whole study, the same on the wheel's model, and a small copy for tests."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Scale:
    """Attributes:
    hidden, layers, heads, kv_heads, inner, vocabulary: of the Llama that is the base.
    seq_len: tokens a row, in training and evaluation.
    batch_size: rows a step.
    stdlib_only: read the standard library alone, for speed.
    base_tokens, screen_tokens, decide_tokens: budgets of the base and of one arm.
    base_lr, lr: peak learning rates of the base and of the arms.
    heldout_tokens: evaluated on, for each source of text.
    distances: tokens between the two copies of a passage, and between a value and the question for it.
    recall_rows: rows for each distance.
    generated: prompts continued, and tokens each, for the health of generated text.
    shipped: name of a model in the wheel that is the base, with its tokenizer; sizes are then its own.
    """

    name: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    inner: int
    vocabulary: int
    seq_len: int
    batch_size: int
    stdlib_only: bool
    base_tokens: int
    screen_tokens: int
    decide_tokens: int
    base_lr: float
    lr: float
    heldout_tokens: int
    distances: tuple[int, ...]
    recall_rows: int
    generated: tuple[int, int]
    shipped: str | None = None


FULL = Scale(
    name="full",
    hidden=512,
    layers=16,
    heads=8,
    kv_heads=8,
    inner=1408,
    vocabulary=8192,
    seq_len=4096,
    batch_size=8,
    stdlib_only=False,
    base_tokens=140_000_000,
    screen_tokens=10_000_000,
    decide_tokens=100_000_000,
    base_lr=1.5e-3,
    lr=3e-4,
    heldout_tokens=262_144,
    distances=(256, 512, 1024, 2048, 4000),
    recall_rows=64,
    generated=(8, 128),
)

SMOKE = Scale(
    name="smoke",
    hidden=64,
    layers=6,
    heads=2,
    kv_heads=2,
    inner=160,
    vocabulary=512,
    seq_len=256,
    batch_size=8,
    stdlib_only=True,
    base_tokens=80_000,
    screen_tokens=20_000,
    decide_tokens=20_000,
    base_lr=3e-3,
    lr=1e-3,
    heldout_tokens=32_768,
    distances=(112, 150),
    recall_rows=4,
    generated=(2, 16),
)

DEMO = Scale(
    name="demo",
    hidden=256,
    layers=12,
    heads=8,
    kv_heads=4,
    inner=640,
    vocabulary=4096,
    seq_len=2048,
    batch_size=16,
    stdlib_only=False,
    base_tokens=0,
    screen_tokens=10_000_000,
    decide_tokens=30_000_000,
    base_lr=0.0,
    lr=3e-4,
    heldout_tokens=262_144,
    distances=(256, 512, 1024, 1800),
    recall_rows=64,
    generated=(8, 128),
    shipped="demo-dense",
)

SCALES = {scale.name: scale for scale in (FULL, DEMO, SMOKE)}
