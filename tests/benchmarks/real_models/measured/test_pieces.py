"""Pieces: each run once, in order, whoever asks; killed and failed ones again."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from benchmarks.real_models.measured.pieces import Folder, Piece, run_all


def piece(name: str, log: list[str], needs: tuple[str, ...] = (), fails: bool = False) -> Piece:
    def run() -> dict[str, object]:
        log.append(name)
        if fails:
            raise ValueError("no")
        return {"value": 1 / 3}

    return Piece(name, run, needs)


def quiet(text: str) -> None:
    pass


def test_pieces_run_once_and_after_what_they_need(tmp_path: Path) -> None:
    folder, log = Folder(tmp_path), list[str]()
    pieces = [piece("b", log, ("a",)), piece("a", log), piece("c", log)]
    assert run_all(pieces, folder, quiet) == [] and log == ["a", "b", "c"]
    assert run_all(pieces, folder, quiet) == [] and log == ["a", "b", "c"]
    assert folder.read("a")["value"] == 1 / 3 and not list(tmp_path.glob("*.claim"))


def test_a_failed_piece_takes_along_what_needs_it_and_is_tried_again_by_the_next_command(
    tmp_path: Path,
) -> None:
    folder, log = Folder(tmp_path), list[str]()
    pieces = [piece("a", log, fails=True), piece("c", log, ("b",)), piece("b", log, ("a",)), piece("d", log)]
    assert run_all(pieces, folder, quiet) == ["a"] and log == ["a", "d"]
    assert "ValueError: no" in folder.read("a.failed")["error"]
    pieces[0] = piece("a", log)
    assert run_all(pieces, folder, quiet) == [] and log == ["a", "d", "a", "b", "c"]
    assert not folder.done("a.failed")


def test_a_claim_of_a_live_process_is_kept_and_one_of_a_dead_process_is_not(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    assert folder.claim("a") and not folder.claim("a")
    folder.release("a")
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    (tmp_path / "a.claim").write_text(str(dead.pid))
    assert folder.claim("a")


def test_nothing_begins_after_the_deadline(tmp_path: Path) -> None:
    log: list[str] = []
    assert run_all([piece("a", log)], Folder(tmp_path), quiet, deadline=0.0) == [] and log == []
