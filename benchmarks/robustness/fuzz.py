"""Damaged files for each reader of modlab's: refused by ModlabError, or what is read is right anyway."""

from __future__ import annotations

import dataclasses
import json
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

import modlab
from benchmarks.robustness.kills import THRESHOLD_TENSOR, make_model, tensors_of_all, tokenizer_into
from benchmarks.robustness.mutations import mutated, mutated_json
from modlab import MoDConfig, ModlabError, RoutingTrace, published
from modlab.saving.description import FORMAT, Description, read_description
from modlab.saving.files import CONFIG_FILE, ROUTER_FILE
from modlab.saving.fingerprint import sha256_of
from modlab.saving.json_files import read_object
from modlab.saving.routers import read_routers


@dataclasses.dataclass
class Parser:
    """A reader of files.

    Attributes:
        file: an undamaged file.
        read: reads one.
        right: whether what was read of a damaged file is right all the same.
        damage: makes it one.
        one_in: it gets one of so many inputs, where several parsers are one reader.
    """

    file: Path
    read: Callable[[Path], Any]
    right: Callable[[Any], bool]
    damage: Callable[[bytes, Random], bytes] = mutated
    one_in: int = 1


@dataclasses.dataclass
class Outcome:
    """What a parser did with its damaged files.

    Attributes:
        parser: its name.
        inputs: damaged files, each with a seed of its own.
        refused: by ModlabError.
        read: and what was read was right.
        wrong: what was read was not; seeds.
        crashed: another exception; seeds, and the last one's traceback.
        slowest_ms: longest time for one of them.
    """

    parser: str
    inputs: int
    refused: int = 0
    read: int = 0
    wrong: list[int] = dataclasses.field(default_factory=list)
    crashed: list[int] = dataclasses.field(default_factory=list)
    traceback: str = ""
    slowest_ms: float = 0.0


def fuzz(name: str, parser: Parser, inputs: int, first_seed: int = 0) -> Outcome:
    """Reads `inputs` damaged files, or the parser's share of them."""
    inputs = -(-inputs // parser.one_in)
    parser.read(parser.file)  # undamaged, it is read
    original, outcome = parser.file.read_bytes(), Outcome(name, inputs)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, parser.file.name)
        for seed in range(first_seed, first_seed + inputs):
            file.write_bytes(parser.damage(original, Random(f"{name} {seed}")))
            _read_one(parser, file, seed, outcome)
    return outcome


def _read_one(parser: Parser, file: Path, seed: int, outcome: Outcome) -> None:
    started = time.perf_counter()
    try:
        if parser.right(parser.read(file)):
            outcome.read += 1
        else:
            outcome.wrong.append(seed)
    except ModlabError:
        outcome.refused += 1
    except Exception:
        outcome.crashed.append(seed)
        outcome.traceback = traceback.format_exc()
    outcome.slowest_ms = max(outcome.slowest_ms, 1000 * (time.perf_counter() - started))


def parsers(folder: Path) -> dict[str, Parser]:
    """The readers by name; `folder` is for their undamaged files."""
    routers = {f"model.layers.{i}.mod_router.weight": torch.randn(64) for i in (1, 3, 5)}
    save_file(routers, folder / ROUTER_FILE)
    digest = sha256_of(folder / ROUTER_FILE)
    (folder / CONFIG_FILE).write_text(json.dumps(_description(digest)))
    (folder / "config of a conversion.json").write_text(json.dumps(MoDConfig(p={1: 0.3, 4: 0.6}).to_dict()))
    trace = _trace()
    trace.save(folder / "trace.npz")
    (folder / "result.json").write_bytes(published.result_files()[0].read_bytes())
    return {
        "modlab_config.json": Parser(
            folder / CONFIG_FILE,
            lambda file: read_description(file, "folder"),
            _is_description,
            mutated_json,
        ),
        "MoDConfig": Parser(folder / "config of a conversion.json", _read_config, _is_config, mutated_json),
        "modlab_router.safetensors": Parser(
            folder / ROUTER_FILE,
            lambda file: read_routers(file, "folder", digest),
            lambda found: _same(found, routers),
        ),
        "modlab_router.safetensors, first format": Parser(  # without a hash: what is read is at least finite
            folder / ROUTER_FILE,
            lambda file: read_routers(file, "folder"),
            lambda found: all(t.is_floating_point() and bool(t.isfinite().all()) for t in found.values()),
        ),
        "trace": Parser(folder / "trace.npz", RoutingTrace.load, lambda found: _same_trace(found, trace)),
        "results": Parser(folder / "result.json", published.read_result, _is_result, mutated_json),
    }


