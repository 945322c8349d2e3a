"""The file of one routing trace: an .npz of arrays with a JSON description, no pickle inside.

Anybody may have written it. What it claims to hold is checked before it is unpacked, so that neither a
damaged file nor a zip bomb takes memory or time.
"""

from __future__ import annotations

import io
import json
import os
import struct
import tempfile
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from modlab.errors import ModlabError

ARRAYS: dict[str, Any] = {
    "token_ids": np.int64,
    "gate": np.float32,
    "keep": np.bool_,
    "thresholds": np.float32,
    "loss": np.float32,
}
LARGEST = 2**28  # bytes of a trace unpacked: 128,000 tokens in 400 layers
LARGEST_META = 2**25
LARGEST_DIRECTORY = 2**16  # bytes of the list of files in the archive, which has six
DAMAGE = (
    *(OSError, ValueError, KeyError, EOFError, TypeError, AttributeError, RecursionError, MemoryError),
    *(zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError, OverflowError, struct.error),
)
"""What zipfile, NumPy and json raise for files that are not what they should be."""


def write_trace(path: Path, arrays: Mapping[str, NDArray[Any]], meta: Mapping[str, Any]) -> None:
    """Writes one compressed .npz; an older file is replaced only when all is written.

    Raises:
        ModlabError: it is larger than `read_trace` would take.
    """
    text = json.dumps(meta).encode("ascii")
    size = sum(array.nbytes for array in arrays.values()) + len(text)
    if size > LARGEST or len(text) > LARGEST_META:
        raise ModlabError(
            f"this trace takes {size:,} bytes, a file holds up to {LARGEST:,}: save it in parts (trace.part)."
        )
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            # JSON, not a NumPy string array: those drop trailing NUL characters.
            packed = np.frombuffer(text, dtype=np.uint8)
            np.savez_compressed(file, allow_pickle=False, meta=packed, **dict(arrays))
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def read_trace(path: Path) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
    """Arrays and description that `write_trace` wrote.

    Raises:
        FileNotFoundError: there is no such file.
        Exception: one of `DAMAGE`, if it is damaged or something else.
    """
    _check_directory(path)
    with zipfile.ZipFile(path) as archive:
        sizes = {info.filename: info.file_size for info in archive.infolist()}
        if sum(sizes.values()) > LARGEST or sizes["meta.npy"] > LARGEST_META:
            raise ValueError(f"it claims to hold {sum(sizes.values()):,} bytes, more than any trace")
        text = _array(archive.read("meta.npy"), np.uint8).tobytes().decode("ascii")
        arrays = {name: _array(archive.read(f"{name}.npy"), kind) for name, kind in ARRAYS.items()}
    meta = json.loads(text)
    if not isinstance(meta, dict):
        raise ValueError(f"its description is a {type(meta).__name__}")
    return arrays, meta


def _check_directory(path: Path) -> None:
    """Raises ValueError if the archive lists more files than any trace has: reading the list takes time."""
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 22 - LARGEST_DIRECTORY))
        end = file.read()
    at = end.rfind(b"PK\5\6")
    if at < 0:
        raise ValueError("it is no zip archive, or its end is missing")
    (length,) = struct.unpack_from("<I", end, at + 12)
    if length > LARGEST_DIRECTORY:
        raise ValueError(f"it lists files in {length:,} bytes")


def _array(data: bytes, kind: Any) -> NDArray[Any]:
    """The array of an .npy file, whose header says no more and no other than is there."""
    stream = io.BytesIO(data)
    version = np.lib.format.read_magic(stream)
    if version != (1, 0):
        raise ValueError(f"version {version} of .npy")
    shape, by_columns, found = np.lib.format.read_array_header_1_0(stream)
    if found != np.dtype(kind) or by_columns and len(shape) > 1:
        raise ValueError(f"{found} where {np.dtype(kind)} is expected")
    rest = memoryview(data)[stream.tell() :]
    count = 1
    for length in shape:
        count *= length
    if count * found.itemsize != len(rest):
        raise ValueError(f"shape {shape} in {len(rest):,} bytes")
    return np.frombuffer(rest, found).reshape(shape).copy()
