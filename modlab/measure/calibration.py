"""Thresholds for a wanted keep ratio, found by real forwards."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from modlab.data.batches import Batch
from modlab.errors import ModlabError, check_count, check_number
from modlab.hf.arguments import forward_signature
from modlab.hf.model import check_model, device_of, eval_mode
from modlab.hf.ranks import over_ranks
from modlab.integrations.fsdp import is_sharded
from modlab.measure.pieces import batches_for
from modlab.routing.kv_saving import known_of
from modlab.routing.record import by_gate, kept_share
from modlab.routing.router import Router
from modlab.routing.state import (
    gated_routing_of,
    record_routing,
    routing_of,
    set_threshold,
    thresholds_restored_on_error,
)
from modlab.warn import warn

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Calibration(dict[int, float]):
    """Thresholds by layer that `calibrate` found and set, with the keep ratios it then measured.

    Attributes:
        keep_ratio: mean over routed layers, on the batches given.
        keep_ratio_by_layer: each routed layer's.
    """

    keep_ratio: float
    keep_ratio_by_layer: dict[int, float]

    def __repr__(self) -> str:
        return f"Calibration({dict(self)}, keep_ratio={self.keep_ratio:.4f})"


@dataclass
class _Gates:
    """Gates of one pass over the batches: what could be kept or not by moving p.

    Attributes:
        free: by layer, sorted descending, fp32: gates of real tokens that are not always kept.
        real: real tokens.
        forced: real tokens that are kept whatever p is (the first ones of each row).
        kept: by layer, tokens kept.
    """

    free: dict[int, torch.Tensor]
    real: int
    forced: int
    kept: dict[int, float]

    def free_share(self, keep_ratio: float) -> float:
        """Share of the gates in `free` that have to pass for `keep_ratio` of all tokens to be kept."""
        return (keep_ratio * self.real - self.forced) / max(self.real - self.forced, 1)

    @property
    def by_layer(self) -> dict[int, float]:
        return {layer: n / self.real for layer, n in self.kept.items()}

    @property
    def ratio(self) -> float:
        return statistics.fmean(self.by_layer.values())


def _inputs(batch: Batch) -> Batch:
    """Without labels: they say what is predicted, keep ratios count what is read."""
    return {name: value for name, value in batch.items() if name != "labels"}


def _read_gates(model: Any, batches: Sequence[Batch], accelerator: Any) -> _Gates:
    routing = routing_of(model)
    device = device_of(model)
    # the head's logits are not needed; FSDP2 gathers the embeddings in the whole model's forward alone
    run, short = (model, _one_logit(model)) if is_sharded(model) else (model.get_decoder(), {})

    def read(batch: Batch) -> _Gates:
        with eval_mode(model), torch.no_grad(), record_routing(model) as recording:
            run(**{k: v.to(device) for k, v in batch.items()}, use_cache=False, **short)
        (step,) = recording.steps
        always = step.real & (step.position_ids < routing.config.keep_first)
        gates = {i: by_gate(step.gate[i])[step.real & ~always].flatten() for i in routing.layers}
        return _Gates(
            {i: free if accelerator is None else free.cpu() for i, free in gates.items()},
            int(step.real.sum()),
            int(always.sum()),
            {i: float(kept_share(step.keep[i]).sum()) for i in routing.layers},
        )

    found = over_ranks(read, batches, accelerator)
    return _Gates(
        {i: torch.cat([one.free[i] for one in found]).sort(descending=True).values for i in routing.layers},
        sum(one.real for one in found),
        sum(one.forced for one in found),
        {i: sum(one.kept[i] for one in found) for i in routing.layers},
    )


def _one_logit(model: Any) -> dict[str, int]:
    """Asks a forward for the logits of the last token alone, where it can be asked."""
    model_class: Any = type(model)
    known = "logits_to_keep" in forward_signature(model_class).parameters
    return {"logits_to_keep": 1} if known else {}


def _threshold_keeping(gates: torch.Tensor, wanted: float) -> float:
    """A p that keeps the `wanted` highest of `gates` (descending; ties are kept or skipped together)."""
    count = min(max(round(wanted), 0), gates.numel())
    above = 1.0 if count == 0 else float(gates[count - 1])
    below = 0.0 if count == gates.numel() else float(gates[count])
    return min(max((above + below) / 2, 1e-6), 1 - 1e-6)


def calibrate(
    model: PreTrainedModel,
    batches: Any,
    *,
    keep_ratio: float,
    per_layer: bool = False,
    tolerance: float = 0.01,
    tokenizer: Any = None,
    max_passes: int = 40,
    accelerator: Any = None,
) -> Calibration:
    """Finds the thresholds that keep a wanted share of tokens on `batches`, sets them, and returns them.

    Every candidate is checked by real forwards, because what one layer skips changes the gates of the layers
    after it.

    Args:
        model: a converted model.
        batches: token batches (or texts with `tokenizer`), as `as_batches` takes them: text like that of
        later use.
        keep_ratio: wanted share in (0, 1): mean over routed layers of kept / real tokens, first tokens
        included.
        per_layer: False: one p for all layers, layers may differ in what they keep. True: each layer keeps
            this share, set from the first routed layer to the last.
        tolerance: how far the share may be off, mean (one p) or of each layer (`per_layer`).
        tokenizer: for texts.
        max_passes: passes over the batches before giving up (one p only).
        accelerator: an `accelerate.Accelerator`: its processes share the batches, and each sets the same
            thresholds. All have to pass the same arguments.

    Returns:
        `{layer: p}` for all routed layers; attributes `keep_ratio` and `keep_ratio_by_layer` are as measured.

    Raises:
        ModlabError: `keep_ratio` outside (0, 1), or not reachable on these batches; the thresholds are then
            as before.
    """
    check_model(model)
    routing = gated_routing_of(model)
    if not 0.0 < check_number("keep_ratio", keep_ratio) < 1.0:
        raise ModlabError(
            f"keep_ratio={keep_ratio} is not in (0, 1); for example 0.25 keeps a quarter of the tokens."
        )
    if check_number("tolerance", tolerance) <= 0:
        raise ModlabError(f"tolerance={tolerance}: a share above 0, such as 0.01.")
    check_count("max_passes", max_passes)
    _check_trained(model, keep_ratio, tolerance)
    pieces = [_inputs(batch) for batch in batches_for(model, batches, tokenizer)]
    search = _calibrate_layers if per_layer else _calibrate_global
    with thresholds_restored_on_error(model):
        gates = search(model, pieces, keep_ratio, tolerance, max_passes, accelerator)
    result = Calibration(routing.thresholds)
    result.keep_ratio, result.keep_ratio_by_layer = gates.ratio, gates.by_layer
    if warning := known_of(model).warning_for(statistics.median(result.values())):
        warn(warning)
    return result


_ALIKE = (
    "Gates that are all alike, as right after conversion, cannot be split: train the routers first "
    "(modlab.train), use more tokens, or allow a larger tolerance."
)


@torch.no_grad()
def _check_trained(model: Any, keep_ratio: float, tolerance: float) -> None:
    """Refuses, before any pass over the batches, routers that say the same of every token.

    Not where FSDP2 has cut them, whose parts compute nothing outside the model's forward: the search itself
    fails then, after its passes.
    """
    if is_sharded(model):
        return
    routers = [module for module in model.modules() if isinstance(module, Router)]
    for router in routers:
        weight = router.weight
        if weight.is_meta:
            return
        D = weight.shape[-1]
        states = torch.randn(1, 8, D, generator=torch.Generator().manual_seed(0)).to(weight.device)
        gates = torch.sigmoid(router(states))
        if not torch.equal(gates, gates[:, :1].expand_as(gates)):
            return
    if routers and keep_ratio + tolerance < 1:
        raise ModlabError(
            f"keep ratio {keep_ratio} is not reachable: the routers are as conversion made them and say the "
            "same of every token.\n" + _ALIKE
        )


def _check_reachable(gates: _Gates, keep_ratio: float, tolerance: float, keep_first: int) -> None:
    least = gates.forced / gates.real
    if keep_ratio + tolerance < least:
        raise ModlabError(
            f"keep ratio {keep_ratio} is not reachable on these batches: the first {keep_first} tokens of a "
            f"row are always kept, which is {least:.3f} of all tokens.\nUse longer rows, a higher "
            "keep_ratio, or convert with a smaller keep_first."
        )


def _calibrate_global(
    model: Any,
    batches: Sequence[Batch],
    keep_ratio: float,
    tolerance: float,
    max_passes: int,
    accelerator: Any,
) -> _Gates:
    """One p for all layers: bisection on p, each step aimed by the gates of the pass before."""
    gates = _read_gates(model, batches, accelerator)
    _check_reachable(gates, keep_ratio, tolerance, routing_of(model).config.keep_first)
    low, high = (0.0, 1.0), (1.0, gates.forced / gates.real)  # (p, ratio there): keeps too much, too little
    for turn in range(max_passes):
        pooled = torch.cat(list(gates.free.values())).sort(descending=True).values
        p = _threshold_keeping(pooled, gates.free_share(keep_ratio) * pooled.numel())
        if turn % 3 == 2 or not low[0] < p < high[0]:  # an aimed step may creep; halving the bracket cannot
            p = (low[0] + high[0]) / 2
        if not low[0] < p < high[0]:
            break
        set_threshold(model, p)
        gates = _read_gates(model, batches, accelerator)
        if abs(gates.ratio - keep_ratio) <= tolerance:
            return gates
        if gates.ratio > keep_ratio:
            low = (p, gates.ratio)
        else:
            high = (p, gates.ratio)
    raise ModlabError(
        f"keep ratio {keep_ratio} is not reachable within {tolerance} on these batches with one threshold: "
        f"p={low[0]:.6g} keeps {low[1]:.3f} and p={high[0]:.6g} keeps {high[1]:.3f}.\n" + _ALIKE
    )


def _calibrate_layers(
    model: Any,
    batches: Sequence[Batch],
    keep_ratio: float,
    tolerance: float,
    max_passes: int,
    accelerator: Any,
) -> _Gates:
    """Each layer its own p: the quantile of its gates, given the thresholds already set before it."""
    routing = routing_of(model)
    gates = _read_gates(model, batches, accelerator)
    _check_reachable(gates, keep_ratio, tolerance, routing.config.keep_first)
    for index, layer in enumerate(routing.layers):
        if index:
            gates = _read_gates(model, batches, accelerator)
        free = gates.free[layer]
        p = _threshold_keeping(free, gates.free_share(keep_ratio) * free.numel())
        set_threshold(model, p, layers=[layer])
    gates = _read_gates(model, batches, accelerator)
    for layer, got in gates.by_layer.items():
        if abs(got - keep_ratio) > tolerance:
            raise ModlabError(
                f"keep ratio {keep_ratio} is not reachable within {tolerance} in layer {layer}: its best "
                f"threshold p={routing.thresholds[layer]:.6g} keeps {got:.3f}.\n" + _ALIKE
            )
    return gates
