"""Batches for property tests: a tiny model, rows with padding anywhere or of documents, forced routing."""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import LlamaForCausalLM, MistralConfig, MistralForCausalLM

import modlab
from modlab.cache.dtypes import RANGES
from tests.helpers.models import narrow_config

VOCAB, LAYERS, HEADS_KV, HEAD_DIM, LONGEST = 64, 4, 2, 8, 24
WINDOW, RECENT = 6, 3

# (architecture, attention, skip, routed layers): layer 0 routed or not, a sliding window shorter than rows.
# "by head": a gate a KV head, routers with a hidden layer. Tokens leave before the first layer of LEAVE.
MODELS = [
    ("llama", "sdpa", "layer", (1, 3)),
    ("llama", "eager", "layer", (0, 1, 2, 3)),
    ("mistral", "sdpa", "layer", (0, 2)),
    ("llama", "sdpa", "attention", (0, 1, 2, 3)),
    ("mistral", "eager", "attention", (1, 3)),
    ("llama", "sdpa", "mlp", (0, 2, 3)),
    ("llama", "sdpa", "kv", (0, 1, 2, 3)),
    ("llama", "eager", "kv", (1, 2)),
    ("mistral", "sdpa", "kv", (0, 1)),
    ("llama", "sdpa", "kv by head", (0, 1, 2, 3)),
    ("llama", "eager", "kv by head", (1, 2)),
    ("mistral", "sdpa", "kv by head", (0, 1)),
    ("llama", "sdpa", "written", (0, 1, 2, 3)),
    ("mistral", "eager", "written", (1, 3)),
    ("llama", "eager", "sublayers", (0, 1, 2, 3)),
    ("mistral", "sdpa", "sublayers", (0, 2)),
    ("llama", "sdpa", "prompt", (2, 3)),
    ("mistral", "eager", "prompt", (1, 2, 3)),
    ("llama", "eager", "kv+prompt", (0, 2, 3)),
    ("mistral", "sdpa", "kv+prompt", (1, 2, 3)),
    ("llama", "sdpa", "kv+prompt by head", (1, 2, 3)),
    ("llama", "sdpa", "kv int8", (0, 1, 2, 3)),
    ("mistral", "sdpa", "kv int8", (0, 1)),
    ("llama", "sdpa", "kv int8 by head", (1, 2)),
    ("mistral", "sdpa", "kv int8 by head", (0, 1)),
    ("llama", "sdpa", "kv+prompt int8 by head", (1, 2, 3)),
    ("llama", "sdpa", "kv k6v4", (0, 1, 2, 3)),
    ("mistral", "sdpa", "kv k6v4 by head", (0, 1)),
    ("llama", "sdpa", "kv+prompt k6v4 by head", (1, 2, 3)),
]
ROUNDED = {i: dtype for i, (_, _, skip, _) in enumerate(MODELS) for dtype in RANGES if f" {dtype}" in skip}
"""Keys and values in fewer bits, by index in `MODELS`. In double precision, so that where one way of running
and another differ in the last bit, no number is rounded to another whole one; with sdpa, for eager attention
of transformers' own adds its masks up in single precision."""
BY_HEAD = [i for i, (_, _, skip, _) in enumerate(MODELS) if skip.endswith(" by head")]
SUBLAYERS = [i for i, (_, _, skip, _) in enumerate(MODELS) if skip == "sublayers"]
LEAVE = {16: 2, 17: 1, 18: 2, 19: 1, 20: 3, 25: 3, 28: 3}
"""By index in `MODELS`, the first layer that tokens of a prompt leave out."""
BY_POSITION = [i for i, (_, _, skip, _) in enumerate(MODELS) if skip == "prompt"]
ROUTED = [i for i in range(len(MODELS)) if i not in BY_POSITION]
FULL = [i for i, (name, *_) in enumerate(MODELS) if name == "llama"]
DROPPING = [i for i, (_, _, skip, _) in enumerate(MODELS) if skip in ("layer", "attention")]
SIDES = ("none", "left", "right", "inside")


