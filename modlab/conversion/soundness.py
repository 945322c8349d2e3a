"""Whether a dense model is what routing builds on: a causal decoder that goes on from a cache of keys.

The model is asked itself, before anything is changed: two rows of three tokens, one of them padded, at once
and then in two steps through a cache. What transformers gets wrong of its own (a type that sees later tokens,
or whose cached steps differ) would come out as modlab's fault, and silently.

Shape letters: B rows, T tokens, V vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from modlab.conversion.survey import Survey
from modlab.errors import ModlabError
from modlab.hf.arguments import hidden_name
from modlab.hf.model import device_of, eval_mode, vocabulary_size
from modlab.hf.names import CACHE_ARGUMENTS, cache_argument

B, T = 2, 3
TOLERANCE = 1e-3
"""Of fp32 logits, as a share of the largest: steps through a cache sum in another order."""
COARSE = 0.25
"""The same in half precision or quantized, where a mixture of experts may choose another expert."""


@torch.no_grad()
def check_decoder(found: Survey) -> None:
    """Refuses a model that does not run on tokens as routing needs it to.

    Raises:
        ModlabError: it has no cache of keys and values, its forward fails, its layers run on other positions
            than its tokens or more than once, it sees later tokens, or its cached steps differ.
    """
    if all(facts.refusal for facts in found.facts):
        return  # which says more
    model = found.model
    names = inspect.signature(type(model).forward).parameters
    if not any(name in names for name in CACHE_ARGUMENTS):
        raise _refused(found, "it has no cache of keys and values")
    probe = _Probe(model, "position_ids" in names)
    with eval_mode(model):
        with _failing_as(found, "its forward fails on token ids alone"), _watched(found):
            whole = probe.logits(0, T, None)
        with _failing_as(found, "it does not go on from a cache"):
            cache = DynamicCache(config=model.config)
            steps = [probe.logits(0, T - 1, cache), probe.logits(T - 1, T, cache)]
    if not whole[probe.mask.bool()].isfinite().all():
        return  # weights that are no numbers compare with nothing
    exact = whole.dtype == model.dtype == torch.float32 and getattr(model, "hf_quantizer", None) is None
    largest = (TOLERANCE if exact else COARSE) * whole.abs().max()
    for row, where in ((0, ""), (1, " in a padded row")):
        off_T = (torch.cat(steps, 1)[row] - whole[row]).abs().amax(-1).where(probe.mask[row].bool(), 0)
        if off_T[:-1].max() > largest:
            raise _refused(found, f"transformers' own model sees later tokens{where}")
        if off_T[-1] > largest:
            raise _refused(found, f"transformers' own model gives other logits in cached steps{where}")


def _refused(found: Survey, reason: str) -> ModlabError:
    return ModlabError(f"{type(found.model).__name__} cannot be routed: {reason}.")


@contextmanager
def _failing_as(found: Survey, what: str) -> Iterator[None]:
    """Whatever the model's own code raises in this block is a refusal."""
    try:
        yield
    except ModlabError:
        raise
    except Exception as problem:
        raise _refused(found, f"{what}: {type(problem).__name__}: {problem}") from problem


class _Probe:
    """Two rows of tokens, the second padded on the left."""

    def __init__(self, model: Any, takes_positions: bool) -> None:
        device, last = device_of(model), (vocabulary_size(model) or 9) - 1
        self.model, self.takes_positions = model, takes_positions
        self.ids = torch.tensor([[5, 6, 7], [7, 8, 5]], device=device).clamp(max=last)
        self.mask = torch.tensor([[1, 1, 1], [0, 1, 1]], device=device)
        padding = getattr(model.config, "pad_token_id", None)
        if isinstance(padding, int) and 0 <= padding <= last:
            self.ids[1, 0] = padding
        self.positions = (self.mask.cumsum(1) - 1).clamp(min=0)

    def logits(self, start: int, stop: int, cache: Any) -> Tensor:
        """Logits [B, T', V] of the columns from `start` to `stop`, through `cache` if there is one."""
        extra = {} if cache is None else {cache_argument(self.model): cache}
        if self.takes_positions:
            extra["position_ids"] = self.positions[:, start:stop]
        if "output_router_logits" in inspect.signature(type(self.model).forward).parameters:
            # as `generate` does: a balancing loss takes the mask of all columns for that of the new tokens
            extra["output_router_logits"] = False
        output = self.model(
            input_ids=self.ids[:, start:stop],
            attention_mask=self.mask[:, :stop],
            use_cache=cache is not None,
            **extra,
        )
        logits: Tensor = output.logits if hasattr(output, "logits") else output[0]
        return logits


@contextmanager
def _watched(found: Survey) -> Iterator[None]:
    """Refuses, inside this block, a layer that runs on other positions than the input's or more than once."""
    ran: set[int] = set()

    def watching(index: int) -> Any:
        def hook(layer: nn.Module, args: Any, kwargs: Any) -> None:
            hidden = args[0] if args else kwargs[hidden_name(type(layer))]
            shape = tuple(hidden.shape)
            if (B, T) not in (shape[:2], shape[1:3]):  # parallel streams may stand in front
                reason = f"its layers run on {list(shape[:2])} positions where the input has {[B, T]} tokens"
                raise _refused(found, f"{reason}: it adds or merges some, routing has no token to decide for")
            if index in ran:
                raise _refused(found, f"its layer {index} ran twice in one forward: it loops over its layers")
            ran.add(index)

        return hook

    with ExitStack() as stack:
        for facts in found.facts:
            if not facts.refusal:
                handle = facts.layer.register_forward_pre_hook(watching(facts.index), with_kwargs=True)
                stack.callback(handle.remove)
        yield
