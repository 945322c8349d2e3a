"""Tells transformers about folders of converted models, without importing transformers.

`import modlab` has to stay cheap, and transformers takes seconds. So the registration waits for the module
that holds the registry: a finder at the front of `sys.meta_path` (the import system's own way to hear of an
import) lets it load as always, registers, and is gone.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

REGISTRY = "transformers.quantizers.auto"


def register_with_transformers() -> None:
    """Registers now if transformers' registry is loaded already, else as soon as it is."""
    if REGISTRY in sys.modules:
        _register()
    elif not any(isinstance(finder, _RegistryLoaded) for finder in sys.meta_path):
        sys.meta_path.insert(0, _RegistryLoaded())


def _register() -> None:
    importlib.import_module("modlab.integrations.auto_model")  # registers by being imported


class _RegistryLoaded(MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != REGISTRY:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_register(module: ModuleType) -> None:
            execute(module)
            _register()

        spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec
