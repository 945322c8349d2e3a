"""Run by `accelerate launch` in test_sharding.py: adapters and routers of a model that FSDP2 shards.

adapters_in_processes.py FOLDER
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

import modlab
from modlab.errors import ModlabError
from modlab.integrations.peft import save_adapter
from modlab.saving.save_adapters import check_whole
from modlab.training.sharding import reshard
from tests.helpers.adapters import KINDS, adapting, kind_of
from tests.helpers.fsdp_on_cpu import launched_with_fsdp
from tests.helpers.runs import rows


def main(folder: Path) -> None:
    launched_with_fsdp()
    refused = []
    for kind in KINDS:
        model = kind_of(folder, kind)
        modlab.train(model, rows(), adapting(folder / "two" / kind))
        reshard(model)
        whole = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
        if torch.distributed.get_rank() > 0:
            continue
        save_adapter(model, folder / "by hand" / kind, state_dict=whole)
        for attempt in (
            lambda model=model, kind=kind: save_adapter(model, folder / "parts" / kind),
            lambda model=model: check_whole(model.get_base_model()),
        ):
            try:
                attempt()
            except ModlabError as error:
                refused.append(str(error))
    if torch.distributed.get_rank() == 0:
        (folder / "refused.json").write_text(json.dumps(refused), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
