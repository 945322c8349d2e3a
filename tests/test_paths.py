"""What lies here and what no system has are told apart, on every Python."""

from __future__ import annotations

from pathlib import Path

import pytest

from modlab.errors import ModlabError
from modlab.paths import exists

SAID = "{!r} is no name: {}"


def test_what_lies_here_and_what_does_not(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    assert exists(tmp_path, SAID) and exists(str(tmp_path / "file"), SAID)
    for name in ("other", "file/under", "loop", "a\0b"):
        assert not exists(tmp_path / name, SAID)


def test_a_text_is_no_name_even_where_python_is_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "exists", lambda self, **_: False)  # as Python 3.14 answers
    with pytest.raises(ModlabError, match=r"^'a whole text.{48}' is no name: File name too long$"):
        exists("a whole text. " * 400, SAID)
