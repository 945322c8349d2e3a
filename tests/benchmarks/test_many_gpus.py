"""The call that measures several GPUs: its parts take turns, have limits, and leave nothing behind."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.many_gpus import training, worker
from benchmarks.many_gpus.__main__ import Results, forget, main
from benchmarks.many_gpus.breakdown import Breakdown, summed
from benchmarks.many_gpus.compared import (
    EFFICIENCY,
    OF_INFERENCE,
    TIMES,
    TIMES_TWO,
    UNINTERRUPTED,
    compared,
)
from benchmarks.many_gpus.inference import ALONE, NEW_TOKENS, against_one
from benchmarks.many_gpus.joined import joined
from benchmarks.many_gpus.parts import (
    KILLED,
    LARGE,
    LARGE_DISTILLED,
    LARGE_SHAPE,
    OF_TWO,
    ONE,
    ONE_LARGE,
    RESUMED,
    SHARDED,
    Part,
    chosen,
    command,
    parts,
)
from benchmarks.many_gpus.training import DIES_AT, SAVED_AT, scenes, stepwise
from benchmarks.many_gpus.turns import LEAST, Ended, Turns
from modlab.errors import ModlabError
from tests.helpers.launch import finished

SLEEP = "import time; time.sleep(600)"


def part(what: str, gpus: int, limit: float = 100.0, timed: bool = True) -> Part:
    """Of any model."""
    return Part(what, ("m",), gpus, limit, timed)


class Ran:
    """Turns of commands, each a Python program by the name of its part."""

    def __init__(self, folder: Path, programs: dict[str, str], gpus: int = 2, seconds: float = 600) -> None:
        self.programs, self.given = programs, dict[str, list[int]]()
        self.ended: dict[str, Ended] = {}
        self.turns = Turns(
            gpus, seconds, self.begin, lambda part: folder / f"{part.what}.log",
            lambda part, ended: self.ended.update({part.what: ended}),
        )  # fmt: skip

    def begin(self, part: Part, gpus: list[int]) -> tuple[list[str], dict[str, str]]:
        self.given[part.what] = gpus
        return [sys.executable, "-c", self.programs[part.what]], dict(os.environ)


def meeting_in(folder: Path) -> str:
    """A program that waits for another one of its kind."""
    return (
        "import pathlib, sys, time\n"
        f"folder = pathlib.Path({str(folder)!r})\n"
        "(folder / sys.argv[1]).touch()\n"
        "while len(list(folder.glob('here *'))) < 2: time.sleep(0.05)\n"
    )


def test_parts_share_the_gpus_in_their_order(tmp_path: Path) -> None:
    """Two of one GPU side by side, and one of both after them, though one of the two fails."""
    meet = meeting_in(tmp_path)
    programs = {
        "a": f"import sys; sys.argv.append('here a')\n{meet}",
        "b": f"import sys; sys.argv.append('here b')\n{meet}sys.exit(3)",
        "both": "print('done')",
    }
    ran = Ran(tmp_path, programs)
    assert ran.turns.run([part("a", 1), part("b", 1), part("both", 2)]) == []
    assert ran.given == {"a": [0], "b": [1], "both": [0, 1]}
    assert {name: one.code for name, one in ran.ended.items()} == {"a": 0, "b": 3, "both": 0}
    assert ran.ended["a"].together == ["b"] and ran.ended["both"].together == []
    assert (tmp_path / "both.log").read_text() == "done\n"


def test_what_a_part_leaves_behind_is_ended(tmp_path: Path) -> None:
    """Processes in sessions of their own, as the launcher starts them."""
    program = (
        "import subprocess, sys\n"
        f"one = subprocess.Popen([sys.executable, '-c', {SLEEP!r}], start_new_session=True)\n"
        "print(one.pid)"
    )
    ran = Ran(tmp_path, {"leaves": program})
    ran.turns.run([part("leaves", 1)])
    assert (ran.ended["leaves"].code, ran.ended["leaves"].left_over) == (0, 1)
    assert not psutil.pid_exists(int((tmp_path / "leaves.log").read_text()))


def test_limits_end_parts_and_the_call(tmp_path: Path) -> None:
    ran = Ran(tmp_path, {"long": SLEEP, "next": ""}, gpus=1)
    assert ran.turns.run([part("long", 1, limit=0.5), part("next", 1)]) == []
    assert (ran.ended["long"].code, ran.ended["next"].code) == (None, 0)
    late = Ran(tmp_path, {"never": ""}, seconds=0)
    assert [one.what for one in late.turns.run([part("never", 1)])] == ["never"]
    assert not late.ended


WAITING = (
    "import pathlib, sys, time\n"
    "def wait_for(file):\n"
    "    while not pathlib.Path(file).exists(): time.sleep(0.05)\n"
)


def test_the_next_part_is_started_ahead_and_waits_for_its_turn(tmp_path: Path) -> None:
    """The first one ends once the next has been started; that one goes on when the first has ended."""
    started, ended = tmp_path / "started", tmp_path / "ended"
    programs = {
        "first": f"{WAITING}wait_for({str(started)!r})\npathlib.Path({str(ended)!r}).touch()",
        "next": (
            f"{WAITING}from benchmarks.many_gpus.turns import wait_for_turn\n"
            f"pathlib.Path({str(started)!r}).touch()\n"
            f"wait_for_turn()\nsys.exit(0 if pathlib.Path({str(ended)!r}).exists() else 5)"
        ),
    }
    ran = Ran(tmp_path, programs)
    assert ran.turns.run([part("first", 2), part("next", 1)]) == []
    assert {name: one.code for name, one in ran.ended.items()} == {"first": 0, "next": 0}
    assert ran.given == {"first": [0, 1], "next": [0]} and ran.ended["next"].together == []


def test_a_part_started_ahead_is_ended_when_time_is_up(tmp_path: Path) -> None:
    """It counts as not begun."""
    own = tmp_path / "pid"
    ahead = f"import os, pathlib\npathlib.Path({str(own)!r}).write_text(str(os.getpid()))\n{SLEEP}"
    programs = {"first": f"{WAITING}wait_for({str(own)!r})\nraise SystemExit(0)", "next": ahead}
    ran = Ran(tmp_path, programs, seconds=LEAST + 600)

    def over(one: Part, ended: Ended) -> None:
        ran.ended[one.what] = ended
        ran.turns.deadline = 0.0

    ran.turns.ended = over
    assert [one.what for one in ran.turns.run([part("first", 1), part("next", 2)])] == ["next"]
    assert set(ran.ended) == {"first"} and not psutil.pid_exists(int(own.read_text()))


def test_parts_that_are_not_timed_share_gpus(tmp_path: Path) -> None:
    """Two that want both GPUs run at once; a timed one waits for them, and they would for it."""
    meet = meeting_in(tmp_path)
    programs = {
        "a": f"import sys; sys.argv.append('here a')\n{meet}",
        "b": f"import sys; sys.argv.append('here b')\n{meet}",
        "timed": "",
        "c": "",
    }
    ran = Ran(tmp_path, programs)
    untimed = {name: part(name, 2, timed=False) for name in ("a", "b", "c")}
    assert ran.turns.run([untimed["a"], untimed["b"], part("timed", 1), untimed["c"]]) == []
    assert all(given == [0, 1] for name, given in ran.given.items() if name != "timed")
    assert ran.ended["a"].together == ["b"] and ran.ended["timed"].together == []


def test_a_process_is_timed_with_its_gpu_to_itself(tmp_path: Path) -> None:
    """One that is not timed gets another GPU."""
    ran = Ran(tmp_path, {"timed": "import time; time.sleep(1)", "other": ""})
    ran.turns.run([part("timed", 1), part("other", 1, timed=False)])
    assert ran.given == {"timed": [0], "other": [1]}


def test_all_parts_have_names_of_their_own() -> None:
    found = parts(["models/small", "models/large"], 2)
    assert len({one.file for one in found}) == len(found)
    names = [one.name for one in found]
    assert names.index(KILLED) < names.index(RESUMED), "nothing to take up yet"
    assert found[names.index(KILLED)].gpus == 2, "what takes it up would begin next to it"
    assert {one.name: one.models for one in found if one.name in (ONE, ONE_LARGE)} == {
        ONE: ("models/small",), ONE_LARGE: ("models/large",),
    }  # fmt: skip
    alone = parts(["models/small"], 2)
    assert all(len(one.models) == 1 for one in alone) and ONE_LARGE not in {one.name for one in alone}


def test_more_than_two_gpus_are_held_against_two_and_taken_up_by_half() -> None:
    assert not {one.what for one in parts(["m"], 2)} & set(OF_TWO.values())
    found = {one.what: one.gpus for one in parts(["m"], 8)}
    assert [found[name] for name in OF_TWO.values()] == [2, 2]
    assert found[RESUMED] == 4 and {one.what: one.gpus for one in parts(["m"], 2)}[RESUMED] == 1


def test_the_large_shape_is_asked_for_by_name_and_needs_no_model() -> None:
    assert not {one.what for one in chosen([], ["m"], 4)} & set(LARGE)
    assert [one.what for one in chosen([LARGE_SHAPE], [], 4)] == list(LARGE)
    assert [one.what for one in chosen([LARGE_SHAPE], [], 1)] == ["llama-3-70b device_map"]
    assert [one.what for one in chosen([LARGE_DISTILLED, ONE], ["m"], 4)] == [LARGE_DISTILLED, ONE]


def test_each_part_is_launched_with_its_own_number_of_processes() -> None:
    """What shards says so to the launcher; a run that one GPU takes up is a plain process."""
    options = argparse.Namespace(
        gpus=4, toy=False, length=1, context=1, steps=1, memory=1.0, rows=4, only=[]
    )  # fmt: skip
    shown = {}
    for one in chosen([LARGE_SHAPE], [], 4) + parts(["m"], 4) + parts(["m"], 2):
        words = command(one, options, Path("work"))
        number = words[words.index("--num_processes") + 1] if "--num_processes" in words else "1"
        checkpoints = (
            words[words.index("--fsdp_activation_checkpointing") + 1] if "--use_fsdp" in words else ""
        )
        shown[one.what, one.gpus] = (number, checkpoints)
    assert shown["ddp", 4] == ("4", "") and shown["ddp two", 2] == ("2", "")
    assert shown[SHARDED, 4] == ("4", "false") and shown["fsdp2 two", 2] == ("2", "false")
    assert shown[RESUMED, 2] == ("2", "false") and shown[RESUMED, 1] == ("1", "") == shown[ONE, 1]
    assert shown[LARGE_DISTILLED, 4] == ("4", "true")
    assert shown["llama-3-70b tensor parallel", 4] == ("4", "")
    assert shown["llama-3-70b device_map", 4] == ("1", "") == shown["notebook", 4]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--gpus", "3", "--model", "m"], "--rows 8 are shared out among 3 GPUs"),
        (["--toy", "--only", "one", "resume"], "--only knows no resume"),
    ],
    ids=["rows that GPUs cannot share", "parts that are not known"],
)
def test_what_would_not_run_is_refused(
    flags: list[str], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of parts that are not known nothing would run, and nothing would say so."""
    monkeypatch.setattr(sys, "argv", ["many_gpus", "--out", "o", *flags])
    with pytest.raises(SystemExit):
        main()
    assert said in capsys.readouterr().err


