"""The Hugging Face Hub as seen by a reader: can it be reached, and which of its files are there."""

from __future__ import annotations

from typing import Any

from huggingface_hub import HfApi, is_offline_mode, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError
from transformers.utils import cached_file

DOWNLOAD_ARGUMENTS = (
    *("revision", "token", "cache_dir", "local_files_only"),
    *("force_download", "subfolder"),
)
"""Arguments of `from_pretrained` that say where on the hub, and how, a file is looked for."""

UPLOAD_ARGUMENTS = (
    *("repo_id", "commit_message", "commit_description"),
    *("private", "token", "revision", "create_pr", "tags"),
)
"""Arguments of transformers' `push_to_hub` that concern the hub and not the files."""


def download_arguments(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Those of `kwargs` that concern the hub."""
    return {name: kwargs[name] for name in DOWNLOAD_ARGUMENTS if name in kwargs}


def file_of(source: str, name: str, **arguments: Any) -> str | None:
    """Path of one file of a local folder or, downloaded if need be, of a hub id; None if it has none.

    Raises:
        OSError: of the hub: no such repository or revision.
    """
    path = cached_file(
        source,
        name,
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
        **arguments,
    )
    return None if path is None else str(path)


def require_reachable(name: str, known_by: tuple[str, ...], arguments: dict[str, Any]) -> None:
    """Returns if a hub id can be had: transformers would retry, loudly, for most of a minute.

    Args:
        name: the hub id.
        known_by: files of which the hub's cache holds one if the repository was downloaded before.
        arguments: of `DOWNLOAD_ARGUMENTS`.

    Raises:
        Exception: whatever the hub client's transport raises; it changes between releases.
    """
    if arguments.get("local_files_only") or is_offline_mode():
        return
    where = {key: arguments[key] for key in ("cache_dir", "revision") if key in arguments}
    if any(isinstance(try_to_load_from_cache(name, file, **where), str) for file in known_by):
        return
    try:
        HfApi().model_info(name, timeout=10)
    except HfHubHTTPError:
        return  # the hub answered: from_pretrained explains a missing or gated model better