def cases(count: int) -> Any:
    """Settings of a property that is tried `count` times, twenty times as often with --long; all properties
    together 700 and 14,000 times."""
    return settings(
        max_examples=count * settings.default.max_examples // 100,
        derandomize=True,  # the same examples everywhere: a failure in CI is a failure here
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow],
    )


@functools.cache
def dense(which: int) -> Any:
    """The dense model of `MODELS[which]`."""
    name, attention, _, _ = MODELS[which]
    torch.manual_seed(which)
    sizes: dict[str, Any] = {"vocab_size": VOCAB, "max_position_embeddings": 4 * LONGEST}
    if name == "llama":
        model: Any = LlamaForCausalLM(narrow_config(**sizes))
    else:
        model = MistralForCausalLM(narrow_config(MistralConfig, **sizes, sliding_window=WINDOW))
    model.set_attn_implementation(attention)
    return model.eval().double() if which in ROUNDED else model.eval()


@functools.cache
def build(which: int) -> Any:
    """The converted model, with spread-out gates."""
    _, _, skip, layers = MODELS[which]
    what: dict[str, Any] = {"skip": skip.split()[0]}
    if which in BY_HEAD:
        what |= {"gates": "kv_head", "router_hidden": 3}
    if which in LEAVE:
        what["leave_after"] = LEAVE[which] / LAYERS
        what["leave_rank"] = 2 if which in BY_HEAD else 0
    if which not in BY_POSITION:
        what |= {"layers": list(layers), "keep_first": 1}
    if skip.startswith("kv"):
        what["keep_recent"] = RECENT
    model = modlab.convert(copy.deepcopy(dense(which)), modlab.MoDConfig(**what))
    if which in ROUNDED:
        modlab.set_kv_cache_dtype(model, ROUNDED[which])
    assert model.mod.layers == list(layers)
    generator = torch.Generator().manual_seed(which)
    with torch.no_grad():
        for layer in layers:
            for name, parameter in model.model.layers[layer].named_parameters():
                noise = torch.randn(parameter.shape, generator=generator)
                if "mod_router" in name:
                    parameter.copy_(noise)
                elif "mod_projections" in name:  # trained, so other ones than the base's
                    parameter.add_(noise * parameter.shape[-1] ** -0.5)
    return model


@dataclass(frozen=True)
class Batch:
    """Token ids and mask [B, T], and what forces the routing.

    Attributes:
        which: index in `MODELS`.
        rows, length: B and T.
        holes: columns of each row that are padding.
        starts: columns of each row at which a document begins, 0 among them; () for plain rows.
        share: of the tokens that are kept where the routing is forced.
        seed: of ids and routing.
    """

    which: int
    rows: int
    length: int
    holes: tuple[tuple[int, ...], ...]
    starts: tuple[tuple[int, ...], ...]
    share: float
    seed: int

    @property
    def model(self) -> Any:
        return build(self.which)

    @property
    def forgets(self) -> bool:
        """Whether the cache lets go of tokens that an earlier one would still see."""
        name, _, skip, _ = MODELS[self.which]
        return name == "mistral" or skip.startswith("kv")

    @property
    def ids(self) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed)
        return torch.randint(0, VOCAB, (self.rows, self.length), generator=generator)

    @property
    def mask(self) -> Tensor:
        mask = torch.ones(self.rows, self.length, dtype=torch.long)
        for row, holes in enumerate(self.holes):
            mask[row, list(holes)] = 0
        return mask

    @property
    def positions(self) -> Tensor:
        """As `generate` passes them, or starting again with each document."""
        if not self.starts:
            return (self.mask.cumsum(1) - 1).clamp_min(0)
        columns = torch.arange(self.length)
        rows = []
        for starts in self.starts:
            begins = torch.tensor(starts)
            rows.append(columns - begins[torch.bucketize(columns, begins, right=True) - 1])
        return torch.stack(rows)

    def inputs(self, start: int = 0, stop: int | None = None) -> dict[str, Tensor]:
        """Keyword arguments of a forward over columns start..stop."""
        stop = self.length if stop is None else stop
        mask = {} if self.starts else {"attention_mask": self.mask[:, :stop]}
        return {
            "input_ids": self.ids[:, start:stop],
            "position_ids": self.positions[:, start:stop],
            **mask,
        }

    def keep(self, layer: int) -> Tensor:
        """Which positions of a row this layer is told to keep, bool [more than T], or [more than T, G] a
        gate: the same in each row, so that rows may change places."""
        generator = torch.Generator().manual_seed(1000 * self.seed + layer)
        gates = [HEADS_KV] if self.which in BY_HEAD else [2] if self.which in SUBLAYERS else []
        return torch.rand(4 * LONGEST, *gates, generator=generator) < self.share

    def forced(self) -> contextlib.AbstractContextManager[Any]:
        """The override: by layer and position among the row's real tokens."""
        masks = {layer: self.keep(layer) for layer in range(LAYERS)}
        return modlab.routing_override(
            self.model, lambda layer, gate, positions: masks[layer][positions.clamp_min(0)]
        )

    def expected_kept(self) -> Tensor:
        """Real tokens that each routed layer keeps, long [routed layers, B]."""
        real = self.mask.bool()
        layers = self.model.mod.layers
        return torch.stack([(self.keep(layer)[self.positions] & real).sum(1) for layer in layers])