def names_of(part_of: str, models: list[str], gpus: int = 2) -> list[str]:
    """Scenes of a part."""
    return list(scenes(argparse.Namespace(part=part_of, model=models, rows=8, gpus=gpus)))


@pytest.mark.parametrize("gpus", [2, 4])
@pytest.mark.parametrize("part_of", ["ddp", SHARDED, KILLED, RESUMED])
def test_one_gpu_does_what_several_are_compared_with(part_of: str, gpus: int) -> None:
    """Every scene in which routers are distilled has one with as many rows a GPU, of `rows` one with the same
    rows as well, and every other scene itself; the one that kills comes last."""
    several = names_of(part_of, ["m/small", "m/large"], gpus)
    one = {*names_of(ONE, ["m/small"], gpus), *names_of(ONE_LARGE, ["m/large"], gpus)}
    trained = [name for name in several if name.endswith(" rows") and "all weights" not in name]
    for name in trained:
        model, _, rows = name.removesuffix(" rows").rpartition(", ")
        assert f"{model}, {int(rows) // gpus} rows" in one
        assert name in one or int(rows) == 8 * gpus
    assert set(several) - {"where the time goes", KILLED, *trained} <= one
    assert KILLED not in several or several[-1] == KILLED


def test_both_models_are_trained_with_both_batches() -> None:
    rows = ["small, 16 rows", "small, 8 rows", "large, 16 rows", "large, 8 rows"]
    assert names_of("ddp", ["m/small", "m/large"])[:4] == rows
    assert set(rows) <= set(names_of(SHARDED, ["m/small", "m/large"]))
    leaving = ["large, leaving, 16 rows", "large, leaving, 8 rows"]
    assert names_of("ddp", ["m/small", "m/large"])[4:6] == leaving
    assert set(leaving) <= set(names_of(SHARDED, ["m/small", "m/large"]))
    assert names_of("ddp", ["m/small"])[4:5] == ["small, 8 rows, step by step"]
    for two in OF_TWO.values():
        assert names_of(two, ["m/large"], 4) == [*rows[2:], *leaving]


