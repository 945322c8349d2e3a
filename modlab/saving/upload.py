"""Uploading a saved folder to the Hugging Face Hub."""

from __future__ import annotations

import os
from typing import Any

from huggingface_hub import HfApi, ModelCard
from huggingface_hub.errors import EntryNotFoundError

from modlab.saving.card import OURS


def upload(
    folder: str | os.PathLike[str],
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | None = None,
    tags: list[str] | None = None,
    **commit: Any,
) -> str:
    """Uploads what lies in `folder`; a model card that somebody wrote on the hub stays as it is.

    Args:
        folder: as `save_pretrained` of a converted model wrote it.
        repo_id: made if it does not exist.
        private: of a new repository.
        token: as huggingface_hub takes it; the stored one by default.
        tags: added to those of the card.
        commit: commit_message, commit_description, revision, create_pr.

    Returns:
        the address of the commit.
    """
    api = HfApi()
    repo_id = api.create_repo(repo_id, private=private, token=token, exist_ok=True).repo_id
    path = os.path.join(folder, "README.md")
    if tags and os.path.isfile(path):
        card = ModelCard.load(path)
        card.data.tags = [*(card.data.tags or []), *(tag for tag in tags if tag not in card.data.tags)]
        card.save(path)
    try:
        foreign = OURS not in ModelCard.load(repo_id, token=token).text
    except EntryNotFoundError:
        foreign = False
    commit.setdefault("commit_message", "Upload a Mixture-of-Depths model")
    info = api.upload_folder(
        repo_id=repo_id,
        folder_path=os.fspath(folder),
        token=token,
        ignore_patterns=["README.md"] if foreign else None,
        **commit,
    )
    return str(info.commit_url)
