"""A model's weights as a checkpoint takes them: those that the run changes whole, of the others a digest.

A digest reads the bytes as integers of 64 bits and hashes the sum of each 1,024 of them: any device gives the
same one, at the speed of its memory, and a single other number another one. It tells bases apart; it is no
seal against forgers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from modlab.routing.router import is_router
from modlab.training.sharding import put, reshard, whole

INTEGER = 8  # bytes
BLOCK = 1024
BY_NAME = "by its name alone"
"""In the place of a digest."""


class Weights:
    """The weights of a model in training. All processes have to call its methods together.

    A run changes the weights that it trains. Routers, and what else conversion added, count as changed even
    where they are frozen, for their biases are shifted. Buffers, and what else modules put into their state
    (integers and scales of quantized weights), do from the moment when they are changed. But for what goes
    with a frozen weight under its name: of bitsandbytes' 4-bit weights these are scales, which it rounds each
    time that it lays a weight out for a CPU and back. They count by name alone, the weight's integers tell.

    Args:
        model: as this call was given it, nothing of a checkpoint in it yet.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._frozen: dict[str, str] = {}
        self._changed: set[str] = set()  # no parameters
        state = self._state()
        frozen = {name for name, tensor in state.items() if _is_frozen(name, tensor)}
        self._of_frozen = {name for name in state if not frozen.isdisjoint(_prefixes(name))}
        self._begun = {
            name: digest(tensor)
            for name, tensor in state.items()
            if not _is_parameter(tensor) and not is_router(name) and name not in self._of_frozen
        }

    def parted(self) -> tuple[dict[str, Tensor], dict[str, str]]:
        """What the run changes, by name, sharded tensors as they are; digests of all others, by name."""
        changed, unchanged = {}, {}
        for name, tensor in self._state().items():
            if _is_frozen(name, tensor) or name in self._of_frozen:
                unchanged[name] = self._digest(name, tensor)
                continue
            if not _is_parameter(tensor) and name not in self._changed:
                now = digest(tensor)
                if now == self._begun.get(name):
                    unchanged[name] = now
                    continue
                self._changed.add(name)
            changed[name] = tensor.detach()
        return changed, unchanged

    def differences(self, saved: Mapping[str, Tensor], unchanged: Mapping[str, str]) -> list[str]:
        """What of the weights that a run leaves alone is not as in a checkpoint, in words.

        Args:
            saved: the tensors in the checkpoint; all weights, of runs that wrote them all.
            unchanged: digests of the others.

        Raises:
            ValueError: those are as they were, but of the weights that it changes the names are others, or a
                shape or dtype.
        """
        own = self._state()
        known = saved.keys() | unchanged.keys()
        saved = {name: value for name, value in saved.items() if name not in self._of_frozen}
        base = {name for name, tensor in own.items() if not _is_trained(name, tensor)}
        found = [f"{name} is missing" for name in unchanged if name not in own]
        found += [f"{name} is new" for name in own if name in base - known]
        wanted = {name: was for name, was in unchanged.items() if name in own}
        wanted |= {n: digest(value) for n, value in saved.items() if n in own and _is_frozen(n, own[n])}
        now = {name: self._digest(name, own[name]) for name in wanted}
        found += [f"{name} is {now[name]} (was {was})" for name, was in wanted.items() if now[name] != was]
        others = [
            (name, f"{name} is {_form(own[name])} (was {_form(value)})")
            for name, value in saved.items()
            if name in own and name not in wanted and _form(own[name]) != _form(value)
        ]
        if found := found + [words for name, words in others if name in base]:
            return found
        if names := sorted(own.keys() ^ known):
            raise ValueError(f"its weights are others: {names[:3]}")
        if others:
            raise ValueError(others[0][1])
        return []

    @torch.no_grad()
    def restore(self, saved: Mapping[str, Tensor]) -> None:
        """Takes over the tensors of a checkpoint from which nothing differs."""
        for name, tensor in self._state().items():
            if name in saved and not _is_frozen(name, tensor) and name not in self._of_frozen:
                put(tensor, saved[name])
                if not _is_parameter(tensor):
                    self._changed.add(name)

    def _state(self) -> dict[str, Tensor]:
        """The model's state by name, tensors that are tied under their first name."""
        reshard(self.model)
        first: dict[Any, str] = {}
        state = self.model.state_dict(keep_vars=True)
        for name, tensor in state.items():
            # parts may be empty, wrappers of quantized numbers hold none themselves: those have no place
            place: Any = id(tensor)
            if not _is_wrapper(tensor):
                place = (tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride())
            first.setdefault(place if tensor.numel() else name, name)
        return {name: state[name] for name in first.values()}

    def _digest(self, name: str, tensor: Tensor) -> str:
        if name in self._of_frozen:
            return BY_NAME
        if not _is_frozen(name, tensor):
            return digest(tensor)
        if name not in self._frozen:  # it stays so
            self._frozen[name] = digest(tensor)
        return self._frozen[name]


@torch.no_grad()
def digest(tensor: Tensor) -> str:
    """dtype, shape and a hash of the numbers; of a sharded tensor, every process has to ask for it."""
    found = hashlib.sha256()
    for held in _held(whole(tensor.detach())):
        data = held.contiguous().flatten().view(torch.uint8)
        if data.storage_offset() % INTEGER:
            data = data.clone()
        integers = data[: len(data) // INTEGER * INTEGER].view(torch.int64)
        even = len(integers) // BLOCK * BLOCK
        sums = integers[:even].view(-1, BLOCK).sum(1)
        for part in (sums, integers[even:], data[len(integers) * INTEGER :]):
            found.update(part.cpu().numpy().tobytes())
    return f"{_form(tensor)} {found.hexdigest()[:32]}"


def _held(tensor: Tensor) -> list[Tensor]:
    """The plain tensors that hold a tensor's numbers: itself, or what it wraps (integers and scales)."""
    if not _is_wrapper(tensor):
        return [tensor]
    names, _ = tensor.__tensor_flatten__()  # type: ignore[attr-defined]
    return [held for name in names for held in _held(getattr(tensor, name))]


def _is_wrapper(tensor: Tensor) -> bool:
    """A sharded tensor, or torchao's quantized one."""
    return hasattr(tensor, "__tensor_flatten__")


def _prefixes(name: str) -> list[str]:
    """What a dotted name begins with: of a.b.c it is a and a.b."""
    return [name[:end] for end, letter in enumerate(name) if letter == "."]


def _is_parameter(tensor: Tensor) -> bool:
    return isinstance(tensor, nn.Parameter)


def _is_frozen(name: str, tensor: Tensor) -> bool:
    return _is_parameter(tensor) and not _is_trained(name, tensor)


def _is_trained(name: str, tensor: Tensor) -> bool:
    return is_router(name) or (_is_parameter(tensor) and tensor.requires_grad)


def _form(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