def test_what_is_killed_is_held_against_every_step_of_one_gpu_and_of_several() -> None:
    meant = stepwise("m/small", 8)
    assert names_of(KILLED, ["m/small"]) == [meant, KILLED] and meant in names_of(ONE, ["m/small"])
    assert DIES_AT > SAVED_AT, "no checkpoint yet"


def test_several_gpus_are_compared_with_one() -> None:
    def run(losses: list[float], rows: int, speed: float | None = None, first: int = 1) -> dict[str, Any]:
        lines = [{"step": first + i, "loss": loss, "keep_ratio": 0.5} for i, loss in enumerate(losses)]
        return {"lines": lines, "rows": rows} | ({} if speed is None else {"tokens_per_s": speed})

    one = {"m, 8 rows": run([3.0, 2.0, 1.0], 8, 100.0), "m, 4 rows": run([3.5, 2.5], 4, 95.0)}
    one[stepwise("m", 8)] = run([2.5, 2.0, 1.5], 8)
    meant = {UNINTERRUPTED: stepwise("m", 8)}
    ddp = {
        "m, 16 rows": run([3.0], 16, 180.0), "m, 8 rows": run([3.0, 2.1, 1.0], 8, 190.0),
        "big, 8 rows": run([4.25, 3.0], 8, 60.0), "where the time goes": {"rows": 8},
    }  # fmt: skip
    found: dict[str, dict[str, Any]] = {
        "one large": {"processes": 1, "scenes": {"big, 8 rows": run([4.0, 3.0], 8, 40.0)}},
        "one": {"processes": 1, "scenes": one},
        "ddp": {"processes": 2, "scenes": ddp},
        KILLED: {"processes": 2, "scenes": {stepwise("m", 8): run([3.0, 2.125, 1.0], 8)}},
        RESUMED: {"processes": 1, "scenes": {KILLED: run([2.25], 8, first=2) | meant}},
        "fsdp2": {"processes": 2, "scenes": {"other, 8 rows": run([3.0], 8, 1.0)}},
        "alone": {"processes": 1},
    }
    said = compared(found)
    own = {f"{TIMES}, as many rows a GPU": 1.8, f"{EFFICIENCY}, of one GPU": 0.9}
    assert said["ddp, m, 16 rows"] == own
    assert said["ddp, m, 8 rows"][f"{TIMES}, the same global batch"] == 1.9
    assert said["ddp, m, 8 rows"][f"{TIMES}, as many rows a GPU"] == 2.0
    assert abs(said["ddp, m, 8 rows"]["largest difference of loss"] - 0.1) < 1e-9
    assert said["ddp, big, 8 rows"][f"{TIMES}, the same global batch"] == 1.5
    assert said["ddp, big, 8 rows"]["largest difference of loss"] == 0.25
    alike = {"log lines compared": 1, "largest difference of keep_ratio": 0.0}
    assert said[f"{RESUMED}, {KILLED}"] == alike | {"largest difference of loss": 0.25}
    against = f"{RESUMED}, {KILLED}, against several GPUs {UNINTERRUPTED}"
    assert said[against] == alike | {"largest difference of loss": 0.125}
    assert not any(name.startswith(("fsdp2", "one")) for name in said)  # that model of one GPU has not run
    del found["one"]
    assert f"{RESUMED}, {KILLED}" not in compared(found), "the large model is another"
    assert against in compared(found)


