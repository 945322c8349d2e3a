"""Where a run starts: afresh, or from a checkpoint that it can go on from as if it had never stopped."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from modlab.errors import ModlabError
from modlab.routing.state import set_keep_recent
from modlab.training.checkpoints import checkpoints, read_state
from modlab.training.config import TrainConfig
from modlab.training.folder import LOG, same

# What a resumed run must share with the one that it continues: the rows of each step, the weights, what is
# routed and what is trained. Other settings may change from here on.
KEPT = ("global_batch", "seed", "objective", "freeze_base", "freeze_below", "data", "mod")
OF_THE_MODEL = ("model", "parameters")
FREE = ("mod.init_gate",)  # of what is kept: it is for a fresh conversion


def find_checkpoint(config: TrainConfig) -> Path | None:
    """The checkpoint to start from, or None for a fresh run.

    Raises:
        ModlabError: `out` holds a run that is not to be resumed, or there is no such checkpoint.
    """
    if config.out is None:
        return None
    out = Path(config.out)
    if out.exists() and not out.is_dir():
        raise ModlabError(f"out={str(out)!r} is a file; give a folder.")
    saved = checkpoints(out)
    if config.resume is None:
        if any((out / name).exists() for name in (LOG, "checkpoints", "model")):
            raise ModlabError(
                f"{out} already holds a run: choose another folder, delete it, or set resume='auto' to "
                "continue it."
            )
        return None
    if str(config.resume) == "auto":
        if not saved and (out / "model").exists():
            raise ModlabError(
                f"{out} already holds a finished run but no complete checkpoint to go on from: choose "
                "another folder, or delete it."
            )
        return saved[-1] if saved else None
    path = Path(config.resume)
    if not path.is_dir():
        raise ModlabError(
            f"resume={str(path)!r} is no folder: give a .../checkpoints/step_N folder, or 'auto'."
        )
    if path.resolve() not in [p.resolve() for p in saved] and (saved or (out / LOG).exists()):
        raise ModlabError(
            f"{out} already holds a run, and resume={str(path)!r} is of another one: choose another folder."
        )
    return path


def resume_recent(path: Path, model: Any) -> None:
    """The model has the recent tokens of the checkpoint's run again: a finished run with a `recent_range` has
    left it those of a saving."""
    was = read_state(path).run.get("mod")
    if isinstance(was, dict) and isinstance(tokens := was.get("keep_recent"), int):
        set_keep_recent(model, tokens)


def check_resumable(path: Path, description: dict[str, Any]) -> None:
    """The run described can go on from the checkpoint `path`.

    Raises:
        ModlabError: it is damaged, or of a run that saw other data, or trained something else.
    """
    was = read_state(path).run
    differ = list(_differences(was, description, OF_THE_MODEL + KEPT))
    if not differ:
        return
    if any(name.startswith(OF_THE_MODEL) for name in differ):
        raise ModlabError(f"The checkpoint {path} belongs to another model: {', '.join(differ)}.")
    raise ModlabError(
        f"Resuming {path} needs the data and the settings it was trained with, but this differs: "
        f"{', '.join(differ)}."
    )


def _differences(was: dict[str, Any], now: dict[str, Any], names: tuple[str, ...]) -> Iterator[str]:
    before, after = (dict(_flat({name: d.get(name) for name in names})) for d in (was, now))
    for name in sorted(before.keys() | after.keys()):
        if name not in FREE and not same(before.get(name), after.get(name)):
            yield f"{name}={after.get(name)} (was {before.get(name)})"


def _flat(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value
