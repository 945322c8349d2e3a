"""modlab_config.json says what it must, in types that it must; anything else is a ModlabError."""

from __future__ import annotations

import json
from typing import Any

import pytest

import modlab
from modlab.errors import ModlabError
from modlab.saving.description import read_description
from modlab.saving.json_files import read_object

HASH = "0" * 64
RIGHT: dict[str, Any] = {
    "format": 2,
    "config": modlab.MoDConfig().to_dict(),
    "thresholds": {"1": 0.25, "3": 0.5},
    "base_model": "somebody/model",
    "base_trained": False,
    "routers": HASH,
    "weights": {"model.safetensors": HASH},
}


def read(values: Any, tmp_path) -> Any:
    text = values if isinstance(values, str) else json.dumps(values)
    (tmp_path / "modlab_config.json").write_text(text)
    return read_description(tmp_path / "modlab_config.json", "folder")


def test_what_is_right_is_read(tmp_path) -> None:
    found = read(RIGHT, tmp_path)
    assert found.config == modlab.MoDConfig() and found.thresholds == {1: 0.25, 3: 0.5}
    assert (found.base_model, found.base_trained, found.routers) == ("somebody/model", False, HASH)


def test_the_first_format_is_read(tmp_path) -> None:
    """It has no number, no hashes, and in the beginning no base."""
    found = read({"config": {"skip": "layer", "format_version": 1}, "thresholds": {"1": 0.5}}, tmp_path)
    assert found.base_trained and found.routers is None and found.weights == {} and found.base_model is None


@pytest.mark.parametrize(
    "change",
    [
        {"format": 3},
        {"format": 0},
        {"format": "2"},
        {"format": True},
        {"format": None},
        {"config": None},
        {"config": []},
        {"config": {"keep_recent": 1.5}},
        {"config": {"keep_recent": True}},
        {"config": {"keep_first": "4"} | {"keep_first": [4]}},
        {"config": {"keep_first": 10**30}},
        {"config": {"format_version": 2}},
        {"config": {"format_version": None}},
        {"config": {"layers": [1.5]}},
        {"config": {"layers": {"1": 2}}},
        {"config": {"p": {"x": 0.5}}},
        {"config": {"capacity": "0.5"}},
        {"config": {"init_gate": None}},
        {"config": {"no such field": 1}},
        {"thresholds": {}},
        {"thresholds": [0.5]},
        {"thresholds": {"1": 1.0}},
        {"thresholds": {"1": True}},
        {"thresholds": {"1": "0.5"}},
        {"thresholds": {"1": None}},
        {"thresholds": {"01": 0.5}},
        {"thresholds": {"-1": 0.5}},
        {"thresholds": {"1.0": 0.5}},
        {"thresholds": {"9" * 5000: 0.5}},
        {"base_model": 3},
        {"base_model": ""},
        {"base_model": "a\0b"},
        {"base_trained": None},
        {"base_trained": 1},
        {"routers": "abc"},
        {"routers": 5},
        {"weights": None},
        {"weights": {"../model.safetensors": HASH}},
        {"weights": {"/etc/passwd": HASH}},
        {"weights": {"model.safetensors": None}},
        {"more": 1},
    ],
    ids=lambda change: json.dumps(change)[:60],
)
def test_wrong_values_are_refused(tmp_path, change) -> None:
    with pytest.raises(ModlabError, match=r"modlab_config.json in 'folder'"):
        read({**RIGHT, **change}, tmp_path)


@pytest.mark.parametrize("name", ["config", "thresholds", "routers", "weights"])
def test_missing_values_are_refused(tmp_path, name) -> None:
    with pytest.raises(ModlabError, match="missing"):
        read({key: value for key, value in RIGHT.items() if key != name}, tmp_path)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "null",
        "[]",
        '"x"',
        "[" * 100_000,
        '{"thresholds": NaN}',
        '{"a": 1e999}',
        "\x00",
        "9" * 9999,
    ],
)
def test_files_that_are_no_description(tmp_path, text) -> None:
    with pytest.raises(ModlabError):
        read(text, tmp_path)


def test_a_large_file_is_refused_unread(tmp_path, monkeypatch) -> None:
    with (tmp_path / "modlab_config.json").open("wb") as file:
        file.truncate(2**40)  # takes no place on the disk

    def read_text(*_: object, **__: object) -> str:
        raise AssertionError("it was read")

    monkeypatch.setattr(type(tmp_path), "read_text", read_text)
    with pytest.raises(ModlabError, match="at most"):
        read_description(tmp_path / "modlab_config.json", "folder")


def test_what_is_no_file_is_refused(tmp_path) -> None:
    for path in (tmp_path, tmp_path / "absent"):
        with pytest.raises(ModlabError, match="cannot be read.*do this"):
            read_object(path, "do this")
    (tmp_path / "latin").write_bytes(b'{"a": "\xe9"}')
    with pytest.raises(ModlabError, match="cannot be read"):
        read_object(tmp_path / "latin", "do this")
