"""The rows of a fit, one forward each: what is summed up of them, layer by layer.

Shape letters: B rows, C tokens of one copy, P tokens of the prompt, D model dim, A gates of a layer.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from modlab.hf.anatomy import attention_name, decoder_layers, decoder_of
from modlab.routing.router import HiddenRouter, Router
from modlab.routing.state import routing_of, routing_off
from modlab.training.contexts import repeated
from modlab.training.regression import Explained, Ridge, fit_hidden, linear_logits, logits
from modlab.training.scores import LayerScores, watched

MIB = 2**20


class FitPass:
    """What is known of the routers' gates so far.

    Args:
        model: converted, in eval mode.
        prompt_P: token ids between the copies.
        ridge: as of `FitConfig`.
        hidden_steps: of the hidden layers' fit, 0 for none.
        sample: tokens of each layer that the hidden layers are fitted to.
        tokens: of all rows that are fitted to.
        seed: of the sample.

    Attributes:
        ahead: R² of rows before they were fitted to.
        held, held_linear: R² of held-out rows, and of the linear part alone.
    """

    def __init__(
        self,
        model: Any,
        prompt_P: Tensor,
        *,
        ridge: float,
        hidden_steps: int,
        sample: int,
        tokens: int,
        seed: int,
    ) -> None:
        self.model, self.decoder, self.prompt = model, decoder_of(model), prompt_P
        routing, layers = routing_of(model), decoder_layers(model)
        self.first = routing.config.keep_first
        self.routers: dict[int, Router] = {i: layers[i].mod_router for i in routing.layers}  # type: ignore[misc]
        self.ridges = {i: Ridge(router, ridge) for i, router in self.routers.items()}
        hidden = any(isinstance(router, HiddenRouter) for router in self.routers.values())
        self.hidden_steps = hidden_steps if hidden else 0
        self.sampled = min(1.0, sample / max(1, tokens)) if self.hidden_steps else 0.0
        self.samples: dict[int, list[tuple[Tensor, Tensor]]] = {i: [] for i in self.routers}
        self.generator = torch.Generator().manual_seed(seed)
        self.seed = seed
        self.ahead, self.held, self.held_linear = Explained(), Explained(), Explained()
        self.solved = False
        self.logits: list[Tensor] = []
        self.scores = {}
        for i, router in self.routers.items():
            attention = layers[i].get_submodule(attention_name(layers[i]) or "")
            recent = routing.recent or 1
            self.scores[i] = (layers[i], attention, routing.windows[i], recent, router.bias.numel())

    def fit(self, text_BC: Tensor) -> None:
        """One forward of rows to fit to; R² `ahead` is measured on them first."""
        self.picked: Tensor | None = None  # the same tokens of all layers
        self._run(text_BC, self._add)

    def hold(self, text_BC: Tensor) -> None:
        """One forward of rows to measure on."""
        self._run(text_BC, self._measure)

    def solve(self) -> None:
        """The linear parts, of all rows so far; `ahead` counts from here on."""
        for ridge in self.ridges.values():
            ridge.solve()
        self.solved, self.ahead = True, Explained()

    def finish(self) -> None:
        """Linear parts and hidden layers, of all rows; what was summed up is let go."""
        self.solve()
        self.ridges.clear()
        samples = []
        for i, router in self.routers.items():
            if self.hidden_steps and isinstance(router, HiddenRouter):
                samples.append((router, *self._sampled(i)))
            self.samples[i] = []
        fit_hidden(samples, self.hidden_steps, self.seed)

    def _sampled(self, i: int) -> tuple[Tensor, Tensor]:
        """States and log scores of a layer's sample, each in one piece."""
        x, y = (torch.cat(parts) for parts in zip(*self.samples[i], strict=True))
        return x, y

    @torch.no_grad()
    def open(self, keep_ratio: float) -> float:
        """Shifts all gates by one amount, so that a threshold of 0.5 keeps that share of the held-out texts
        as the dense model reads them; what is kept of them then."""
        by = self.logit_keeping(keep_ratio)
        for router in self.routers.values():
            router.bias.sub_(by)
        free = float((self.pooled >= by).float().mean())
        return (self.first + free * (self.length - self.first)) / self.length

    @functools.cached_property
    def pooled(self) -> Tensor:
        """All gates' logits of the held-out texts as they were fitted, descending."""
        return torch.cat([z.flatten() for z in self.logits]).sort(descending=True).values

    def logit_keeping(self, keep_ratio: float) -> float:
        """The logit above which that share of the held-out texts' tokens lies, first tokens included."""
        free = (keep_ratio * self.length - self.first) / max(1, self.length - self.first)
        count = min(max(round(free * len(self.pooled)), 0), len(self.pooled))
        above = self.pooled[count - 1] if count else self.pooled[0] + 1
        below = self.pooled[count] if count < len(self.pooled) else self.pooled[-1] - 1
        return float((above + below) / 2)

    def _run(self, text_BC: Tensor, take: Callable[[int, Tensor, Tensor], None]) -> None:
        rows = repeated(text_BC, self.prompt)
        B, T = rows.shape
        self.length = C = text_BC.shape[1]

        def taking(i: int) -> Callable[[Tensor, Tensor], None]:
            return lambda x, y: take(i, x[:, self.first : C], y[:, self.first :])

        layers = [LayerScores(*facts, take=taking(i)) for i, facts in self.scores.items()]
        with routing_off(self.model), watched(layers, (B, T), C):
            self.decoder(input_ids=rows, use_cache=False)

    def _add(self, i: int, x_BCD: Tensor, y_BCA: Tensor) -> None:
        if self.solved:
            self.ahead.add(linear_logits(self.routers[i], x_BCD), y_BCA)
        x, y = x_BCD.flatten(0, 1), y_BCA.flatten(0, 1)
        self.ridges[i].add(x, y)
        if self.sampled:
            if self.picked is None:
                self.picked = (torch.rand(len(x), generator=self.generator) < self.sampled).nonzero()[:, 0]
            self.samples[i].append((x[self.picked.to(x.device)], y[self.picked.to(y.device)]))

    def _measure(self, i: int, x_BCD: Tensor, y_BCA: Tensor) -> None:
        z_BCA = logits(self.routers[i], x_BCD)
        self.held.add(z_BCA, y_BCA)
        self.held_linear.add(linear_logits(self.routers[i], x_BCD), y_BCA)
        self.logits.append(z_BCA.float().cpu())


def sample_size(model: Any, mib: int) -> int:
    """Tokens of each routed layer whose states take that many MiB together."""
    layers = len(routing_of(model).layers)
    weight = next(model.parameters())
    width = decoder_of(model).config.get_text_config(decoder=True).hidden_size
    return max(1, mib * MIB // (layers * width * weight.element_size()))
