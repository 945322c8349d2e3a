"""Speed of the product on a GPU: fitting routers, and distillation's tokens a second and peak memory.

    python -m benchmarks.real_models train-speed --model FOLDER [--batch 8] [--length 4096] [--steps 20]

Texts are random tokens: what is computed does not depend on them.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch

import modlab

WARM = 5  # steps before the clock starts: compilation


def measure(
    model: Any, *, batch: int, length: int, steps: int, accumulate: int = 1, checkpointing: bool = False,
    mixed: bool = True, compiled: bool = False,
) -> dict[str, float]:  # fmt: skip
    """Converts a dense model, fits its routers, distils them for some steps.

    Args:
        model: dense, on its device; afterwards it is converted.
        batch, length: rows of a forward, and their tokens.
        steps: optimiser steps that are timed, after `WARM` others.
        accumulate: forwards a step.
        checkpointing: of gradients.
        mixed: half of the rows with thresholds of their own.
        compiled: layers by torch.compile.

    Returns:
        seconds of the fit and its tokens; tokens a second of training; peak MiB of each (0 without a GPU).
    """
    device = next(model.parameters()).device
    vocabulary = model.config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(vocabulary, (4 * batch * accumulate, length), generator=generator)
    mod_config, fit_config = modlab.recipe("quick", model, context=min(1024, length // 2))
    modlab.convert(model, mod_config)
    reset = torch.cuda.reset_peak_memory_stats if device.type == "cuda" else lambda: None
    reset()
    found = modlab.fit_routers(model, rows, fit_config)
    fit_peak = _peak(device)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    clock = _Clock()
    config = modlab.TrainConfig(
        objective="distil", steps=WARM + steps, batch_size=batch, grad_accum=accumulate, keep_ratio=0.25,
        keep_range=(0.05, 0.67) if mixed else None, ramp=0.7, calibrate=False, log_every=WARM,
        compile=compiled,
    )  # fmt: skip
    reset()
    modlab.train(model, rows, config, monitor=clock)
    return {
        "fit_seconds": round(found.seconds, 2),
        "fit_tokens": found.tokens,
        "fit_peak_mib": fit_peak,
        "tokens_per_second": round(steps * batch * accumulate * length / clock.seconds),
        "train_peak_mib": _peak(device),
    }


class _Clock:
    """A run's monitor: the seconds of the steps after the warm ones."""

    seconds = 0.0
    began = 0.0

    def step(self, step: int, share: float) -> bool:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.began = now if step == WARM else self.began
        self.seconds = now - self.began
        return True

    def log(self, row: dict[str, Any]) -> None:
        print({name: row[name] for name in ("step", "kl", "keep_ratio", "target")}, flush=True)


def _peak(device: torch.device) -> float:
    return torch.cuda.max_memory_allocated() / 2**20 if device.type == "cuda" else 0.0


def load(folder: Path | None, device: str) -> Any:
    """The dense model of a folder, or without one random weights of the 8B shape of Llama 3, in bf16."""
    if folder is not None:
        loaded: Any = modlab.load(folder)[0]
        return loaded.to(device)
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=128_256, hidden_size=4096, intermediate_size=14_336, num_hidden_layers=32,
        num_attention_heads=32, num_key_value_heads=8, max_position_embeddings=8192, dtype="bfloat16",
    )  # fmt: skip
    with torch.device(device):
        model: Any = LlamaForCausalLM(config)
    return model.to(torch.bfloat16)
