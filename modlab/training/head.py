"""What a causal LM does behind its stack of layers, for hidden states that are given: logits in pieces.

The model's own forward runs, with a stack that returns what it is handed: scales, caps and norms of the
logits are the model's own, whatever its type. Nothing of the model is changed: the forward is given an object
that answers for it.

Shape letters: B rows, T tokens, S tokens in one line, D model dim, V vocabulary.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from modlab.errors import ModlabError
from modlab.hf.anatomy import decoder_of
from modlab.hf.arguments import forward_signature
from modlab.hf.names import CACHE_ARGUMENTS

TOLERANCE = 2e-2
"""Of logits computed here against the model's, in units of their spread: bf16 rounds."""


class Head:
    """Logits of hidden states, as `model` computes them.

    Args:
        model: a causal LM, dense or converted, without wrappers.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.dense_class: Any = getattr(type(model), "dense_class", type(model))
        self.stacks = _stacks(model)
        self.output: Any = None
        self.checked = False

    @contextlib.contextmanager
    def noting(self) -> Iterator[None]:
        """Inside this block a forward of the model leaves its last hidden states in `states`."""
        self.output = None

        def note(_module: nn.Module, _args: Any, output: Any) -> None:
            self.output = output  # the outermost that is called comes last

        handles = [module.register_forward_hook(note) for _, module in self.stacks]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @property
    def states(self) -> Tensor:
        """Hidden states [B, T, D] that the latest forward inside `noting` computed, what the head reads."""
        output = self.output
        found: Tensor = output[0] if isinstance(output, tuple) else output.last_hidden_state
        return found

    @property
    def short(self) -> dict[str, Any]:
        """Arguments for a forward whose logits nobody needs."""
        known = forward_signature(self.dense_class).parameters
        return {"logits_to_keep": 1} if "logits_to_keep" in known else {}

    def __call__(self, states_SD: Tensor) -> Tensor:
        """Logits [S, V], with gradient to the states."""
        behind: Any = _Behind(self.model, self.stacks[0][0], _Stub(self, states_SD[None]))
        known = forward_signature(self.dense_class).parameters
        arguments: dict[str, Any] = {"use_cache": False, "return_dict": True, "output_router_logits": False}
        arguments = {name: value for name, value in arguments.items() if name in known}
        arguments |= {name: None for name in CACHE_ARGUMENTS if name in known}
        ids = torch.zeros(1, len(states_SD), dtype=torch.long, device=states_SD.device)
        logits: Tensor = self.dense_class.forward(behind, input_ids=ids, **arguments).logits
        return logits[0]

    @torch.no_grad()
    def check(self, logits_BTV: Tensor) -> None:
        """Once: that these logits, of the latest forward inside `noting`, are those of its hidden states.

        Raises:
            ModlabError: they are not.
        """
        if self.checked:
            return
        wanted = logits_BTV[:, -1].float()
        found = self(self.states[:, -1]).float()
        if (found - wanted).abs().max() > TOLERANCE * wanted.std().clamp(min=1e-6):
            raise ModlabError(
                f"{type(self.model).__name__} computes its logits from more than its last hidden states: "
                "objective='distil' cannot read them in pieces. Use objective='target' with kl=1.0 and a "
                "teacher."
            )
        self.checked = True


def _stacks(model: Any) -> list[tuple[str, nn.Module]]:
    """The decoder with what is around it inside the model, outermost first: (attribute's name, module)."""
    decoder, found, at = decoder_of(model), [], model
    while at is not decoder:
        name, at = next(
            (name, child) for name, child in at.named_children() if any(m is decoder for m in child.modules())
        )
        found.append((name, at))
    return found


class _Behind:
    """The model to its own forward, but for the stack."""

    def __init__(self, model: Any, name: str, stub: Any) -> None:
        self.__dict__["_model"] = model
        self.__dict__[name] = stub

    @property  # type: ignore[misc]
    def __class__(self) -> Any:  # super() in a forward asks for it
        return type(self._model)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


class _Stub:
    """The stack, or what is around it: returns hidden states [1, S, D] whatever it is called with."""

    def __init__(self, head: Head, states_1SD: Tensor, depth: int = 0) -> None:
        self.__dict__.update(head=head, states_1SD=states_1SD, depth=depth)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        known = self.head.output
        if isinstance(known, tuple):
            return (self.states_1SD,)
        return type(known)(last_hidden_state=self.states_1SD)

    def __getattr__(self, name: str) -> Any:
        stacks, depth = self.head.stacks, self.depth + 1
        if depth < len(stacks) and stacks[depth][0] == name:
            return _Stub(self.head, self.states_1SD, depth)  # OPT calls model.decoder
        return getattr(stacks[self.depth][1], name)
