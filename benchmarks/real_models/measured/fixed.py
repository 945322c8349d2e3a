"""Controls at the gates' own bytes, run as the product runs a model: `routing_override` says who is kept.

Chance, chance in the gates' shares, whole heads, whole layers, window and first tokens (`controls.py`), and
of kvpress's training-free methods the one that needs keys alone: those of smallest norm stay (Knorm). Scores
that read queries (SnapKV, expected attention) are not here: an override sees no queries.

Shape letters: B rows, T tokens, G gates of a layer, H head dim, L layers.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor

from benchmarks.real_models.controls import controls
from benchmarks.real_models.decoder import KeepRule
from benchmarks.real_models.evaluate import older_share
from benchmarks.real_models.measured.product import Product
from modlab.errors import ModlabError
from modlab.hf.anatomy import decoder_layers
from modlab.routing.record import by_gate
from modlab.routing.state import routing_override, set_keep_recent, thresholds_restored

NAMES = (
    "chance",
    "chance per layer",
    "chance per head",
    "whole heads",
    "whole layers",
    "window alone",
    "key norm",
)

Override = Callable[[int, Tensor, Tensor], Tensor]


@contextlib.contextmanager
def control(product: Product, name: str, gates: dict[str, Any], T: int) -> Iterator[None]:
    """Inside this block the control decides, at the stored keys of `gates`.

    Args:
        gates: the record of the gates at a setting: `keys` stored of all, and `keep_by_gate`.
        T: tokens of a row.

    Raises:
        ModlabError: there is no such control for gates of this kind.
    """
    ratio = 1 / gates["keys"]
    if name == "key norm":
        share = older_share(ratio, T, product.window, product.first)
        smallest = SmallestKeys(product, share)
        with smallest.watching(), routing_override(product.model, smallest):
            yield
        return
    found = {
        n: (w, rule)
        for n, w, rule in controls(gates["keep_by_gate"], ratio, T, product.window, product.first)
    }
    if name not in found:
        raise ModlabError(f"no control {name!r} for these gates: there are {', '.join(found)}.")
    window, rule = found[name]
    with thresholds_restored(product.model), routing_override(product.model, ruled(product, rule)):
        set_keep_recent(product.model, window)
        yield


def ruled(product: Product, rule: KeepRule) -> Override:
    """The rule as `routing_override` takes it; first tokens are kept."""
    places = {layer: place for place, layer in enumerate(product.routing.layers)}

    def keep(layer: int, gate: Tensor, position_BT: Tensor) -> Tensor:
        kept_BTG = rule(places[layer], by_gate(gate).transpose(1, 2)).transpose(1, 2)
        return (kept_BTG | (position_BT < product.first)[..., None]).view(gate.shape)

    return keep


class SmallestKeys:
    """Keeps of each KV head the share of keys with the smallest norm, among those neither first nor recent.

    A hook on each layer notes what goes in; its keys are made of that before the layer decides. (Rotation by
    position leaves norms alone.)
    """

    def __init__(self, product: Product, share: float) -> None:
        self.product, self.share = product, share
        self.layers = decoder_layers(product.model)
        self.entering: dict[int, Tensor] = {}

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Inside this block the states that enter layers are known."""
        hooks = [
            self.layers[i].register_forward_pre_hook(functools.partial(self._note, i), with_kwargs=True)
            for i in self.product.routing.layers
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _note(self, index: int, layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.entering[index] = args[0] if args else kwargs["hidden_states"]

    def __call__(self, index: int, gate: Tensor, position_BT: Tensor) -> Tensor:
        layer: Any = self.layers[index]
        keys_BTK = layer.self_attn.k_proj(layer.input_layernorm(self.entering.pop(index)))
        norm_BTG = keys_BTK.unflatten(-1, (by_gate(gate).shape[-1], -1)).float().norm(dim=-1)
        first, recent = self.product.first, self.product.window
        older = norm_BTG[:, first : norm_BTG.shape[1] - recent]
        kept_BTG = norm_BTG <= older.quantile(self.share, dim=1, keepdim=True)
        return (kept_BTG | (position_BT < first)[..., None]).view(gate.shape)