def folder_parsers(folder: Path) -> dict[str, Parser]:
    """`modlab.load` of a whole model of which one file is damaged, also those that are transformers' own."""
    model = make_model(0)
    model.save_pretrained(folder)
    tokenizer_into(folder)
    saved = tensors_of_all(model)
    made = {}
    names = sorted(path.name for path in folder.iterdir() if path.suffix in (".json", ".safetensors"))
    for name in names:
        made[f"folder with {name}"] = Parser(
            folder / name,
            lambda file: _load_with(folder, file),
            lambda found: _same(tensors_of_all(found), saved),
            mutated_json if name.endswith("json") else mutated,
            one_in=len(names),
        )
    described = made[f"folder with {CONFIG_FILE}"]
    described.read = lambda file: (_load_with(folder, file), json.loads(file.read_bytes()))
    described.right = lambda found: _as_described(found, saved)
    return made


def _as_described(loaded: tuple[Any, dict[str, Any]], saved: dict[str, torch.Tensor]) -> bool:
    """Whether the tensors are those that were saved, and the thresholds those of the damaged file: another
    number there is another setting, which anybody may write."""
    model, description = loaded
    found = tensors_of_all(model)
    del found[THRESHOLD_TENSOR]
    wanted = {int(layer): p for layer, p in description["thresholds"].items()}
    rest = {name: tensor for name, tensor in saved.items() if name != THRESHOLD_TENSOR}
    return _same(found, rest) and bool(model.mod.thresholds == wanted)


def _load_with(folder: Path, file: Path) -> Any:
    """What `folder` gives with this file instead of its own."""
    own, whole = folder / file.name, (folder / file.name).read_bytes()
    try:
        own.write_bytes(file.read_bytes())
        return modlab.load(folder)[0]
    finally:
        own.write_bytes(whole)


def _description(digest: str) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "config": MoDConfig().to_dict(),
        "thresholds": {"1": 0.3, "3": 0.5, "5": 0.625},
        "base_model": "somebody/model",
        "base_trained": False,
        "routers": digest,
        "weights": {"model.safetensors": digest},
    }


def _trace() -> RoutingTrace:
    random = np.random.default_rng(0)
    gate = random.uniform(0, 1, (3, 20)).astype(np.float32)
    loss = random.uniform(0, 5, 20).astype(np.float32)
    return RoutingTrace(
        tokens=[f"t{i} " for i in range(20)],
        token_ids=np.arange(20),
        gate=gate,
        keep=gate >= 0.5,
        layers=[1, 3, 5],
        num_layers=6,
        thresholds=np.full(3, 0.5),
        keep_first=4,
        loss=loss,
        kv_bytes_per_token=256,
        model="m",
    )


def _read_config(file: Path) -> MoDConfig:
    return MoDConfig.from_dict(read_object(file, "write it again"))


def _is_config(found: MoDConfig) -> bool:
    whole = [found.keep_recent, found.keep_first, found.format_version]
    shares = [
        found.capacity,
        found.init_gate,
        *(found.p.values() if isinstance(found.p, dict) else [found.p]),
    ]
    return (
        all(type(value) is int and 0 <= value < 2**31 for value in whole)
        and all(0 < share <= 1 for share in shares)
        and found.format_version == 1
        and found.keep_recent > 0
        and (isinstance(found.layers, str) or all(type(layer) is int for layer in found.layers))
    )


def _is_description(found: Description) -> bool:
    return (
        _is_config(found.config)
        and bool(found.thresholds)
        and all(type(layer) is int and layer >= 0 for layer in found.thresholds)
        and all(type(p) is float and 0 < p < 1 for p in found.thresholds.values())
        and (found.base_model is None or type(found.base_model) is str)
        and type(found.base_trained) is bool
        and (found.routers is None or len(found.routers) == 64)
        and all(Path(name).name == name for name in found.weights)
    )


def _is_result(found: dict[str, Any]) -> bool:
    return all(isinstance(row, dict) for row in found["rows"]) and isinstance(found["versions"], dict)


def _same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> bool:
    return found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)


def _same_trace(found: RoutingTrace, wanted: RoutingTrace) -> bool:
    arrays = ("token_ids", "gate", "keep", "thresholds", "loss")
    values = (
        "tokens",
        "layers",
        "num_layers",
        "keep_first",
        "kv_bytes_per_token",
        "model",
        "skip",
        "keep_recent",
        "stored_bytes_per_token",
    )
    return all(
        np.array_equal(getattr(found, name), getattr(wanted, name), equal_nan=name == "loss")
        for name in arrays
    ) and all(getattr(found, name) == getattr(wanted, name) for name in values)