def test_four_gpus_are_compared_with_two() -> None:
    def run(rows: int, speed: float) -> dict[str, Any]:
        return {"lines": [], "rows": rows, "tokens_per_s": speed}

    found: dict[str, dict[str, Any]] = {
        "one": {"processes": 1, "scenes": {"m, 8 rows": run(8, 100.0)}},
        "ddp two": {"processes": 2, "scenes": {"m, 16 rows": run(16, 180.0), "m, 8 rows": run(8, 160.0)}},
        "ddp": {"processes": 4, "scenes": {"m, 32 rows": run(32, 342.0), "m, 8 rows": run(8, 240.0)}},
    }
    said = compared(found)
    assert said["ddp, m, 32 rows"] == {
        f"{TIMES}, as many rows a GPU": 3.42, f"{EFFICIENCY}, of one GPU": 0.855,
        f"{TIMES_TWO}, as many rows a GPU": 1.9, f"{EFFICIENCY}, of two GPUs": 0.95,
    }  # fmt: skip
    assert said["ddp, m, 8 rows"][f"{TIMES_TWO}, the same global batch"] == 1.5
    assert said["ddp two, m, 16 rows"] == {
        f"{TIMES}, as many rows a GPU": 1.8, f"{EFFICIENCY}, of one GPU": 0.9,
    }  # fmt: skip


