"""The command line; without `--part` all parts, with it one of them, in this process."""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import signal
import sys
import tarfile
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.many_gpus import rows as text
from benchmarks.many_gpus import worker
from benchmarks.many_gpus.compared import UNINTERRUPTED, compared
from benchmarks.many_gpus.inference import against_one
from benchmarks.many_gpus.parts import (
    INFERENCE,
    KILLED,
    LARGE,
    LARGE_DISTILLED,
    LARGE_SHAPE,
    RESUMED,
    Part,
    chosen,
    command,
    environment,
    large_parts,
    parts,
)
from benchmarks.many_gpus.training import stepwise
from benchmarks.many_gpus.turns import Ended, Turns

TAIL = 1500
"""Characters of a log that a failed part leaves in the results."""

OF_THE_LAUNCHER = "torch/distributed/elastic/"
"""From here on a log says how the launcher ended the others."""


def main() -> None:
    """See the package's first lines."""
    options = _options()
    if options.part is not None:
        return _part(options)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended"))  # so that no part is left behind
    with tempfile.TemporaryDirectory() as folder:
        _all(options, Path(folder) if options.work is None else options.work)


def _all(options: argparse.Namespace, work: Path) -> None:
    options.out.mkdir(parents=True, exist_ok=True)
    work.mkdir(parents=True, exist_ok=True)
    results = Results(options, work)
    models: list[str] = []
    if not of_large_alone(options):
        models = [_with_weights(model, work) for model in options.model]
        if options.toy:
            models = [_toy(work, "small", 3), _toy(work, "large", 4)]
        _write_rows(options, models, work)
    wanted = chosen(options.only, models, options.gpus)
    if options.toy:  # a few busy cores do it
        wanted = [dataclasses.replace(part, limit=options.seconds) for part in wanted]

    def begin(part: Part, gpus: list[int]) -> tuple[list[str], dict[str, str]]:
        forget(part, work)
        return command(part, options, work), environment(options, gpus)

    turns = Turns(options.gpus, options.seconds - (time.monotonic() - BEGAN), begin, results.log, results.add)
    results.end([part.name for part in turns.run(wanted)])


def of_large_alone(options: argparse.Namespace) -> bool:
    """Whether all that is asked for is the large shape's."""
    return bool(options.only) and set(options.only) <= {LARGE_SHAPE, *LARGE}


def _write_rows(options: argparse.Namespace, models: list[str], work: Path) -> None:
    """Rows for all scenes; tokenized once where models share a tokenizer."""
    written: dict[bytes, Path] = {}
    for model in models:
        file, tokenizer = work / f"rows_{Path(model).name}.pt", Path(model) / "tokenizer.json"
        same = tokenizer.read_bytes() if tokenizer.exists() else b""
        if same in written:
            file.write_bytes(written[same].read_bytes())
        else:
            text.write_rows(model, options.steps * options.rows * options.gpus, options.length, file)
        written[same] = file


def forget(part: Part, work: Path) -> None:
    """Removes what a part of an earlier call with the same folder has left, which would pass for its own."""
    for file in (work / f"{part.file}.json", *work.glob(f"{part.what} by *.pt")):
        file.unlink(missing_ok=True)
    if part.what in (KILLED, RESUMED):
        (work / f"{part.what}.jsonl").unlink(missing_ok=True)
        shutil.rmtree(work / part.what, ignore_errors=True)