@st.composite
def batches(draw: Any, sides: Any = SIDES, min_rows: int = 1, models: Any = None) -> Batch:
    rows = draw(st.integers(min_rows, 3))
    length = draw(st.integers(2, LONGEST))
    side = draw(st.sampled_from(sides))
    holes, starts = [], []
    for _ in range(rows):
        if side == "inside":
            taken = draw(st.sets(st.integers(0, length - 1), max_size=length - 1))
            holes.append(tuple(sorted(taken)))
            continue
        pad = draw(st.integers(0, length - 1)) if side in ("left", "right") else 0
        holes.append(tuple(range(pad) if side == "left" else range(length - pad, length)))
        if side == "documents":
            starts.append((0, *sorted(draw(st.sets(st.integers(1, length - 1), max_size=3)))))
    return Batch(
        which=draw(st.sampled_from(range(len(MODELS)) if models is None else models)),
        rows=rows,
        length=length,
        holes=tuple(holes),
        starts=tuple(starts),
        share=draw(st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0])),
        seed=draw(st.integers(0, 999)),
    )


def assert_real_equal(got: Tensor, expected: Tensor, mask: Tensor) -> None:
    """Equal within fp32 rounding for tokens that are no padding."""
    real = mask.bool()
    torch.testing.assert_close(got[real], expected[real], rtol=1e-4, atol=2e-5)


@contextlib.contextmanager
def threshold_at_a_gap(model: Any, **inputs: Any) -> Iterator[None]:
    """Thresholds in the widest gap of each layer's middle gates, so that rounding moves no token over it.

    Set from the first routed layer to the last, since what one layer skips changes the gates after it.
    Nothing is set where the position alone decides.
    """
    if model.mod.skip.decides_itself:
        yield
        return
    before = dict(model.mod.thresholds)
    try:
        for layer in model.mod.layers:
            with modlab.record_routing(model) as recording, torch.no_grad():
                model(**inputs, use_cache=False)
            step = recording.steps[0]
            gates = step.gate[layer][step.real].flatten().sort().values.clamp(1e-4, 1 - 1e-4)
            if len(gates) > 1:
                edge = len(gates) // 4  # some of the tokens on either side
                widest = edge + int(gates[edge : len(gates) - edge].diff().argmax())
                modlab.set_threshold(model, float(gates[widest : widest + 2].mean()), layers=[layer])
        yield
    finally:
        modlab.set_threshold(model, before)
