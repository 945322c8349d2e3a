"""The models that ship with modlab: their names and folders. Light, so that any room may ask."""

from __future__ import annotations

from pathlib import Path

PACKAGE = Path(__file__).parents[1]
DEMO_FOLDER = PACKAGE / "demo"
DEMOS = {"demo": "mod", "demo-dense": "dense", "demo-kv": "kv"}
ROUTER_FOLDER = PACKAGE / "routers"
ROUTERS = ("smollm2-kv", "coder-0.5b-kv", "coder-1.5b-kv")
"""Routers alone, for models from the hub."""
SHIPPED = (*DEMOS, *ROUTERS)


def demo_named(folder: str) -> str | None:
    """The demo that lies in this folder, or None."""
    return {DEMO_FOLDER / place: demo for demo, place in DEMOS.items()}.get(Path(folder))


def folder_named(name: str) -> Path:
    """The folder that a name given to `modlab.load` means if it is no hub id: one that ships, or itself."""
    if name in ROUTERS:
        return ROUTER_FOLDER / name
    return DEMO_FOLDER / DEMOS[name] if name in DEMOS else Path(name)
