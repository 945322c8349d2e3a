"""FSDP2 (`torch.distributed.fsdp.fully_shard`): routers are sharded in groups of their own, in fp32.

A parameter group of FSDP2 has one dtype, and fp32 routers lie in layers of bf16 weights; under a mixed
precision policy it would also give them bf16 weights to decide with. So before FSDP2 sets itself up, in the
first forward, each router is taken out of the group that it was sharded with. Its shards stay the same
objects: an optimizer may know them already.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch import distributed, nn

from modlab.errors import ModlabError
from modlab.routing.router import ROUTER

FIRST_LOADS = "FSDP_CPU_RAM_EFFICIENT_LOADING"
"""accelerate's variable, "true" unless its launcher is told otherwise: transformers 5.17 then loads a
checkpoint in the first process of a machine alone, and leaves zeros in all others."""


_one_loads = threading.RLock()  # the variable is the whole process's


@contextlib.contextmanager
def every_process_loads() -> Iterator[None]:
    """Inside, transformers loads a checkpoint in each process: conversion looks at layers by running them.
    The host holds it once: weights in the checkpoint's dtype are its mapped pages, which processes share.
    Threads of a process that was launched with FSDP load one after another."""
    if FIRST_LOADS not in os.environ:
        yield
        return
    with _one_loads:
        before = os.environ[FIRST_LOADS]
        os.environ[FIRST_LOADS] = "false"
        try:
            yield
        finally:
            os.environ[FIRST_LOADS] = before


def give_groups(model: nn.Module) -> None:
    """Each router that is sharded with other modules gets a group of its own; costs nothing where none is.

    Raises:
        ModlabError: the model was sharded before it was converted, or this version of torch groups parameters
            in another way.
    """
    if not (distributed.is_available() and distributed.is_initialized()):
        return
    groups = list(_all_groups(model))
    if not groups:
        return
    owner = {module: router for router in routers_of(model) for module in router.modules()}
    try:
        for state, group in groups:
            inside = (owner.get(p._module_info.module) for p in group.fsdp_params)
            for router in dict.fromkeys(router for router in inside if router is not None):
                _take_out(state, group, router)
    except (AttributeError, TypeError, ImportError) as error:
        raise ModlabError(
            f"FSDP2 of torch {torch.__version__} gives routers no group of their own ({error}): call "
            "fully_shard(layer.mod_router) for each routed layer before fully_shard(layer)."
        ) from error


def routers_of(model: nn.Module) -> list[nn.Module]:
    """The modules that decide."""
    return [module for name, module in model.named_modules() if name.rpartition(".")[2] == ROUTER]


def is_sharded(model: nn.Module) -> bool:
    """Whether FSDP2 has sharded the model or any of its modules."""
    return any(hasattr(type(module), "_get_fsdp_state") for module in model.modules())


def reshard_routers(model: nn.Module) -> None:
    """Each process holds its parts of the routers that got groups of their own; `reshard` of FSDP2's modules
    does not reach them."""
    for module in model.modules():
        state: Any = getattr(module, "mod_fsdp_state", None)
        for group in _groups(state) if state is not None else []:
            group.reshard()


def _all_groups(model: nn.Module) -> Iterator[tuple[Any, Any]]:
    """States of FSDP2 and their groups."""
    seen = set()
    for module in model.modules():
        find = getattr(type(module), "_get_fsdp_state", None)
        state = find(module) if find is not None else None
        if state is None or state in seen:
            continue
        seen.add(state)
        for group in _groups(state):
            if group is not None:
                yield state, group


def _groups(state: Any) -> list[Any]:
    groups = getattr(state, "_fsdp_param_groups", None)
    return [state._fsdp_param_group] if groups is None else list(groups)  # torch 2.11 has one


def _take_out(state: Any, group: Any, router: nn.Module) -> None:
    from torch.distributed.fsdp import MixedPrecisionPolicy
    from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup
    from torch.distributed.fsdp._fully_shard._fsdp_state import FSDPState

    inside = set(router.modules())
    own = [p for p in group.fsdp_params if p._module_info.module in inside]
    rest = [p for p in group.fsdp_params if p._module_info.module not in inside]
    if not own or not rest:
        return
    if state._is_root is not None:
        raise ModlabError("the routers were sharded in a group that has run before: convert, then shard.")
    policy = MixedPrecisionPolicy(torch.float32, torch.float32, cast_forward_inputs=False)
    settings = (group.mesh_info, group.post_forward_mesh_info, group.device)
    alone = FSDPParamGroup([], (router,), *settings, None, policy, group.offload_policy)
    group.fsdp_params, alone.fsdp_params = rest, own
    for parameter in own:
        parameter.mp_policy = policy
    router.register_forward_hook(_as_no_view)  # before FSDP2's own, which wants no view
    router_state = FSDPState()
    router_state.init((router,), state._device, policy, state._auto_reshard_after_forward)
    if hasattr(router_state, "_fsdp_param_groups"):
        router_state._fsdp_param_groups = [alone]
    else:  # torch 2.11
        router_state._fsdp_param_group = alone  # type: ignore[misc]
    router.mod_fsdp_state = router_state  # type: ignore[assignment]  # torch refers to it weakly


def _as_no_view(module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
    return output.clone()
