"""accelerate's FSDP where it never looks at its own flags."""

from __future__ import annotations

from typing import Any

from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin


def launched_with_fsdp(**settings: Any) -> None:
    """From here on accelerate is as `accelerate launch --use_fsdp --fsdp_version 2` leaves it on GPUs. On a
    CPU it never looks at these flags, though torch shards there as well."""
    Accelerator(cpu=True, mixed_precision="no")
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, **settings)
    for state in (AcceleratorState, PartialState):
        state._shared_state["distributed_type"] = DistributedType.FSDP
    AcceleratorState._shared_state["fsdp_plugin"] = plugin
