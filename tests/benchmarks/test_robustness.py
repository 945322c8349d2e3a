"""Kills while a folder is overwritten, and damaged files: a few of each by default, thousands with --long."""

from __future__ import annotations

import json
from random import Random

import pytest

from benchmarks.robustness import __main__ as command
from benchmarks.robustness.decoding import CASES, SAMPLES, Decoded, decode, growth
from benchmarks.robustness.fuzz import Parser, folder_parsers, fuzz, parsers
from benchmarks.robustness.kills import KINDS, kill_savers
from benchmarks.robustness.mutations import mutated, mutated_json
from modlab import ModlabError

NAMES = (
    "modlab_config.json",
    "MoDConfig",
    "modlab_router.safetensors",
    "modlab_router.safetensors, first format",
    "trace",
    "results",
)


@pytest.fixture
def inputs(request) -> int:
    return 5_000 if request.config.getoption("--long") else 150


@pytest.mark.parametrize("name", NAMES)
def test_damaged_files_are_refused_or_read_rightly(name, inputs, tmp_path) -> None:
    outcome = fuzz(name, parsers(tmp_path)[name], inputs)
    assert not outcome.crashed, outcome.traceback
    assert not outcome.wrong
    assert outcome.refused + outcome.read == inputs and outcome.refused > inputs / 10


@pytest.mark.timeout(1800)
def test_damaged_folders_are_refused_or_are_the_model_that_was_saved(request, tmp_path) -> None:
    inputs = 5_000 if request.config.getoption("--long") else 21
    for name, parser in folder_parsers(tmp_path).items():
        outcome = fuzz(name, parser, inputs)
        assert not outcome.crashed, f"{name}: {outcome.traceback}"
        assert not outcome.wrong, name


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("kind", KINDS)
def test_kills_leave_a_whole_folder(kind, request, tmp_path) -> None:
    kills = 200 if request.config.getoption("--long") else 4
    killed = kill_savers(kind, kills, tmp_path)
    assert killed.first + killed.second == kills
    assert not (killed.mixed or killed.refused or killed.lost or killed.leftovers)


def test_every_parser_is_tried(tmp_path) -> None:
    assert tuple(parsers(tmp_path)) == NAMES


def test_a_parser_that_crashes_or_reads_wrongly_is_noticed(tmp_path) -> None:
    (tmp_path / "file").write_bytes(b"0123456789")

    def read(file) -> bytes:
        content = file.read_bytes()
        if len(content) > 10:
            raise ModlabError("too long")
        if len(content) < 10:
            raise RuntimeError("too short")
        return content

    outcome = fuzz("digits", Parser(tmp_path / "file", read, lambda found: found == b"0123456789"), 200)
    assert outcome.refused and outcome.wrong and outcome.crashed and "too short" in outcome.traceback


@pytest.mark.parametrize("case", CASES)
def test_a_long_decoding_holds_what_it_may(case: str) -> None:
    found = decode(case, 1000)
    assert not found.grew and len(found.samples) == SAMPLES
    assert 0 < found.samples[-1][2] <= found.bound < 250


def test_growth_is_noticed() -> None:
    """Of tokens in a layer, of the cache's bytes, of the process."""

    def grown(stored: int = 0, cache: int = 0, process: int = 0) -> str:
        samples = [(1000 * i, 100 + cache * i, 10 + stored * i, 10**8 + process * i) for i in range(SAMPLES)]
        return growth(Decoded("case", 20_000, bound=20, samples=samples))

    assert not grown()
    assert grown(stored=1).startswith("a layer stored 29 tokens")
    assert grown(cache=30).startswith("the cache grew from 250 to 670 bytes")
    assert grown(process=2**22).startswith("the process grew by")


def test_damage_is_the_same_for_one_seed() -> None:
    text = json.dumps({"a": [1, 2, {"b": None}], "c": "d"}).encode()
    for damage in (mutated, mutated_json):
        made = [damage(text, Random(seed)) for seed in range(100)]
        assert made == [damage(text, Random(seed)) for seed in range(100)]
        assert sum(one != text for one in made) > 80


def test_the_command_writes_what_it_found(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(command, "KINDS", ())
    monkeypatch.setattr(command, "folder_parsers", lambda folder: {})
    monkeypatch.setattr("sys.argv", ["robustness", "--inputs", "3", "--tokens", "40", "--out", str(tmp_path)])
    assert command.main() == 0
    (file,) = tmp_path.glob("robustness_cpu_*.json")
    result = json.loads(file.read_text())
    assert [row["parser"] for row in result["files"]] == [*NAMES] and result["kills"] == []
    assert [(row["tokens"], row["grew"]) for row in result["decoding"]] == [(40, "")] * len(CASES)
    assert all(row["inputs"] == 3 for row in result["files"]) and result["versions"]["torch"]


def test_a_part_is_written_apart(tmp_path, monkeypatch) -> None:
    found = {"kind": "model", "kills": 2, "mixed": [1], "refused": [], "lost": [], "leftovers": []}
    monkeypatch.setattr(command, "_killed", lambda kind, kills: found)
    monkeypatch.setattr("sys.argv", ["robustness", "--parts", "kills", "--out", str(tmp_path)])
    assert command.main() == 1, "a mixture is a failure"
    (file,) = tmp_path.glob("robustness_cpu_kills_*.json")
    result = json.loads(file.read_text())
    assert result["kills"] == [found] * len(KINDS) and "--parts kills --kills 200" in result["command"]
    assert not {"files", "folders", "decoding"} & set(result)
