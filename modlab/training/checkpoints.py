"""Checkpoints of a run: `checkpoints/step_N`, each complete or absent.

    state.json              where the run was, its description, digests of the weights that it leaves as they
                            are, and the sha256 of the files next to it
    model.safetensors       the weights that it changes, tied ones once; see `weights.py`
    optimizer.safetensors   AdamW's state, as <name of the parameter>/<name of the state>
    routing.safetensors     of objective="budget": what its thresholds follow
    random_<rank>.json      each process's random number generators

They hold numbers only: nothing is executed when one is read. Where FSDP2 shards the model, the files hold
whole tensors all the same: a run goes on in any number of processes, sharded or not. Where the base is frozen
they hold none of it, and a run goes on with the one that it began with alone.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import re
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from modlab.errors import ModlabError
from modlab.training.processes import Processes
from modlab.training.sharding import gathered, like
from modlab.training.weights import Weights
from modlab.training.zero import Zero

FORMAT = 2
WHOLE = 1  # the format before: model.safetensors held all weights
STATE = "state.json"
MODEL, OPTIMIZER, ROUTING = "model.safetensors", "optimizer.safetensors", "routing.safetensors"


@dataclass
class State:
    """Where a run is.

    Attributes:
        step: optimiser steps done.
        tokens: tokens trained on.
        seconds: trained in all.
        share: of the run that is behind, in [0, 1].
        window: sums of the figures since the last log line, by name.
        window_steps: steps since then.
        run: the run's description, see `Run`.
    """

    step: int
    tokens: int
    seconds: float
    share: float
    window: dict[str, float]
    window_steps: int
    run: dict[str, Any]


def checkpoints(out: Path | None) -> list[Path]:
    """Complete checkpoints in a run's folder, oldest first."""
    if out is None or not (out / "checkpoints").is_dir():
        return []
    found = [
        (int(m[1]), p) for p in (out / "checkpoints").iterdir() if (m := re.fullmatch(r"step_(\d+)", p.name))
    ]
    return [path for _, path in sorted(found)]


def write_checkpoint(
    out: Path,
    state: State,
    weights: Weights,
    optimizer: torch.optim.Optimizer | Zero,
    routing: dict[str, Tensor] | None,
    processes: Processes,
) -> None:
    """Writes `out/checkpoints/step_N` under another name and renames it; all processes take part.

    Raises:
        ModlabError: it could not be written. Earlier checkpoints are as they were.
    """
    target = out / "checkpoints" / f"step_{state.step}"
    temporary = target.with_name(f".{target.name}.tmp")
    try:
        if processes.is_main:
            for left_over in target.parent.glob(".step_*.tmp"):
                shutil.rmtree(left_over)
            temporary.mkdir(parents=True)
        processes.wait()
        write_json(temporary / f"random_{processes.rank}.json", _random_state())
        changed, unchanged = weights.parted()
        of_optimizer = _optimizer_state(weights.model, optimizer)
        for name, tensors in ((MODEL, changed), (OPTIMIZER, of_optimizer)):
            full = gathered(tensors, keep=processes.is_main)
            if processes.is_main:
                save_file(full, temporary / name)
            del full
        if processes.is_main and routing is not None:
            save_file(routing, temporary / ROUTING)
        processes.wait()
        if processes.is_main:
            files = {path.name: _sha256(path) for path in sorted(temporary.iterdir())}
            described = {"format": FORMAT, **asdict(state), "unchanged": unchanged, "files": files}
            write_json(temporary / STATE, described)
            if target.exists():
                shutil.rmtree(target)
            os.replace(temporary, target)
    except Exception as error:  # a full disk shows as OSError, RuntimeError or SafetensorError
        shutil.rmtree(temporary, ignore_errors=True)
        raise ModlabError(
            f"Could not write the checkpoint {target}: {error}. Earlier ones are intact: free some space and "
            "continue with resume='auto'."
        ) from error
    processes.wait()


def read_state(path: Path) -> State:
    """Where the run was when it wrote the checkpoint `path`.

    Raises:
        ModlabError: no checkpoint, or a damaged one.
    """
    return _read(path)[0]


def load_checkpoint(
    path: Path, weights: Weights, optimizer: torch.optim.Optimizer | Zero, processes: Processes
) -> tuple[State, dict[str, Tensor] | None]:
    """Puts a checkpoint's weights into the model and its state into optimiser and random number generators.

    The optimiser's settings (rates, betas, weight decay) stay those that it has.

    Returns:
        where the run was, and what was given to `write_checkpoint` as `routing`.

    Raises:
        ModlabError: it is damaged, or of another model, or goes with another base.
    """
    with readable(path):
        state, unchanged, files = _read(path)
        random_file = f"random_{processes.rank}.json"
        as_many = state.run.get("processes") == processes.world  # else each process keeps its fresh numbers
        for name in (MODEL, OPTIMIZER, *([random_file] if as_many else [])):
            if name not in files:
                raise ValueError(f"it has no {name}")
        bad = [n for n, digest in files.items() if processes.is_main and _sha256(path / n) != digest]
        if processes.any(bool(bad)):  # the others would wait for the main one
            raise ValueError(f"{bad[0] if bad else 'a file'} is not as it was written")
        saved = load_file(path / MODEL)
        if differ := weights.differences(saved, unchanged):
            raise ModlabError(
                f"The checkpoint {path} goes with another base, which its run left as it was: "
                f"{'; '.join(differ[:2])}{'; ...' if len(differ) > 2 else ''}. Load the base that the run "
                "began with, in the same dtype."
            )
        _load_optimizer(weights.model, optimizer, load_file(path / OPTIMIZER))
        weights.restore(saved)
        if as_many:
            _set_random_state(read_json(path / random_file))
        return state, load_file(path / ROUTING) if ROUTING in files else None


