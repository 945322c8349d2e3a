"""Run by `accelerate launch` in test_fsdp.py: models sharded by FSDP2, in each process a share of the rows.

shard_in_processes.py OUT
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from torch import distributed
from torch.distributed.fsdp import MixedPrecisionPolicy

from tests.helpers.sharding import IDS, SKIPS, routed, shard, trained


def main(out: str) -> None:
    distributed.init_process_group("gloo")
    rank, world = distributed.get_rank(), distributed.get_world_size()
    mixed = {"mp_policy": MixedPrecisionPolicy(param_dtype=torch.bfloat16)}
    found: dict[Any, Any] = {}
    for skip in SKIPS:
        for name, dtype, policy in (
            ("fp32", torch.float32, {}),
            ("bf16", torch.bfloat16, {}),
            ("mixed", torch.float32, mixed),
        ):
            model = routed(skip, dtype)
            shard(model, **policy)
            rows = torch.arange(len(IDS))[rank::world]
            found[skip, name] = trained(model, IDS[rows], rows)
    torch.save(found, Path(out) / f"rank_{rank}.pt")
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