def test_inference_is_compared_once_both_have_found_it(tmp_path: Path) -> None:
    def leave(part_of: str, kept: list[bool], tokens: list[int]) -> None:
        found = {"logits": torch.ones(2) * len(tokens), "keep": torch.tensor(kept)}
        torch.save(found | {"tokens": torch.tensor([tokens])}, tmp_path / f"{part_of} by layer.pt")

    leave("device_map", [True, False, False, True], [5, 6, 7])
    assert against_one(tmp_path, "device_map", "by layer") == {}
    leave(ALONE, [True, False, True, True], [5, 8, 7])
    assert against_one(tmp_path, "device_map", "by layer") == {
        "largest difference of logits": 0.0, "largest logit": 3.0, "decided alike": 0.75, "same tokens": 1,
        "of tokens": NEW_TOKENS,
    }  # fmt: skip
    assert against_one(tmp_path, ALONE, "by layer") == {} == against_one(tmp_path, "device_map", "by KV head")


def test_what_inference_said_stands_with_what_else_is_compared() -> None:
    """Though no training of one GPU is there; what one GPU found itself is held against nothing."""
    off = dict.fromkeys(OF_INFERENCE, 0.5)
    own: dict[str, Any] = {"kv_bytes": {"cuda:0": 9}}
    found: dict[str, dict[str, Any]] = {
        "ddp": {"processes": 2, "scenes": {"m, 8 rows": {"lines": [], "rows": 8, "tokens_per_s": 1.0}}},
        "tensor parallel": {"context": 9, "by layer, float32": own | off, "by layer, bfloat16": own},
        ALONE: {"by layer, float32": own},
    }
    assert compared(found) == {"tensor parallel, by layer, float32": off}


