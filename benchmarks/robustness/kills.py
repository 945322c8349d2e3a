"""Kills a process while it overwrites a folder, again and again, and looks at what lies there afterwards.

That must be one of the two savings, whole, and the user's own files as they were. A victim is forked from a
process that has everything loaded (`python -m benchmarks.robustness.kills FOLDER KIND`), saves one model and
the other in turn, and is killed at a random moment of that.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import modlab
from modlab import ModlabError
from modlab.saving.demos import DEMO_FOLDER

ROOT = Path(__file__).resolve().parents[2]
KINDS = ("model", "model in shards", "routers")
THRESHOLDS = (0.25, 0.75)
"""Of the two models that overwrite each other."""


@dataclasses.dataclass
class Killed:
    """What lay in the folder after each kill.

    Attributes:
        kind: what was saved over and over, one of `KINDS`.
        kills: how many.
        first, second: loaded as the one, or as the other.
        mixed: loaded as neither; numbers of the kills.
        refused: could not be loaded.
        lost: a file of the user's was not there, or not as it was.
        leftovers: names that were left next to the folder or in it after one more save, undisturbed.
    """

    kind: str
    kills: int
    first: int = 0
    second: int = 0
    mixed: list[int] = dataclasses.field(default_factory=list)
    refused: list[int] = dataclasses.field(default_factory=list)
    lost: list[int] = dataclasses.field(default_factory=list)
    leftovers: list[str] = dataclasses.field(default_factory=list)


def make_model(which: int, kind: str = "model") -> Any:
    """One of two converted models, alike in shape alone; of `kind` "routers" on one base."""
    torch.manual_seed(0 if kind == "routers" else which)
    config = LlamaConfig(
        vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=6, num_attention_heads=4
    )
    mod = modlab.MoDConfig(skip="layer", layers="alternate")
    model = modlab.convert(LlamaForCausalLM(config).eval(), mod)
    torch.manual_seed(which)
    for name, parameter in model.named_parameters():
        if "mod_router" in name:
            parameter.data.copy_(torch.randn(parameter.shape))
    modlab.set_threshold(model, THRESHOLDS[which])
    return model


def saver(kind: str, folder: Path) -> Callable[[int], None]:
    """Saves one of the two models to `folder / "target"`."""
    models = [make_model(which, kind) for which in (0, 1)]
    target = folder / "target"
    if kind == "routers":
        return lambda which: modlab.save_routers(models[which], target, base_model=str(folder / "base"))
    shards = {"max_shard_size": "200KB"} if kind == "model in shards" else {}
    return lambda which: models[which].save_pretrained(target, **shards)


def kill_savers(kind: str, kills: int, folder: Path, seed: int = 0) -> Killed:
    """Overwrites `folder / "target"` and kills that `kills` times."""
    killed, random = Killed(kind, kills), Random(f"{kind} {seed}")
    wanted = [tensors_of_all(make_model(which, kind)) for which in (0, 1)]
    base, target = folder / "base", folder / "target"
    dense = modlab.revert(make_model(0))
    dense.save_pretrained(base)
    tokenizer_into(base)
    save = saver(kind, folder)
    save(0)
    tokenizer_into(target)
    mine = _own_files(target)
    with _victims(kind, folder) as kill_one:
        for number in range(kills):
            kill_one(random.uniform(0, 4))
            _judge(killed, number, target, wanted)
            if any(
                not (target / name).is_file() or (target / name).read_bytes() != text
                for name, text in mine.items()
            ):
                killed.lost.append(number)
    save(1)
    killed.leftovers = [path.name for path in folder.iterdir() if path not in (base, target)]
    killed.leftovers += [path.name for path in target.iterdir() if path.name.startswith(".modlab")]
    return killed


def _judge(killed: Killed, number: int, target: Path, wanted: list[dict[str, Any]]) -> None:
    try:
        model, _ = modlab.load(target)
    except ModlabError:
        killed.refused.append(number)
        return
    found = [_equal(tensors_of_all(model), one) for one in wanted]
    if found[0]:
        killed.first += 1
    elif found[1]:
        killed.second += 1
    else:
        killed.mixed.append(number)


THRESHOLD_TENSOR = "thresholds of mod_router"
"""Under which `tensors_of_all` has them."""


def tensors_of_all(model: Any) -> dict[str, Any]:
    """All that makes a model, by name: weights, routers, thresholds."""
    thresholds = torch.tensor([*model.mod.thresholds.values()])
    return {**model.state_dict(), THRESHOLD_TENSOR: thresholds}


def _equal(found: dict[str, Any], wanted: dict[str, Any]) -> bool:
    return found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)


def tokenizer_into(folder: Path) -> None:
    """A tokenizer, without which no folder loads."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO_FOLDER / "dense" / name, folder)


def _content(file: Path) -> bytes | None:
    return file.read_bytes() if file.is_file() else None


def _own_files(target: Path) -> dict[str, bytes]:
    """What the user has in the folder, by name."""
    (target / "runs" / "deep").mkdir(parents=True)
    files = {"notes.txt": b"mine", "runs/deep/log.jsonl": b"{}\n", "model_notes.bin": b"\0" * 1000}
    for name, content in files.items():
        (target / name).write_bytes(content)
    return files


@contextlib.contextmanager
def _victims(kind: str, folder: Path) -> Iterator[Callable[[float], None]]:
    """Yields a function that starts a victim and kills it after so many times the length of a save."""
    command = [sys.executable, "-m", "benchmarks.robustness.kills", str(folder), kind]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, cwd=ROOT, text=True
    )
    assert process.stdin and process.stdout
    pipes = process.stdin, process.stdout

    def kill_one(share: float) -> None:
        print(share, file=pipes[0], flush=True)
        if pipes[1].readline() != "killed\n":
            raise RuntimeError("the process that victims are forked from is gone")

    try:
        yield kill_one
    finally:
        process.stdin.close()
        process.wait()


def _serve(folder: Path, kind: str) -> None:
    """Forks and kills a victim for each number that is read."""
    torch.set_num_threads(1)
    save = saver(kind, folder)
    save(0)
    started = time.perf_counter()
    save(0)
    seconds = time.perf_counter() - started
    for line in sys.stdin:
        victim = os.fork()
        if victim == 0:
            while True:
                save(1)
                save(0)
        time.sleep(float(line) * seconds)
        os.kill(victim, signal.SIGKILL)
        os.waitpid(victim, 0)
        print("killed", flush=True)


if __name__ == "__main__":
    _serve(Path(sys.argv[1]), sys.argv[2])
