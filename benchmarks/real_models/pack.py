"""Gates in a few hundred KB, packed as `modlab.saving.bits` packs routers.

The hidden layer's weights are nine tenths of a gate and need the least precision: they get `bits`, the
linear part 8, and what is small stays as it is.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.real_models.base import Shape
from benchmarks.real_models.gates import GateForm, Gates
from modlab.saving.bits import pack_routers, unpack_routers


def save(gates: Gates, path: Path, facts: dict[str, Any], bits: int) -> int:
    """Writes packed gates with their form and `facts`; returns the file's bytes."""
    from safetensors.torch import save_file

    state = pack_routers(gates.state_dict(), {"into_KD": bits, "linear": 8, "later": 8})
    words = {"form": asdict(gates.form), "shape": asdict(gates.shape), "facts": facts}
    save_file(state, str(path), {"gates": json.dumps(words)})
    return path.stat().st_size


def load(path: Path) -> Gates:
    """What `save` or `Gates.save` wrote."""
    from safetensors import safe_open

    with safe_open(str(path), "pt") as file:
        words = json.loads(file.metadata()["gates"])
        found = unpack_routers({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
    gates = Gates(Shape(**words["shape"]), GateForm(**words["form"]))
    # Files of the study hold the scales of a tensor in one line, so that it has lost its shape.
    shaped = {name: found[name].float().reshape(value.shape) for name, value in gates.state_dict().items()}
    gates.load_state_dict(shaped)
    return gates
