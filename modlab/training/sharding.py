"""A model in training whose weights are sharded over the processes, by FSDP2 (`torch.distributed.fsdp`).

Sharded weights are `DTensor`s. What a run writes is whole: every process takes part in gathering it, tensor
by tensor, so that no device holds more than one whole tensor more than it trains with.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from modlab.errors import ModlabError
from modlab.hf.anatomy import decoder_layers
from modlab.integrations.fsdp import give_groups, is_sharded, reshard_routers, routers_of

if TYPE_CHECKING:
    from modlab.training.processes import Processes

FIRST = 16
"""Numbers of each weight by which processes tell whether they hold the same model."""


def shard(model: Any, processes: Processes, bf16: bool) -> None:
    """Shards weights layer by layer, with accelerate's settings; a model that is sharded stays as it is.

    Routers that are trained alone stay whole in each process: a few hundred kB, whose groups would be two of
    five that a step gathers and all that it scatters. `Step` averages their gradients. Otherwise they get
    groups of their own, in fp32 (`integrations/fsdp.py`): at once, since around adapters FSDP2 begins with
    PEFT's forward, before the model's own.

    Args:
        model: whole, in each process the same; on the CPU it is never whole on a GPU.
        processes: launched with FSDP2.
        bf16: weights are gathered in bf16 (gradients are reduced in fp32).

    Raises:
        ModlabError: activation checkpointing is wanted of a model that has none; an earlier run has left the
            routers of this model whole; the processes hold different weights.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    trained = [p for p in model.parameters() if p.requires_grad]
    if is_sharded(model):
        if len({is_part(p) for p in trained}) > 1:
            raise ModlabError(
                "an earlier run has sharded this model and trained its routers alone, which stayed whole in "
                "each process: to train other weights too, load what it saved into a new model."
            )
        return
    if not processes.agree([_beginning(p) for p in model.parameters()]):
        raise ModlabError(
            f"the processes hold different weights of this {type(model).__name__}, and FSDP2 would take a "
            "part of each. Under --fsdp_cpu_ram_efficient_loading, accelerate's default, the first process "
            "of a machine may load a checkpoint alone: say --fsdp_cpu_ram_efficient_loading false, or load "
            "by modlab.load, which loads in all. Routers that each process has fitted on another kind of CPU "
            "differ as well: fit them once (modlab fit) and train from there."
        )
    routers = {p for router in routers_of(model) for p in router.parameters()}
    alone = routers if routers.issuperset(trained) else set()
    for parameter in alone:
        parameter.data = parameter.data.to(processes.device)
    plugin = processes.plugin
    if plugin.activation_checkpointing:
        _checkpoint_activations(model)
    policy = MixedPrecisionPolicy()
    if bf16:
        policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    settings = {"mp_policy": policy, "offload_policy": plugin.cpu_offload, "ignored_params": alone}
    for layer in decoder_layers(model):
        fully_shard(layer, reshard_after_forward=plugin.reshard_after_forward, **settings)
    fully_shard(model, **settings)
    give_groups(model)


def _beginning(weight: Tensor) -> list[int] | None:
    """The bytes of a weight's first numbers, which tell processes' weights apart: loaded ones from zeros,
    seeds from each other. None of those on the meta device, and of what wraps other tensors (quantized
    weights)."""
    if weight.is_meta or hasattr(weight, "__tensor_flatten__"):
        return None
    first = weight.detach()
    while first.dim() > 1 and len(first):
        first = first[0]
    found: list[int] = first.reshape(-1)[:FIRST].cpu().contiguous().view(torch.uint8).tolist()
    return found


def _checkpoint_activations(model: Any) -> None:
    if not getattr(model, "supports_gradient_checkpointing", False):
        raise ModlabError(
            f"accelerate was launched with activation checkpointing, which {type(model).__name__} does not "
            "have: leave --fsdp_activation_checkpointing out."
        )
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    enable({"use_reentrant": False})


def reshard(model: Any) -> None:
    """Every process holds its parts alone: after a forward FSDP2 leaves the model's ends whole, with
    `reshard_after_forward=False` all of it, under other parameters than those that an optimiser knows. Costs
    nothing where no weight is sharded."""
    for module in model.modules():
        if hasattr(type(module), "_get_fsdp_state"):
            module.reshard()
    reshard_routers(model)


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor; where it is sharded, every process has to ask for it."""
    if hasattr(tensor, "full_tensor"):
        full: Tensor = tensor.full_tensor()
        return full
    return tensor


@torch.no_grad()
def put(target: Tensor, value: Tensor) -> None:
    """Copies a whole tensor into one that may be sharded: every process its part."""
    target.copy_(like(target, value))


def like(target: Tensor, value: Tensor) -> Tensor:
    """A whole tensor, cut as `target` is."""
    if not hasattr(target, "full_tensor"):
        return value
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(target, DTensor)
    value = value.to(target.device)
    return distribute_tensor(value, target.device_mesh, target.placements, src_data_rank=None)


def gathered(tensors: dict[str, Tensor], keep: bool) -> dict[str, Tensor]:
    """All of the tensors on the CPU; every process has to take part.

    Args:
        tensors: by name, the same names in the same order in all processes.
        keep: whether this process wants them; nothing is returned otherwise.
    """
    found = {}
    for name, tensor in tensors.items():
        full = whole(tensor.detach())
        if keep:
            found[name] = full.cpu().contiguous() if is_part(tensor) else full.contiguous()
    return found


def is_part(tensor: Tensor) -> bool:
    """Whether this process holds a part of the tensor only."""
    return hasattr(tensor, "full_tensor")


def whole_state(model: nn.Module, dtypes: dict[str, torch.dtype], keep: bool) -> dict[str, Tensor]:
    """A sharded model's state as `save_pretrained` takes it; every process has to take part.

    Args:
        dtypes: of the weights before training, by name.
        keep: whether this process wants it.
    """
    state = model.state_dict(keep_vars=True)
    found: dict[str, Tensor] = {}
    first: dict[int, str] = {}
    for name, tensor in state.items():
        if id(tensor) in first:  # tied: one tensor under both names, as transformers expects it
            if keep:
                found[name] = found[first[id(tensor)]]
            continue
        first[id(tensor)] = name
        found |= gathered({name: tensor}, keep)
        if keep:
            found[name] = found[name].to(dtypes.get(name, found[name].dtype))
    return found
