"""Notices that parameters learn in a loop that is not the package's.

`modlab.train` and `MoDCallback` say so themselves. Any other loop only shows in the parameters: a forward in
training notes some values of each that can learn, a later one finds others there. (Version counters do
not tell: fused optimisers leave them alone.)
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from modlab.routing.router import is_router
from modlab.warn import warn

if TYPE_CHECKING:
    from modlab.routing.state import Routing
    from modlab.routing.trained import Trained

ENTRIES = 16
"""Of each parameter; a step moves all of them, or nearly."""

FORGOTTEN = (
    "the routers of this model learn in a loop that is not modlab.train's: its thresholds by KV saving "
    "(modlab.set_kv_saving) were those of the routers before, and are forgotten. "
    "modlab.calibrate(model, texts, keep_ratio=...) finds the threshold of a keep ratio."
)


class Learning:
    """Finds out which parameters have learned since the latest forward that they could learn from.

    Attributes:
        noted: some values of each parameter in that forward, by name: of those whose learning would change
            what is known. Forwards that teach nothing (a reference, an evaluation) may come before the step,
            so a note stays until its parameter differs.
        origin: the routing's `source` and `trained` at that time. If others have been written since, they are
            about the routers of now.
    """

    def __init__(self) -> None:
        self.noted: dict[str, Tensor] = {}
        self.origin: tuple[str, Trained | None] = ("", None)

    def see(self, routing: Routing, decoder: nn.Module) -> None:
        """In front of a forward: what is known of the routers is forgotten if they differ from those noted,
        and the base counts as trained if it does."""
        learns = decoder.training and torch.is_grad_enabled()
        known = bool(routing.source or routing.trained)
        if not self.noted and not (learns and (known or not routing.base_trained)):
            return
        now = dict(decoder.named_parameters())
        moved = {name for name, before in self.noted.items() if name in now and _differs(before, now[name])}
        self.noted = {name: before for name, before in self.noted.items() if name not in moved}
        origin = (routing.source, routing.trained)
        if known and origin == self.origin and any(map(is_router, moved)):
            if routing.trained:
                warn(FORGOTTEN)
            routing.forget_origin()
            known = False
        routing.base_trained |= not all(map(is_router, moved))
        if learns:
            self.origin = (routing.source, routing.trained)
            self.noted = {
                name: _some(parameter).clone()
                for name, parameter in now.items()
                if _can_tell(name, parameter) and (known if is_router(name) else not routing.base_trained)
            }


def _can_tell(name: str, parameter: nn.Parameter) -> bool:
    """Adapters are no part of the base."""
    return parameter.requires_grad and _is_here(parameter) and "lora_" not in name


def _is_here(parameter: nn.Parameter) -> bool:
    """Whether this process can read it in front of a forward. To compare sharded ones all processes would
    have to; offloaded ones are on the meta device until their layer runs."""
    return type(parameter.data) is Tensor and not parameter.is_meta


def _some(parameter: Tensor) -> Tensor:
    return parameter.detach().flatten()[:ENTRIES]


def _differs(before: Tensor, parameter: nn.Parameter) -> bool:
    """Whether values that were noted are others now; of a parameter that has been cast, offloaded or sharded
    since, nothing is known."""
    if not _is_here(parameter):
        return False
    now = _some(parameter)
    comparable = now.dtype == before.dtype and now.shape == before.shape
    return comparable and not torch.equal(before.to(now.device), now)
