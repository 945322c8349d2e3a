"""A folder that is saved to while it is read."""

import os
import shutil
from pathlib import Path

import pytest

from modlab.errors import ModlabError
from modlab.saving import atomic
from modlab.saving.atomic import atomic_directory
from modlab.saving.locks import try_lock
from modlab.saving.reading import ATTEMPTS, undisturbed


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "model"
    made.mkdir()
    (made / "config.json").write_text("old")
    return made


def pass_on(folder: Path) -> None:
    """What a save does last: the same files in another directory of that name, the first one removed."""
    other = folder.with_name("other")
    shutil.copytree(folder, other, copy_function=os.link)
    folder.rename(folder.with_name("gone"))
    other.rename(folder)
    shutil.rmtree(folder.with_name("gone"))


def test_a_folder_that_is_removed_under_a_reader_is_read_again(folder: Path) -> None:
    attempts = []

    def read() -> str:
        attempts.append(1)
        if len(attempts) == 1:
            listed = os.scandir(folder)
            pass_on(folder)
            if not any(entry.name == "config.json" for entry in listed):
                raise ModlabError("no config")
        return (folder / "config.json").read_text()

    assert undisturbed(folder, read) == "old" and len(attempts) == 2


def test_an_error_of_a_folder_at_rest_is_raised_at_once(folder: Path) -> None:
    attempts = []

    def read() -> None:
        attempts.append(1)
        (folder / "a log of the reader").touch()
        raise ModlabError("bad")

    with pytest.raises(ModlabError, match="bad"):
        undisturbed(folder, read)
    assert len(attempts) == 1


def test_a_folder_that_never_rests(folder: Path) -> None:
    attempts = []

    def read() -> None:
        attempts.append(1)
        pass_on(folder)

    with pytest.raises(ModlabError, match="load it again later"):
        undisturbed(folder, read)
    assert len(attempts) == ATTEMPTS


def test_readers_wait_while_the_new_files_lie_in_a_folder_that_will_go(folder: Path, monkeypatch) -> None:
    take_over, met = atomic._take_over, []

    def look(*arguments) -> None:
        try:
            met.append(try_lock(folder, shared=True))
        except BlockingIOError:
            met.append("waits")
        take_over(*arguments)

    monkeypatch.setattr(atomic, "_take_over", look)
    with atomic_directory(folder) as new:
        (new / "config.json").write_text("new")
    assert met == ["waits"] and (folder / "config.json").read_text() == "new"
