"""A quick hash of weight files: tells two savings apart without reading gigabytes. Light.

Whole for files up to 64 MiB; of larger ones the length, the beginning (where safetensors says what the
file holds) and 256 blocks of 4 KiB evenly spread. Training changes every weight, so any of the blocks shows
it; one flipped bit between them is the disk's business and stays unseen.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

from modlab.errors import ModlabError
from modlab.saving.files import weight_files

WHOLE = 2**26
BEGINNING = 2**18
BLOCK = 4096
BLOCKS = 256
CHOSEN_FIRST = ("model.safetensors", "model.safetensors.index.json")
"""What transformers reads if it is there, whatever else is."""


def sha256_of(file: Path) -> str:
    """Of all bytes of a small file."""
    return hashlib.sha256(file.read_bytes()).hexdigest()


def fingerprint(file: Path) -> str:
    """The quick hash of one file, 64 hexadecimal digits."""
    size = file.stat().st_size
    digest = hashlib.sha256(size.to_bytes(8, "little"))
    with file.open("rb") as stream:
        if size <= WHOLE:
            digest.update(stream.read())
        else:
            digest.update(stream.read(BEGINNING))
            for block in range(BLOCKS):
                stream.seek((size - BLOCK) * block // (BLOCKS - 1))
                digest.update(stream.read(BLOCK))
    return digest.hexdigest()


def fingerprints(folder: Path) -> dict[str, str]:
    """By file name, of all weight files in `folder`."""
    return {file.name: fingerprint(file) for file in weight_files(folder)}


def check_fingerprints(expected: Mapping[str, str], folder: Path, name: str) -> None:
    """Raises ModlabError where the weights in `folder` are not those that `expected` was taken of.

    Args:
        expected: as `fingerprints` gave them; nothing is checked if it is empty.
        folder: where the weights lie.
        name: of the folder, for the error.
    """
    if not expected:
        return
    cure = (
        "the folder mixes two savings: copy or save it again. If the weights were changed on purpose, set "
        '"weights" in modlab_config.json to {}'
    )
    for file, wanted in expected.items():
        path = folder / file
        if not path.is_file():
            raise ModlabError(f"{file} is missing in {name!r}, which its routers were saved with: {cure}.")
        if fingerprint(path) != wanted:
            raise ModlabError(f"{file} in {name!r} is not the file that its routers were saved with: {cure}.")
    for file in CHOSEN_FIRST:
        if file not in expected and (folder / file).is_file():
            raise ModlabError(f"{file} in {name!r} was added after its routers were saved: {cure}.")
