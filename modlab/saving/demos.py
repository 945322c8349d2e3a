"""The models that ship with modlab: their names and folders. Light, so that any room may ask."""

from __future__ import annotations

from pathlib import Path

DEMO_FOLDER = Path(__file__).parents[1] / "demo"
DEMOS = {"demo": "mod", "demo-dense": "dense", "demo-kv": "kv"}


def demo_named(folder: str) -> str | None:
    """The demo that lies in this folder, or None."""
    return {DEMO_FOLDER / place: demo for demo, place in DEMOS.items()}.get(Path(folder))


def folder_named(name: str) -> Path:
    """The folder that a name given to `modlab.load` means if it is no hub id: of a demo, or itself."""
    return DEMO_FOLDER / DEMOS[name] if name in DEMOS else Path(name)
