"""A folder is whole old or whole new, whatever path names it and whenever the process dies."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from modlab.errors import ModlabError
from modlab.saving import atomic
from modlab.saving.atomic import atomic_directory
from modlab.saving.exchange import exchange

OLD = {"a": "old", "b": "old", "part/c": "old", "shard-2": "old", "mine.txt": "mine", "runs/log": "mine"}
NEW = {"a": "new", "b": "new", "part/c": "new", "d": "new", "mine.txt": "mine", "runs/log": "mine"}


def contents(folder: Path) -> dict[str, str]:
    """Text by path; hidden things too."""
    return {str(p.relative_to(folder)): p.read_text() for p in folder.rglob("*") if p.is_file()}


def write(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def save_new(path: str | Path) -> None:
    with atomic_directory(path, replaces=("shard-*",)) as folder:
        write(folder, {name: text for name, text in NEW.items() if text == "new"})


@pytest.fixture
def target(tmp_path) -> Path:
    """A folder in use: old files of ours, and the user's own."""
    write(tmp_path / "parent" / "target", OLD)
    write(tmp_path / "parent", {"sibling.txt": "mine", "a": "mine", "b": "mine"})
    return tmp_path / "parent" / "target"


def assert_only_the_target_is_new(target: Path) -> None:
    assert contents(target) == NEW
    others = {name: text for name, text in contents(target.parent).items() if not name.startswith("target")}
    assert others == {"sibling.txt": "mine", "a": "mine", "b": "mine"}


@pytest.mark.parametrize(
    ("stand_in", "path"),
    [
        ("target", "."),
        ("target", "./"),
        ("target/runs", ".."),
        ("target/runs", "../"),
        ("target", "runs/.."),
        ("target", "part/../runs/../."),
        (".", "target"),
        (".", "target/"),
        (".", "../parent/target"),
        ("target/runs", "../../target"),
    ],
)
def test_only_the_named_folder_is_touched(target, monkeypatch, stand_in, path) -> None:
    monkeypatch.chdir(target.parent / stand_in)
    inode = target.stat().st_ino
    save_new(path)
    assert_only_the_target_is_new(target)
    assert target.stat().st_ino == inode, "a shell that stands in the folder still does"
    assert Path.cwd() == target.parent / stand_in


def test_a_symbolic_link_means_the_folder_that_it_points_to(target, tmp_path) -> None:
    (tmp_path / "elsewhere").mkdir()
    link = tmp_path / "elsewhere" / "link"
    link.symlink_to(target)
    save_new(link)
    assert_only_the_target_is_new(target)
    save_new(link / "runs" / "..")
    assert_only_the_target_is_new(target)
    assert link.is_symlink() and [*link.parent.iterdir()] == [link]


def test_links_and_modes_of_the_user_stay(target) -> None:
    (target / "link").symlink_to("mine.txt")
    (target / "nowhere").symlink_to("absent")
    target.chmod(0o750)
    save_new(target)
    assert (target / "link").is_symlink() and (target / "nowhere").is_symlink()
    assert target.stat().st_mode & 0o777 == 0o750


def test_an_open_file_of_the_user_is_still_his(target) -> None:
    with (target / "runs" / "log").open("a") as log:
        save_new(target)
        log.write(" and more")
    assert (target / "runs" / "log").read_text() == "mine and more"


def test_names_that_are_no_folder(tmp_path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ModlabError, match="is a file"):
        save_new(tmp_path / "file")
    with pytest.raises(ModlabError, match="is empty"):
        save_new("")
    with pytest.raises(ModlabError, match="as it was"):
        save_new(tmp_path / "file" / "below")


def test_an_interrupted_block_is_forgotten(tmp_path) -> None:
    with pytest.raises(KeyboardInterrupt), atomic_directory(tmp_path / "x") as folder:
        (folder / "half").write_text("half")
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())


KILLED = """
import os, sys
from pathlib import Path
from modlab.saving import atomic
target, inside, at, exchanges = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4] == "True"
def refuse(*_):
    raise OSError(38, "cannot exchange")
if not exchanges:
    atomic.exchange = refuse
steps = 0
def counted(call):
    def step(*args, **kwargs):
        global steps
        steps += 1
        if steps == at:
            os._exit(9)
        return call(*args, **kwargs)
    return step
for module, names in ((os, ("link", "replace", "mkdir", "unlink", "rename", "rmdir", "open", "scandir")),
                      (atomic, ("exchange",))):
    for name in names:
        setattr(module, name, counted(getattr(module, name)))
with atomic.atomic_directory(target, replaces=("shard-*",)) as folder:
    for file in inside.rglob("*"):
        if file.is_file():
            (folder / file.relative_to(inside)).parent.mkdir(parents=True, exist_ok=True)
            (folder / file.relative_to(inside)).write_text(file.read_text())
os._exit(0)
"""