def test_peaks_are_forgotten_of_gpus_that_nothing_has_used_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is asked for by its number is an "Invalid device argument" before CUDA has begun."""
    begun: list[bool] = []
    forgotten: list[int] = []

    def reset(number: int) -> None:
        assert begun, "Invalid device argument"
        forgotten.append(number)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "init", lambda: begun.append(True))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", reset)
    worker.forget_peaks()
    assert forgotten == [0, 1]


def toy(folder: Path, part_of: str) -> argparse.Namespace:
    """Options of a part that trains a tiny model, whose rows are written."""
    config = LlamaConfig(
        vocab_size=256, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder / "tiny")
    torch.save(torch.randint(3, 250, (24, 192)), folder / "rows_tiny.pt")
    return argparse.Namespace(
        part=part_of,
        toy=True,
        model=[str(folder / "tiny")],
        work=folder,
        rows=2,
        gpus=2,
        steps=12,
        length=192,
    )


def test_a_run_is_taken_up_at_its_checkpoint_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Begun at its first step it would agree with one GPU to the last bit, and show nothing."""
    options = toy(tmp_path, RESUMED)
    with pytest.raises(ModlabError, match="no checkpoint to take up: run the part 'killed' first"):
        training.taken_up(options)

    def kill(*_: int) -> None:
        raise SystemExit("killed")

    monkeypatch.setattr(training.os, "kill", kill)
    with pytest.raises(SystemExit, match="killed"):
        training.killed(options)
    meant = training.each_step(options, options.model[0], options.rows)
    for _ in range(2):  # it stays there for a second call
        found = training.taken_up(options)
        assert found["taken up at step"] == SAVED_AT
        assert [line["step"] for line in found["lines"]] == list(range(SAVED_AT + 1, options.steps + 1))
        for line, expected in zip(found["lines"], meant["lines"][SAVED_AT:], strict=True):
            assert {**line, **TIMES_OF} == {**expected, **TIMES_OF}
    assert [path.name for path in (tmp_path / KILLED / "checkpoints").iterdir()] == [f"step_{SAVED_AT}"]


def test_all_weights_that_do_not_fit_are_left_out(tmp_path: Path) -> None:
    """On one GPU of the rows that several share; what comes after runs."""
    options = toy(tmp_path, ONE)
    options.memory = 1e-6
    found = training.all_weights(options, options.model[0], options.rows)
    assert found["left out"] == "they do not fit" and found["planned"] and "lines" not in found


TIMES_OF = {"seconds": 0.0, "tokens_per_s": 0.0}
"""What of a line another run has otherwise."""


