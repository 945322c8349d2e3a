"""What ranks share: weights, and work whose results are those of one process."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def over_ranks(
    work: Callable[[Item], Result],
    items: Iterable[Item],
    accelerator: Any = None,
    *,
    bar: Any = None,
    size: Callable[[Item], int] = lambda item: 1,
) -> list[Result]:
    """`work` of each item, in their order, on every process; item i is done by process i % processes.

    Where the last round has too few items, the processes left over do one of them again, and that counts for
    nothing: sharded models (FSDP2) run on all processes together. Results travel as pickles once, at the end:
    tensors belong on the CPU.

    Args:
        work: what is done with an item, for example `lambda batch: model.generate(**batch).cpu()`.
        items: the same ones on every process.
        accelerator: an `accelerate.Accelerator`; None for this process alone.
        bar: a tqdm bar, which the main process moves.
        size: how far an item moves it.
    """
    from accelerate.utils import gather_object

    world, rank = (accelerator.num_processes, accelerator.process_index) if accelerator else (1, 0)
    wanted, own = list(items), []
    for first in range(0, len(wanted), world):
        group = wanted[first : first + world]
        done = work(group[rank] if rank < len(group) else group[0])
        if rank < len(group):
            own.append(done)
        if bar is not None and rank == 0:
            bar.update(sum(map(size, group)))
    if world == 1:
        return own
    by_rank: list[list[Result]] = gather_object([own])
    return [by_rank[i % world][i // world] for i in range(len(wanted))]


def mesh_of(module: Any) -> Any:
    """The ranks that share the weights of a module (tensor parallelism, FSDP2), as torch's `DeviceMesh`; None
    where each process has all of them."""
    meshes = (getattr(weight, "device_mesh", None) for weight in module.parameters())
    return next((mesh for mesh in meshes if mesh is not None), None)


def is_quiet(progress: bool, accelerator: Any) -> bool:
    """Whether this process shows no bar: one of them does."""
    return not progress or not (accelerator is None or accelerator.is_main_process)
