"""Gates in a few hundred KB: rows of weights as integers of few bits, in planes of bits.

The hidden layer's weights are nine tenths of a gate and need the least precision: they get `bits`, the
linear part 8, and what is small stays as it is.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.real_models.base import Shape
from benchmarks.real_models.gates import GateForm, Gates

GROUP = 64  # weights that share a scale


def packed(weights: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """(planes uint8 [bits, n/8], scales fp16 [groups]) of an array whose size is a multiple of `GROUP`."""
    groups = weights.astype(np.float32).reshape(-1, GROUP)
    top = 2 ** (bits - 1) - 1
    scales = np.maximum(np.abs(groups).max(1) / top, 1e-7).astype(np.float16)
    whole = np.clip(np.round(groups / scales.astype(np.float32)[:, None]), -top, top).astype(np.int16) + top
    return np.stack([np.packbits((whole.reshape(-1) >> bit) & 1) for bit in range(bits)]), scales


def unpacked(planes: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """The weights, flat, fp32."""
    bits = len(planes)
    whole = sum(np.unpackbits(plane).astype(np.int16) << bit for bit, plane in enumerate(planes))
    centred = (whole - (2 ** (bits - 1) - 1)).astype(np.float32).reshape(-1, GROUP)
    return (centred * scales.astype(np.float32)[:, None]).reshape(-1)


def save(gates: Gates, path: Path, facts: dict[str, Any], bits: int) -> int:
    """Writes packed gates with their form and `facts`; returns the file's bytes."""
    from safetensors.numpy import save_file

    state: dict[str, np.ndarray] = {}
    for name, value in gates.state_dict().items():
        weights = value.detach().cpu().numpy()
        depth = {"into_KD": bits, "linear": 8, "later": 8}.get(name.rpartition(".")[2])
        if depth is None:
            state[name] = weights.astype(np.float16)
        else:
            state[name + ".planes"], state[name + ".scales"] = packed(weights, depth)
    words = {"form": asdict(gates.form), "shape": asdict(gates.shape), "facts": facts}
    save_file(state, str(path), {"gates": json.dumps(words)})
    return path.stat().st_size


def load(path: Path) -> Gates:
    """What `save` or `Gates.save` wrote."""
    import torch
    from safetensors import safe_open

    with safe_open(str(path), "np") as file:
        words = json.loads(file.metadata()["gates"])
        found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    gates = Gates(Shape(**words["shape"]), GateForm(**words["form"]))
    state = {}
    for name, value in gates.state_dict().items():
        if name in found:
            weights = found[name].astype(np.float32)
        else:
            weights = unpacked(found[name + ".planes"], found[name + ".scales"]).reshape(value.shape)
        state[name] = torch.from_numpy(weights)
    gates.load_state_dict(state)
    return gates