def test_what_a_killed_run_had_said_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And of one that its limit has ended; of one that came to its end it is told already."""
    options = argparse.Namespace(out=tmp_path, rows=8, toy=True)
    monkeypatch.setattr(sys, "argv", ["many_gpus"])
    results = Results(options, tmp_path)
    (tmp_path / KILLED / "checkpoints" / "step_4").mkdir(parents=True)
    (tmp_path / "killed.jsonl").write_text('{"step": 1}\n{"step": 2}\n')
    (tmp_path / "killed.log").write_text("a process is gone")
    results.add(Part(KILLED, ("m/small",), 2), Ended(1, 9.0, [], 0))
    told = results.found[KILLED]["scenes"][KILLED]
    assert told["checkpoints"] == ["step_4"] and told["lines"] == [{"step": 1}, {"step": 2}]
    assert told[UNINTERRUPTED] == stepwise("m/small", 8)
    (tmp_path / "resumed.jsonl").write_text('{"step": 5}\n')
    (tmp_path / "resumed.json").write_text('{"scenes": {"killed": {"lines": [{"step": 5}, {"step": 6}]}}}')
    results.add(Part(RESUMED, ("m/small",), 1), Ended(0, 9.0, [], 0))
    assert len(results.found[RESUMED]["scenes"][KILLED]["lines"]) == 2


def test_what_an_earlier_call_left_does_not_pass_for_a_parts_own(tmp_path: Path) -> None:
    """Except the checkpoint that is to be taken up."""
    checkpoint, own = tmp_path / KILLED / "checkpoints" / "step_4", tmp_path / RESUMED
    checkpoint.mkdir(parents=True)
    own.mkdir()
    for name in ("killed.json", "killed.jsonl", "resumed.json", "resumed.jsonl", "tensor_parallel.json"):
        (tmp_path / name).touch()
    for name in ("tensor parallel by layer.pt", "alone by layer.pt", "rows_m.pt"):
        (tmp_path / name).touch()
    forget(part(RESUMED, 1), tmp_path)
    assert checkpoint.exists() and not own.exists() and not (tmp_path / "resumed.json").exists()
    forget(part("tensor parallel", 2), tmp_path)
    forget(part(KILLED, 2), tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["alone by layer.pt", "rows_m.pt"]


@pytest.mark.long
def test_a_sharded_run_whose_process_is_killed_is_taken_up_by_one(tmp_path: Path) -> None:
    """The scene as it runs on GPUs, with two gloo processes that FSDP2 shards: at every step the loss, KL and
    keep ratio of the run that nothing has ended, in both and in one."""
    command = [sys.executable, "-m", "benchmarks.many_gpus", "--toy", "--seconds", "240"]
    command += ["--out", str(tmp_path), "--work", str(tmp_path / "work"), "--only", KILLED, RESUMED, ONE]
    finished(command)
    (file,) = tmp_path.glob("*.json")
    record = json.loads(file.read_text())
    told = {name: record["parts"][name]["scenes"][KILLED] for name in (KILLED, RESUMED)}
    assert told[KILLED]["checkpoints"] == [f"step_{SAVED_AT}"]
    assert told[RESUMED]["taken up at step"] == SAVED_AT
    lines = {f"{KILLED}, {KILLED}": DIES_AT, f"{RESUMED}, {KILLED}": 8 - SAVED_AT}
    for name, count in lines.items():
        for against in (name, f"{name}, against several GPUs {UNINTERRUPTED}"):
            said = record["compared"][against]
            assert said.pop("log lines compared") == count
            assert len(said) == 3 and max(said.values()) < 1e-5


def test_calls_are_joined_by_their_parts() -> None:
    def call(command: str, **of_parts: Any) -> dict[str, Any]:
        return {"toy": False, "command": command, "random weights": [], "parts": of_parts}

    lines = [{"step": 4, "loss": 2.0}]
    scene = {"lines": lines, "rows": 8, "tokens_per_s": 100.0}
    first = call("a", ddp={"processes": 2, "scenes": {"m, 8 rows": scene | {"tokens_per_s": 150.0}}}, one={})
    later = call("b", one={"processes": 1, "scenes": {"m, 8 rows": scene}})
    found = joined("Two calls.", [(first, ["ddp"]), (later, ["one"])])
    assert found["command"] == ["a", "b"] and found["note"] == "Two calls."
    assert {name: one["command"] for name, one in found["parts"].items()} == {"ddp": "a", "one": "b"}
    assert found["compared"]["ddp, m, 8 rows"][f"{TIMES}, the same global batch"] == 1.5
    trial = first | {"toy": True}
    for again in ([(first, ["one"]), (later, ["one"])], [(later, ["ddp"])], [(trial, ["ddp"])]):
        with pytest.raises(ModlabError, match="take each part from one real call"):
            joined("", again)


def test_a_breakdown_counts_kernels_once() -> None:
    """Ranges on a GPU hold kernels, and those of NCCL have a range too."""

    def event(key: str, count: int, device: str, us: float = 0.0, annotation: bool = False) -> Any:
        return SimpleNamespace(
            key=key, count=count, device_type=f"DeviceType.{device}", self_device_time_total=us,
            self_cpu_time_total=us, is_user_annotation=annotation,
        )  # fmt: skip

    found = summed(
        [
            event("ncclDevKernel_AllReduce", 6, "CUDA", 4000.0),
            event("nccl:all_reduce", 6, "CUDA", 4000.0),
            event("step", 2, "CUDA", 9000.0, annotation=True),
            event("gemm", 10, "CUDA", 20000.0),
            event("aten::mm", 10, "CPU", 100.0),
            event("cudaLaunchKernel", 8, "CPU", 50.0),
            event("cudaStreamSynchronize", 2, "CPU", 3000.0),
        ],
        steps=2,
    )
    assert found == {
        "kernels, ms": 10.0, "kernels": 5, "collectives, ms": 2.0, "collectives": 3, "launches": 4,
        "waits": 1, "waits, ms": 1.5,
    }  # fmt: skip


def test_a_breakdown_watches_so_many_steps_of_each_kind() -> None:
    watch = Breakdown(first=1, steps=2)
    for step in range(1, watch.last + 1):
        torch.ones(3).sum()
        watch.step(step)
    assert watch.last == 5
    (own,) = watch.of_all()["processes"]
    assert own["ms a step"] >= own["until launched, ms"] > 0
    assert own["kernels"] == 0 or torch.cuda.is_available()
