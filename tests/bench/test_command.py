"""A new benchmark case is a file of the folder: nothing lists the modules."""

import pkgutil
import sys

import pytest

from modlab import bench
from modlab.bench import command, registry
from modlab.errors import ModlabError


def test_every_module_of_the_folder_is_imported() -> None:
    command.register_cases()
    for module in pkgutil.iter_modules(bench.__path__, "modlab.bench."):
        assert module.name in sys.modules


def test_a_case_in_a_new_file_is_found(tmp_path, monkeypatch, capsys) -> None:
    """One file next to the others; the command lists it and runs it."""
    (tmp_path / "toy_case.py").write_text(
        "from modlab.bench.registry import case\n\n\n@case\ndef toy(settings):\n"
        '    """A case of a test."""\n    return iter(())\n'
    )
    monkeypatch.setattr(bench, "__path__", [*bench.__path__, str(tmp_path)])
    monkeypatch.setattr(registry, "CASES", registry.CASES)
    try:
        assert bench.main([]) == 0
        assert "toy        A case of a test." in capsys.readouterr().out
        assert bench.main(["toy", "--no-save"]) == 0
    finally:
        registry.CASES.pop("toy", None)
        sys.modules.pop("modlab.bench.toy_case", None)


def test_cases_keep_their_names() -> None:
    command.register_cases()
    assert set(registry.CASES) >= {"prefill", "decode", "demo", "generate", "growth", "speed", "train"}


def test_every_case_says_in_a_line_what_it_measures() -> None:
    command.register_cases()
    for name, run in registry.CASES.items():
        assert (run.__doc__ or "").splitlines()[0].endswith("."), name


@pytest.mark.parametrize(
    ("case", "said"), [("speed_kv", "it has long, short, unequal"), ("generate", "it has none")]
)
def test_a_part_that_a_case_does_not_have_is_refused(case: str, said: str) -> None:
    with pytest.raises(ModlabError, match=said):
        bench.main([case, "--only", "longest", "sort", "--no-save"])


def test_the_list_names_parts(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main([]) == 0
    assert "--only: long, short, unequal, decode, longest, throughput, static" in capsys.readouterr().out


def test_settings_know_which_parts_are_asked_for() -> None:
    options = command._parser().parse_args(["speed_kv", "--only", "short", "decode"])
    assert command._settings(options).only == ("short", "decode")
