"""torch.compile for the layers of a converted model, each by itself, while it is trained.

The model as a whole cannot be compiled: how many tokens a routed layer keeps shapes its tensors, and is read
on the host. The layers' own forwards can. All layers of one class share one compiled function; packed steps
make a second one, with a dynamic number of tokens.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from modlab.execution.routed import RoutedModule
from modlab.hf.anatomy import decoder_layers


class LayerCompilation:
    """Switches compiled layers of a converted model on and off; off until `on` is called."""

    def __init__(self, model: Any) -> None:
        self.routing = model.mod
        self.dense: list[nn.Module] = [
            layer for layer in decoder_layers(model) if not isinstance(layer, RoutedModule)
        ]

    def on(self) -> None:
        """From here on the layers run compiled."""
        self.routing.compile_layers = True
        for layer in self.dense:
            layer.compile()

    def off(self) -> None:
        """From here on they run as they are. What was compiled is kept for the next `on`."""
        self.routing.compile_layers = False
        for layer in self.dense:
            layer._compiled_call_impl = None
