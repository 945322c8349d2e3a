"""The folder of a run: run.json, log.jsonl, checkpoints/ and model/."""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from modlab.errors import ModlabError
from modlab.training.checkpoints import checkpoints, read_json, replace_text, write_json

LOG, RECORD, THRESHOLDS, HELD = "log.jsonl", "run.json", "thresholds.json", ".lock"


class RunFolder:
    """`TrainConfig.out`: only the main process writes, and nobody where there is no folder.

    run.json holds the run's description and

    - status: "running", or how the latest call ended: as `TrainResult.stopped`, or "failed";
    - model_step: the step that model/ is of, null where it is of an earlier, shorter run;
    - resumed: for each call that took the run up again its step and the settings that changed, as
      {name: [before, after]}.

    Args:
        out: the folder, or None.
        is_main: whether this is the main process.
    """

    def __init__(self, out: str | Path | None, is_main: bool) -> None:
        self.path = None if out is None else Path(out)
        self.writes = is_main
        self.record: dict[str, Any] = {}

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Inside, no other run may use the folder.

        Raises:
            ModlabError: another one does.
        """
        if self.path is None or not self.writes or os.name == "nt":  # Windows has no such locks
            yield
            return
        import fcntl

        self.path.mkdir(parents=True, exist_ok=True)
        # a file's lock: the folder's own is what saving model/ waits for
        file = os.open(self.path / HELD, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ModlabError(
                    f"{self.path} is in use by a training run that has not ended: choose another folder."
                ) from None
            except OSError:  # a file system without locks
                pass
            yield
        finally:
            os.close(file)

    def begin(self, description: dict[str, Any], step: int, steps_ahead: bool) -> list[dict[str, Any]]:
        """A run begins, or is taken up again after `step` steps: what lies behind that is cut off.

        Args:
            description: of the run, see `Run`.
            step: steps done.
            steps_ahead: whether there is anything left to train.

        Returns:
            the rows of the log up to `step`.
        """
        if self.path is None or not self.writes:
            return []
        before = self._read_record()
        resumed = before.get("resumed", [])
        if step:
            was = {name: value for name, value in before.items() if name in description}
            changed = {n: [v, description[n]] for n, v in was.items() if not same(v, description[n])}
            resumed = [*resumed, {"step": step, "changed": changed}]
        model_step = None if steps_ahead else before.get("model_step")
        self.record = {**description, "status": "running", "model_step": model_step, "resumed": resumed}
        for later in checkpoints(self.path):
            if int(later.name.removeprefix("step_")) > step:
                shutil.rmtree(later)
        rows = self._log_until(step)
        self._write_record()
        return rows

    def end(self, status: str) -> None:
        """A call ends; see run.json."""
        if self.path is not None and self.writes and self.record:
            self.record["status"] = status
            self._write_record()

    def write_thresholds(self, found: dict[float, dict[int, float]]) -> None:
        """thresholds.json: by ratio and layer, what a distilled model is given."""
        if self.path is not None and self.writes:
            named = {f"{ratio:g}": {str(i): p for i, p in by.items()} for ratio, by in found.items()}
            write_json(self.path / THRESHOLDS, named)

    def prune(self, keep_last: int) -> None:
        """A checkpoint has been written: older ones go, and a model of a shorter run."""
        if self.path is not None and self.writes:
            for old in checkpoints(self.path)[:-keep_last]:
                shutil.rmtree(old)
            if self.record["model_step"] is None and (self.path / "model").is_dir():
                shutil.rmtree(self.path / "model")

    def save_model(
        self, model: Any, tokenizer: Any, step: int, state: dict[str, Tensor] | None = None
    ) -> None:
        """model/, whole or not at all, unless it is this step's already.

        Args:
            state: the weights to save, by name, where the model itself is sharded.
        """
        from modlab.saving.atomic import atomic_directory

        if self.path is None or not self.writes:
            return
        if self.record["model_step"] == step and (self.path / "model").exists():
            return
        with atomic_directory(self.path / "model") as temporary:
            _save(model, temporary, state)
            if tokenizer is not None:
                tokenizer.save_pretrained(temporary)
        self.record["model_step"] = step

    def add_row(self, row: dict[str, Any]) -> None:
        """One more line of the log."""
        if self.path is not None and self.writes:
            with open(self.path / LOG, "a", encoding="utf-8") as file:
                file.write(_line(row))

    def write_log(self, rows: Iterable[dict[str, Any]]) -> None:
        """Rewrites the log with these rows."""
        if self.path is not None and self.writes:
            replace_text(self.path / LOG, "".join(map(_line, rows)))

    def _log_until(self, step: int) -> list[dict[str, Any]]:
        if self.path is None or not (self.path / LOG).exists():
            return []
        rows = []
        for line in (self.path / LOG).read_text(encoding="utf-8", errors="replace").splitlines():
            row = _row(line)
            if row is not None and row["step"] <= step:
                rows.append(row)
        self.write_log(rows)
        return rows

    def _read_record(self) -> dict[str, Any]:
        assert self.path is not None
        path = self.path / RECORD
        if not path.exists():
            return {}
        try:
            record = read_json(path)
            model_step, resumed = record.get("model_step"), record.get("resumed", [])
            if not (model_step is None or type(model_step) is int) or not isinstance(resumed, list):
                raise ValueError("its model_step or resumed is no number or list")
        except (OSError, ValueError) as error:
            raise ModlabError(
                f"{path} is damaged ({error}): delete it; the checkpoints know all that a run needs."
            ) from error
        return record

    def _write_record(self) -> None:
        assert self.path is not None
        write_json(self.path / RECORD, self.record)


def _save(model: Any, folder: Path, state: dict[str, Tensor] | None) -> None:
    from modlab.saving.save_adapters import save_adapters

    if state is None:
        model.save_pretrained(folder)
    elif hasattr(model, "get_base_model"):
        save_adapters(model, model.get_base_model(), folder, state)
    else:
        model.save_pretrained(folder, state_dict=state)
        if (folder / "config.json").exists():  # not where transformers saves adapters alone
            _note_dtype(folder / "config.json", state)


def _note_dtype(config_json: Path, state: dict[str, Tensor]) -> None:
    """transformers has written the dtype that a sharded model trains in, which is not that of the weights."""
    dtype = next(value.dtype for value in state.values() if value.is_floating_point())
    values = read_json(config_json)
    values["dtype"] = str(dtype).removeprefix("torch.")
    write_json(config_json, values)


def same(a: Any, b: Any) -> bool:
    """Whether two settings are one, JSON's lists being tuples in Python."""
    return bool(json.dumps(a, sort_keys=True) == json.dumps(b, sort_keys=True))


def _line(row: dict[str, Any]) -> str:
    """A row as a line of JSON, which has no number for infinity: it is the text "inf" there."""
    strict = {
        name: str(value) if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in row.items()
    }
    return json.dumps(strict, allow_nan=False) + "\n"


def _row(line: str) -> dict[str, Any] | None:
    """The row in a line of the log; None for what a machine wrote while it died."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(row, dict) or type(row.get("step")) is not int:
        return None
    return {n: float(v) if v in ("inf", "-inf", "nan") else v for n, v in row.items()}