def write_json(path: Path, value: Any) -> None:
    """`value` as indented JSON instead of what the file held, whole or not at all."""
    replace_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def replace_text(path: Path, text: str) -> None:
    """`text` instead of what the file held, whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        OSError, ValueError: it cannot be read, or holds something else.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except RecursionError:
        raise ValueError(f"{path.name} is nested too deeply") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path.name} holds no JSON object")
    return value


def _read(path: Path) -> tuple[State, dict[str, str], dict[str, str]]:
    """State; digests of the weights that the run leaves as they are, by name; digests of files by name, of
    which none is outside the folder."""
    with readable(path):
        found = read_json(path / STATE)
        version = found.pop("format", None)
        if type(version) is not int or version not in (WHOLE, FORMAT):
            raise ValueError(f"{STATE} is not of format {FORMAT}")
        unchanged = found.pop("unchanged", None) if version == FORMAT else {}
        if not isinstance(unchanged, dict) or not all(isinstance(one, str) for one in unchanged.values()):
            raise ValueError(f"{STATE} does not say which weights it goes with")
        files = found.pop("files", None)
        if not isinstance(files, dict) or not all(
            isinstance(digest, str) and Path(name).name == name for name, digest in files.items()
        ):
            raise ValueError(f"{STATE} does not say which files belong to it")
        if set(found) != {f.name for f in fields(State)}:
            raise ValueError(f"{STATE} has the keys {sorted(found)}")
        kinds = {"step": int, "tokens": int, "window_steps": int, "window": dict, "run": dict}
        numbers = {"seconds": found["seconds"], "share": found["share"]}
        if isinstance(found["window"], dict):
            numbers |= found["window"]
        wrong = [name for name, kind in kinds.items() if type(found[name]) is not kind]
        wrong += [name for name, value in numbers.items() if type(value) not in (int, float)]
        wrong += [name for name, value in numbers.items() if name not in wrong and not abs(value) < 1e300]
        counts = ("step", "tokens", "window_steps")
        wrong += [name for name in counts if name not in wrong and found[name] < 0]
        if wrong:
            raise ValueError(f"{STATE} has a wrong value for {', '.join(wrong)}")
        return State(**found), unchanged, files


@contextlib.contextmanager
def readable(path: Path) -> Iterator[None]:
    """Whatever a checkpoint holds, what goes wrong inside is a ModlabError that names it."""
    wrong = (OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError, OverflowError)
    try:
        yield
    except (*wrong, SafetensorError) as error:
        if isinstance(error, ModlabError):
            raise
        raise ModlabError(
            f"Could not load the checkpoint {path}: {error}. It belongs to another model, or is damaged; "
            "delete it to resume from the one before."
        ) from error


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer | Zero) -> dict[str, Tensor]:
    if isinstance(optimizer, Zero):
        return optimizer.state()
    return {
        f"{name}/{key}": value
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def _load_optimizer(
    model: nn.Module, optimizer: torch.optim.Optimizer | Zero, saved: dict[str, Tensor]
) -> None:
    state: dict[str, dict[str, Tensor]] = {}
    for key, value in saved.items():
        name, _, kind = key.rpartition("/")
        state.setdefault(name, {})[kind] = value
    trained = optimizer.trained if isinstance(optimizer, Zero) else _trained(model, optimizer)
    if other := sorted(set(state) - set(trained)):
        raise ValueError(f"it trained {', '.join(other[:3])}, which this run does not")
    for name, values in state.items():
        for kind, value in values.items():
            if value.dim() and value.shape != trained[name].shape:
                raise ValueError(f"{kind} of {name} is {tuple(value.shape)}")
            if value.dim():
                values[kind] = like(trained[name], value)
    if isinstance(optimizer, Zero):
        optimizer.load(state)
        return
    number = {name: i for i, name in enumerate(trained)}
    optimizer.load_state_dict(
        {
            "state": {number[name]: values for name, values in state.items()},
            "param_groups": optimizer.state_dict()["param_groups"],
        }
    )


def _trained(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """An optimiser's parameters by name, in its order."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    return {names[p]: p for group in optimizer.param_groups for p in group["params"]}


def _random_state() -> dict[str, Any]:
    version, internal, gauss = random.getstate()
    of_numpy: Any = np.random.get_state()
    kind, keys, *rest = of_numpy
    found: dict[str, Any] = {
        "python": [version, list(internal), gauss],
        "numpy": [kind, keys.tolist(), *rest],
        "torch": _hex(torch.get_rng_state()),
    }
    if torch.cuda.is_available():
        found["cuda"] = [_hex(state) for state in torch.cuda.get_rng_state_all()]
    return found


def _set_random_state(found: dict[str, Any]) -> None:
    version, internal, gauss = found["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, *rest = found["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(_unhex(found["torch"]))
    if torch.cuda.is_available() and len(found.get("cuda", ())) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([_unhex(state) for state in found["cuda"]])


def _hex(state: Tensor) -> str:
    return state.numpy().tobytes().hex()


def _unhex(text: str) -> Tensor:
    return torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8)