class Results:
    """The file of results, written again with every part that has ended.

    Args:
        work: where parts leave their figures and logs.
    """

    def __init__(self, options: argparse.Namespace, work: Path) -> None:
        self.work = work
        self.name = f"many_gpus_{time.strftime('%Y-%m-%d')}{'_toy' if options.toy else ''}"
        self.out, self.rows = options.out, options.rows
        self.found: dict[str, dict[str, Any]] = {}
        words = [Path(word).name if "/" in word else word for word in sys.argv[1:]]
        command = " ".join(["python -m benchmarks.many_gpus", *words])
        self.head: dict[str, Any] = {"what": "many_gpus", "toy": options.toy, "command": command}
        if not options.toy:
            random = [model for model in options.model if not worker.has_weights(model)]
            self.head["random weights"] = [Path(model).name for model in random]

    def log(self, part: Part) -> Path:
        """Where a part's output goes."""
        return self.work / f"{part.file}.log"

    def add(self, part: Part, ended: Ended) -> None:
        """A part has ended."""
        figures: dict[str, Any] = {"ended with": "its limit" if ended.code is None else ended.code}
        figures |= {"seconds": round(ended.seconds, 1), "together with": ended.together}
        figures["processes left over"] = ended.left_over
        file = self.work / f"{part.file}.json"
        if file.exists():
            figures |= json.loads(file.read_text())
        self._add_cut_off(part, figures)
        if ended.code != 0:
            said = self.log(part).read_text(errors="replace")
            figures["end of its log"] = said.split(OF_THE_LAUNCHER)[0][-TAIL:]
        self.found[part.name] = figures
        self._compare_inference()
        self._write()
        speeds = {
            name: round(scene["tokens_per_s"])
            for name, scene in figures.get("scenes", {}).items()
            if "tokens_per_s" in scene
        }
        ended_with = f"{part.name} ended with {figures['ended with']} after {figures['seconds']} s"
        print(f"{time.monotonic() - BEGAN:.0f} s: {ended_with}, tokens a second: {speeds}", flush=True)

    def _add_cut_off(self, part: Part, figures: dict[str, Any]) -> None:
        """What a run had said before a process of it was killed, as is meant, or its time was over."""
        lines = self.work / f"{part.file}.jsonl"
        scenes = figures.setdefault("scenes", {}) if lines.exists() else {}
        if not lines.exists() or KILLED in scenes:
            return
        saved = self.work.glob(f"{KILLED}/checkpoints/step_*")
        scenes[KILLED] = {
            "lines": [json.loads(line) for line in lines.read_text().splitlines()],
            "rows": self.rows,
            "checkpoints": sorted(path.name for path in saved),
            UNINTERRUPTED: stepwise(part.models[0], self.rows),
        }

    def end(self, not_begun: list[str]) -> None:
        """No more parts."""
        self.head["not begun"] = not_begun
        self._write()
        notebook = self.work / "6_many_gpus.ipynb"
        if notebook.exists():
            (self.out / f"{self.name}_notebook.ipynb").write_bytes(notebook.read_bytes())
        with tarfile.open(self.out / f"{self.name}_logs.tar.gz", "w:gz") as archive:
            for path in sorted(self.work.glob("*.log")):
                archive.add(path, path.name)
        print(json.dumps(compared(self.found), indent=2))
        print("not begun:", ", ".join(not_begun) or "nothing")

    def _compare_inference(self) -> None:
        for part in INFERENCE:
            for name, found in self.found.get(part, {}).items():
                if isinstance(found, dict) and "kv_bytes" in found:
                    found |= against_one(self.work, part, name)

    def _write(self) -> None:
        everything = {**self.head, "parts": self.found, "compared": compared(self.found)}
        text = json.dumps(everything, indent=1) + "\n"
        (self.out / f"{self.name}.json").write_text(text, encoding="utf-8")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.many_gpus", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--model", nargs="+", default=[], help="folders of dense models, from small to large")
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument("--work", type=Path, help="folder for everything else; by default removed at the end")
    parser.add_argument("--seconds", type=float, default=470, help="for all parts together")
    parser.add_argument("--only", nargs="+", default=[], help=f"parts, as ddp one; {LARGE_SHAPE}: its three")
    parser.add_argument("--gpus", type=int, default=2)
    parser.add_argument("--memory", type=float, default=139.0, help="GiB of a GPU")
    parser.add_argument("--rows", type=int, default=8, help="a GPU; one GPU takes gpus times as many as well")
    parser.add_argument("--length", type=int, default=4096, help="tokens of a row")
    parser.add_argument("--context", type=int, default=32768, help="tokens of the prompt")
    parser.add_argument("--steps", type=int, default=12, help="of training")
    parser.add_argument("--toy", action="store_true", help="on the CPU, with a tiny model")
    for name in ("--part", "--file"):
        parser.add_argument(name, help=argparse.SUPPRESS)
    options = parser.parse_args()
    every = [*parts(["small", "large"], options.gpus), *large_parts(options.gpus)]
    known = [*(part.what for part in every), LARGE_SHAPE]
    if unknown := sorted(set(options.only) - set(known)):
        parser.error(f"--only knows no {', '.join(unknown)}, but {', '.join(known)}")
    if options.toy:
        options.rows, options.length, options.context, options.steps = max(4, options.gpus), 192, 300, 8
    elif not options.model and not of_large_alone(options):
        parser.error("--model is needed")
    if options.rows % options.gpus and not of_large_alone(options):
        parser.error(f"--rows {options.rows} are shared out among {options.gpus} GPUs: give a multiple")
    return options


def _part(options: argparse.Namespace) -> None:
    if options.part == "notebook":
        from benchmarks.many_gpus.notebook import executed as run
    elif options.part == LARGE_DISTILLED:
        from benchmarks.many_gpus.large_distilled import distilled as run
    elif options.part in LARGE:
        from benchmarks.many_gpus.large_shape import measured as run
    elif options.part in INFERENCE:
        from benchmarks.many_gpus.inference import inferred as run
    else:
        from benchmarks.many_gpus.training import trained as run
    worker.begin()
    worker.write(options, run(options))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _with_weights(model: str, work: Path) -> str:
    """The folder, or one with the same config and random weights."""
    if worker.has_weights(model):
        return model
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = work / Path(model).name
    torch.manual_seed(0)
    with worker.device():  # on a CPU 1.5 B of them take a minute
        made = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model), dtype=torch.bfloat16)
    made.save_pretrained(folder)
    del made
    worker.tidy()
    for file in Path(model).glob("tokenizer*"):
        (folder / file.name).write_bytes(file.read_bytes())
    return str(folder)


def _toy(work: Path, name: str, layers: int) -> str:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=1024,
    )  # fmt: skip
    torch.manual_seed(0)  # the base of a run that a later call takes up
    LlamaForCausalLM(config).save_pretrained(work / name)
    return str(work / name)


BEGAN = time.monotonic()

if __name__ == "__main__":
    main()