def killed_at(step: int, target: Path, new: Path, exchanges: bool) -> bool:
    """Whether a save was killed at call number `step` of the operating system; False: it was done before."""
    arguments = [str(target), str(new), str(step), str(exchanges)]
    code = subprocess.run([sys.executable, "-c", KILLED, *arguments], check=False).returncode
    assert code in (0, 9)
    return code == 9


def test_a_kill_at_any_step_leaves_old_or_new(target, tmp_path) -> None:
    """And the user's files; the next save finds nothing in its way and leaves nothing behind."""
    new = tmp_path / "new"
    write(new, {name: text for name, text in NEW.items() if text == "new"})
    seen, step = [], 1
    while killed_at(step, target, new, exchanges=True):
        found = contents(target)
        assert found in (OLD, NEW), f"killed at step {step}"
        seen.append(found)
        if found == NEW:
            for name in set(NEW) - set(OLD):
                (target / name).unlink()
            write(target, OLD)
        step += 1
    assert OLD in seen and NEW in seen
    save_new(target)
    assert_only_the_target_is_new(target)
    assert {path.name for path in target.parent.iterdir()} == {"target", "sibling.txt", "a", "b"}


def test_without_an_exchange_files_go_one_by_one(target, tmp_path, monkeypatch) -> None:
    """As on network file systems: a kill may leave old and new files, each whole, and never fewer of the
    user's."""

    def refuse(*_: object) -> None:
        raise OSError(22, "cannot exchange")

    with monkeypatch.context() as patch:
        patch.setattr(atomic, "exchange", refuse)
        save_new(target)
        assert_only_the_target_is_new(target)
    new = tmp_path / "new"
    write(new, {name: text for name, text in NEW.items() if text == "new"})
    for step in range(1, 60, 4):
        (target / "d").unlink(missing_ok=True)
        write(target, OLD)
        killed_at(step, target, new, exchanges=False)
        found = contents(target)
        assert found["mine.txt"] == found["runs/log"] == "mine"
        assert all(text in ("old", "new", "mine") for text in found.values())
    save_new(target)
    assert_only_the_target_is_new(target)


def test_the_hidden_folder_of_a_save_at_work_is_left_alone(target) -> None:
    with atomic_directory(target) as folder:
        save_new(target)  # cleans up what dead processes have left
        assert folder.is_dir()
        (folder / "a").write_text("newest")
    assert (target / "a").read_text() == "newest"


def test_a_folder_that_cannot_have_a_neighbour_is_filled_from_within(target, monkeypatch) -> None:
    """As a mounted one: its parent is another file system."""
    monkeypatch.setattr(atomic, "_same_disk", lambda one, other: False)
    save_new(target)
    assert_only_the_target_is_new(target)


def test_a_failure_half_way_says_that_files_may_be_mixed(target, monkeypatch) -> None:
    """The folder is as it was is said where that is true."""

    def refuse(*_: object) -> None:
        raise OSError(22, "cannot exchange")

    real, done = os.replace, []

    def full(source: Path, place: Path) -> None:
        if done:
            raise OSError(28, "No space left on device")
        done.append(place)
        real(source, place)

    monkeypatch.setattr(atomic, "exchange", refuse)
    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(ModlabError, match="may hold new and old files") as caught:
        save_new(target)
    assert "as it was" not in str(caught.value)
    assert contents(target) not in (OLD, NEW)


def test_a_failure_before_anything_is_replaced_leaves_the_folder_as_it_was(target, monkeypatch) -> None:
    with pytest.raises(ModlabError, match="as it was"), atomic_directory(target) as folder:
        (folder / "a").write_text("new")
        raise OSError(28, "No space left on device")
    assert contents(target) == OLD


def test_savers_of_one_folder_do_not_mix(target) -> None:
    """Whoever is last wins, with all of his files."""

    def save(number: int) -> None:
        for _ in range(5):
            with atomic_directory(target) as folder:
                write(folder, {"a": str(number), "b": str(number), "part/c": str(number)})

    threads = [threading.Thread(target=save, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = contents(target)
    assert found["a"] == found["b"] == found["part/c"] and found["mine.txt"] == "mine"
    assert {path.name for path in target.parent.iterdir()} == {"target", "sibling.txt", "a", "b"}


def test_exchange_of_what_is_not_there(tmp_path) -> None:
    (tmp_path / "one").mkdir()
    with pytest.raises(OSError):
        exchange(tmp_path / "one", tmp_path / "absent")
    assert (tmp_path / "one").is_dir()
