"""Case `train`: one step of training, packed, against the dense model."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from modlab.bench.clock import interleaved
from modlab.bench.ideal import ideal_prefill
from modlab.bench.models import converted_twin, dense_model, depth, random_routing, routed_layers
from modlab.bench.registry import Row, Settings, case
from modlab.bench.rows import make_row
from modlab.routing.state import routing_override


def train_rows(settings: Settings, context: int, batch: int, ratio: float) -> Iterator[Row]:
    """Forward, backward and AdamW on full sequences, activations recomputed; only kept tokens run."""
    dense = dense_model(settings, context)
    routed = routed_layers(settings.routed, depth(settings))
    twin = converted_twin(dense, routed, settings.skip)
    twin.mod.what_if = False
    dense.requires_grad_(True)
    for model in (dense, twin):
        model.train()
        model.config.use_cache = False
        # renamed in transformers 5.24
        enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
        enable({"use_reentrant": False})
    optimizer = torch.optim.AdamW(dense.parameters(), lr=1e-5, fused=settings.device.type == "cuda")
    generator = torch.Generator().manual_seed(settings.seed)
    ids = torch.randint(1, dense.config.vocab_size, (batch, context), generator=generator).to(settings.device)
    table = random_routing(routed, batch, [context], ratio, settings.seed, settings.device)

    def step(model: Any) -> None:
        override = contextlib.nullcontext() if model is dense else routing_override(model, table)
        with override:
            model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    calls = {"dense": lambda: step(dense), "mod": lambda: step(twin)}
    times = interleaved(calls, settings.repeats, settings.device)
    kept = dict.fromkeys(routed, ratio)
    yield make_row(
        times["dense"], times["mod"], case="train", shape=settings.shape, context=context, batch=batch,
        routed=settings.routed, routed_layers=len(routed), num_layers=dense.config.num_hidden_layers,
        skip=settings.skip, keep_ratio=ratio,
        ideal=ideal_prefill(dense.config, [context] * batch, kept, settings.mod),
        kv_bytes=0, dense_kv_bytes=0, optimizer="AdamW", gradient_checkpointing=True,
    )  # fmt: skip


@case
def train(settings: Settings) -> Iterator[Row]:
    """A training step (forward, backward, AdamW), only kept tokens run; forced random routing."""
    for context in settings.contexts:
        for ratio in settings.ratios:
            yield from train_rows(settings, context, settings.batch, ratio)
