"""Folders that a command writes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from modlab.errors import ModlabError


def check_target(folder: Path, overwrite: bool) -> None:
    """Refuse a target that holds something already: a saved model is never mixed with another."""
    if folder.exists() and not folder.is_dir():
        raise ModlabError(f"{folder} is a file; give the name of a folder.")
    if folder.is_dir() and any(folder.iterdir()) and not overwrite:
        raise ModlabError(
            f"the folder {folder} is not empty: name another one, or give --overwrite to replace it."
        )


def save_model(model: Any, tokenizer: Any, folder: Path) -> None:
    """Model and tokenizer into one folder, whole or not at all."""
    from modlab.saving.atomic import atomic_directory
    from modlab.saving.files import WEIGHT_PATTERNS

    with atomic_directory(folder, replaces=WEIGHT_PATTERNS) as temporary:
        model.save_pretrained(temporary)
        if tokenizer is not None:
            tokenizer.save_pretrained(temporary)
