"""Static removal, the control: whole layers or attentions that no token runs, chosen greedily by KL.

What is removed is silenced by hooks, so that any architecture has it; its operations are counted as not done
(`compute.removed`), not measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.depth.model import head, states
from modlab.hf.anatomy import attention_name, decoder_layers
from modlab.training.objectives import kl_to_teacher


def remove(model: Any, what: str, indices: list[int]) -> None:
    """Silences these layers (or their attentions) of a dense model, in place, until its `removed_by` hooks
    are removed."""
    layers = decoder_layers(model)
    hooks = []
    for index in indices:
        layer = layers[index]
        if what == "layer":
            hooks.append(layer.register_forward_hook(_pass_by, with_kwargs=True))
        else:
            hooks.append(layer.get_submodule(attention_name(layer) or "").register_forward_hook(_nothing))
    model.removed_by = [*getattr(model, "removed_by", []), *hooks]


def restore(model: Any) -> None:
    """The dense model again."""
    for hook in model.__dict__.pop("removed_by", []):
        hook.remove()


@torch.no_grad()
def greedy(model: Any, what: str, count: int, rows_BT: Tensor, known: Sequence[int] = ()) -> list[int]:
    """The layers without which, one after another, the KL to the dense model on `rows_BT` grows least;
    `known` are the first of them."""
    told = states(model, rows_BT) @ head(model).T
    real = torch.ones_like(rows_BT).bool()
    out: list[int] = list(known)
    while len(out) < count:
        found = []
        for index in range(1, len(decoder_layers(model)) - 1):
            if index in out:
                continue
            remove(model, what, [*out, index])
            said = states(model, rows_BT) @ head(model).T
            found.append((kl_to_teacher(said, told, real).item(), index))
            restore(model)
        out.append(min(found)[1])
    return out


def forget(model: Any) -> None:
    """As `restore`, of a copy of a model: its handles are the original's."""
    model.__dict__.pop("removed_by", None)
    for module in model.modules():
        for key in [key for key, hook in module._forward_hooks.items() if hook in (_pass_by, _nothing)]:
            del module._forward_hooks[key]
            module._forward_hooks_with_kwargs.pop(key, None)


def _pass_by(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    given = args[0] if args else kwargs["hidden_states"]
    return (given, *output[1:]) if isinstance(output, tuple) else given


def _nothing(module: Any, args: Any, output: Any) -> Any:
    return (output[0] * 0, *output[1:]) if isinstance(output, tuple) else output * 0
