"""modlab_config.json: what was converted and how, and the hashes that tie the files of a folder together.

format         2; files of the first format do not say, and have neither hash
config         MoDConfig
thresholds     p by routed layer
base_model     hub id, folder or demo that was converted; null if unknown
base_trained   whether other weights than those that conversion adds have been trained
routers        SHA-256 of modlab_router.safetensors; null where the routers are in PEFT's file
weights        fingerprint of each weight file: of the folder, or for routers alone of their base, if that
               is a folder; empty where nothing can be said
base           of routers alone: what their base has to look like (`base_check.py`)
trained        what is known of the routers, thresholds by KV saving among it (`Trained`); may be null
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from modlab.config import MoDConfig
from modlab.errors import ModlabError
from modlab.routing.state import routing_of
from modlab.routing.threshold import check_threshold
from modlab.routing.trained import Trained
from modlab.saving.base_check import read_base
from modlab.saving.files import CONFIG_FILE, ROUTER_FILE
from modlab.saving.fingerprint import sha256_of
from modlab.saving.json_files import read_object

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FORMAT = 2
LARGEST = 2**20  # bytes; 10,000 layers take a fifth of it
CURE = "copy the whole folder again, or save the model again"
HASH = re.compile(r"[0-9a-f]{64}")


class Description(NamedTuple):
    """What a modlab_config.json says; see the module."""

    config: MoDConfig
    thresholds: dict[int, float]
    base_model: str | None
    base_trained: bool
    routers: str | None
    weights: dict[str, str]
    base: dict[str, Any]
    trained: Trained | None


def write_description(
    model: PreTrainedModel,
    folder: Path,
    base_model: str | None = None,
    weights: Mapping[str, str] | None = None,
    base: Mapping[str, Any] | None = None,
) -> None:
    """Describes a converted model in `folder`; the routers' file, if it has one, lies there already.

    Args:
        base_model: what routers alone are for; by default where the model came from.
        weights: fingerprints of the weights that go with the routers.
        base: what the base of routers alone looks like.
    """
    routing = routing_of(model)
    routers = folder / ROUTER_FILE
    described = {
        "format": FORMAT,
        "config": routing.config.to_dict(),
        "thresholds": {layer: float(p) for layer, p in routing.thresholds.items()},
        "base_model": base_model or model.mod_base_model,
        "base_trained": routing.base_trained,
        "routers": sha256_of(routers) if routers.is_file() else None,
        "weights": dict(weights or {}),
        "base": dict(base or {}),
        "trained": routing.trained.to_dict() if routing.trained else None,
    }
    text = json.dumps(described, indent=2, allow_nan=False)
    (folder / CONFIG_FILE).write_text(text + "\n", encoding="utf-8")


def read_description(file: Path, name: str) -> Description:
    """Reads a modlab_config.json; `name` is said in errors.

    Raises:
        ModlabError: it is damaged, of a newer modlab, or says what cannot be.
    """
    saved = read_object(file, CURE, LARGEST)
    if "config" not in saved or "thresholds" not in saved:
        raise _wrong(name, "config or thresholds are missing")
    version = saved.get("format", 1)
    if type(version) is not int or not 1 <= version <= FORMAT:
        raise ModlabError(
            f"{CONFIG_FILE} in {name!r} has format {version!r:.60}, and this modlab reads 1 to {FORMAT}: "
            "update it."
        )
    if unknown := sorted(saved.keys() - {"format", *Description._fields}):
        raise _wrong(name, f"it has a field {unknown[0]!r}, which this modlab does not know")
    if version > 1 and (absent := sorted({"routers", "weights"} - saved.keys())):
        raise _wrong(name, f"{absent[0]} is missing")
    return Description(
        _config(saved["config"], name),
        _thresholds(saved["thresholds"], name),
        _text(saved.get("base_model"), "base_model", name),
        _flag(saved.get("base_trained", True), "base_trained", name),  # earlier versions did not say
        _hash(saved.get("routers"), "routers", name),
        _weights(saved.get("weights", {}), name),
        _base(saved.get("base", {}), name),
        _trained(saved.get("trained"), name),
    )


def _wrong(name: str, what: str) -> ModlabError:
    return ModlabError(f"{CONFIG_FILE} in {name!r} cannot be read ({what}): {CURE}.")


def _config(found: Any, name: str) -> MoDConfig:
    if not isinstance(found, dict):
        raise _wrong(name, f"config is a {type(found).__name__}, not an object")
    try:
        return MoDConfig.from_dict(found)
    except ModlabError as error:
        raise _wrong(name, str(error).rstrip(".")) from error


def _thresholds(found: Any, name: str) -> dict[int, float]:
    if not isinstance(found, dict) or not found:
        raise _wrong(name, f"thresholds={found!r:.60} are not an object of layers")
    wrong = next((layer for layer in found if not re.fullmatch(r"0|[1-9]\d{0,8}", layer)), None)
    if wrong is not None:
        raise _wrong(name, f"thresholds name a layer {wrong!r:.60}")
    try:
        return {int(layer): check_threshold(p) for layer, p in found.items()}
    except ModlabError as error:
        raise _wrong(name, str(error).rstrip(".")) from error


def _text(found: Any, field: str, name: str) -> str | None:
    if found is not None and (not isinstance(found, str) or not found or "\0" in found):
        raise _wrong(name, f"{field}={found!r:.60} is neither a name nor null")
    return found


def _flag(found: Any, field: str, name: str) -> bool:
    if not isinstance(found, bool):
        raise _wrong(name, f"{field}={found!r:.60} is neither true nor false")
    return found


def _hash(found: Any, field: str, name: str) -> str | None:
    if found is not None and (not isinstance(found, str) or not HASH.fullmatch(found)):
        raise _wrong(name, f"{field}={found!r:.60} is no SHA-256")
    return found


def _base(found: Any, name: str) -> dict[str, Any]:
    try:
        return read_base(found)
    except ModlabError as error:
        raise _wrong(name, str(error)) from error


def _trained(found: Any, name: str) -> Trained | None:
    try:
        return None if found is None else Trained.from_dict(found)
    except ModlabError as error:
        raise _wrong(name, str(error).rstrip(".")) from error


def _weights(found: Any, name: str) -> dict[str, str]:
    if not isinstance(found, dict):
        raise _wrong(name, f"weights={found!r:.60} are not an object of files")
    for file, digest in found.items():
        if Path(file).name != file or file in ("", "..") or "\0" in file:
            raise _wrong(name, f"weights name {file!r:.60}, which is no file of the folder")
        if not isinstance(digest, str) or not HASH.fullmatch(digest):
            raise _wrong(name, f"weights give {file!r:.60} the fingerprint {digest!r:.60}")
    return found
