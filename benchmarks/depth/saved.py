"""An arm's weights while it trains: what is there of them outlives a call that is ended in any moment."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, cast

import torch

import modlab

FACTS = "distilled.json"
"""Next to the weights, written last: what the arm's row tells of how they came about."""


class Saved:
    """The place of one arm. What is new is written next to it and takes its place once it is complete.

    Args:
        at: the folder.
        base: of the model that the arm was made of.
        whole: whether all weights are the arm's, instead of what was added alone.
    """

    def __init__(self, at: Path, base: Path, whole: bool = False) -> None:
        self.at, self.base, self.whole = at, base, whole
        self.new = at.with_name(f"{at.name}.new")

    def save(self, model: Any, facts: dict[str, Any]) -> None:
        """The model as it is now, in any moment between two steps."""
        shutil.rmtree(self.new, ignore_errors=True)
        if self.whole:
            from transformers import AutoTokenizer

            model.save_pretrained(self.new)
            AutoTokenizer.from_pretrained(self.base).save_pretrained(self.new)
        else:
            modlab.save_routers(model, self.new, self.base.name)
        (self.new / FACTS).write_text(json.dumps(facts, default=float), encoding="utf-8")
        shutil.rmtree(self.at, ignore_errors=True)
        self.new.replace(self.at)

    def told(self) -> dict[str, Any] | None:
        """The facts; None where nothing complete is there."""
        at = self._complete()
        return None if at is None else json.loads((at / FACTS).read_text(encoding="utf-8"))

    def load(self, device: str, dtype: torch.dtype) -> Any:
        """The model, converted, in eval mode."""
        at = self._complete()
        assert at is not None, "there are facts"
        base = {} if self.whole else {"base": str(self.base)}
        return cast(Any, modlab.load(at, dtype=dtype, **base)[0]).to(device).eval()

    def _complete(self) -> Path | None:
        """The newest folder that is complete: one whose move was cut short is so too."""
        for at in (self.new, self.at):
            try:
                json.loads((at / FACTS).read_text(encoding="utf-8"))
            except (OSError, ValueError):
                continue
            return at
        return None
