"""accelerate's DeepSpeed where it never looks at its own flags."""

from __future__ import annotations

import os
from typing import Any

from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DeepSpeedPlugin, DistributedType


def launched_with_deepspeed(stage: int = 1, **settings: Any) -> None:
    """From here on accelerate is as `accelerate launch --use_deepspeed --zero_stage STAGE` leaves it on GPUs.

    DeepSpeed compiles a way to share memory between processes on a CPU, which nothing here needs.
    """
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed
    from deepspeed.comm import torch as communication

    communication.build_shm_op = lambda: None
    Accelerator(cpu=True, mixed_precision="no")
    deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False)
    plugin = DeepSpeedPlugin(zero_stage=stage, **settings)
    for state in (AcceleratorState, PartialState):
        state._shared_state["distributed_type"] = DistributedType.DEEPSPEED
    AcceleratorState._shared_state["deepspeed_plugins"] = plugin
    plugin.select(_from_accelerator_state=True)
