"""modlab: Mixture-of-Depths conversion, training, ragged-cache generation and a JupyterLab lab for it.

`import modlab` is cheap: it imports neither torch nor transformers. A public name is loaded when it is
first asked for, from the module that the table below names.
"""

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

from modlab.integrations.registration import register_with_transformers

__version__ = "0.1.0"

if TYPE_CHECKING:
    from modlab import families, probes, widgets
    from modlab.aggregate import RoutingAggregate, aggregate_routing
    from modlab.cache import RaggedCache
    from modlab.checkpoint import load, save_routers
    from modlab.config import MoDConfig
    from modlab.convert import convert, revert
    from modlab.engine import disable_fast_generation, enable_fast_generation, fast_generation_report
    from modlab.errors import ModlabError
    from modlab.kv import KVTracker
    from modlab.measure import calibrate, sweep
    from modlab.probes import GenerationHealth, generation_health, recall, retrieval
    from modlab.recipes import recipe
    from modlab.routing import is_converted, record_routing, routing_override, set_threshold
    from modlab.routing_table import RoutingTable
    from modlab.trace import RoutingTrace, trace
    from modlab.train import TrainConfig, TrainResult, train

# public name -> the module of this package that holds it; None: the name is such a module itself
_HOME: dict[str, str | None] = {
    "MoDConfig": "config",
    "ModlabError": "errors",
    "RaggedCache": "cache",
    "load": "checkpoint",
    "save_routers": "checkpoint",
    "convert": "convert",
    "revert": "convert",
    "is_converted": "routing",
    "record_routing": "routing",
    "routing_override": "routing",
    "set_threshold": "routing",
    "RoutingTable": "routing_table",
    "enable_fast_generation": "engine",
    "disable_fast_generation": "engine",
    "fast_generation_report": "engine",
    "KVTracker": "kv",
    "calibrate": "measure",
    "sweep": "measure",
    "recipe": "recipes",
    "recall": "probes",
    "retrieval": "probes",
    "generation_health": "probes",
    "GenerationHealth": "probes",
    "RoutingAggregate": "aggregate",
    "aggregate_routing": "aggregate",
    "RoutingTrace": "trace",
    "trace": "trace",
    "TrainConfig": "train",
    "TrainResult": "train",
    "train": "train",
    "families": None,
    "probes": None,
    "widgets": None,
}

__all__ = [
    "GenerationHealth",
    "KVTracker",
    "MoDConfig",
    "ModlabError",
    "RaggedCache",
    "RoutingAggregate",
    "RoutingTable",
    "RoutingTrace",
    "TrainConfig",
    "TrainResult",
    "__version__",
    "aggregate_routing",
    "calibrate",
    "convert",
    "disable_fast_generation",
    "enable_fast_generation",
    "families",
    "fast_generation_report",
    "generation_health",
    "is_converted",
    "load",
    "probes",
    "recall",
    "recipe",
    "record_routing",
    "retrieval",
    "revert",
    "routing_override",
    "save_routers",
    "set_threshold",
    "sweep",
    "trace",
    "train",
    "widgets",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = _HOME[name]
    module = importlib.import_module(f"{__name__}.{home or name}")
    value = module if home is None else getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})


class _Package(ModuleType):
    """Lets `modlab.convert` be the function although `modlab/convert.py` is a module of the same name.

    The import system binds a submodule on its package after loading it; for `convert`, `train` and
    `trace` that would put the module in the place of the public function, depending on who imported
    what first. Here the function is bound instead, always.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, ModuleType) and _HOME.get(name) == name:
            value = getattr(value, name)
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package

register_with_transformers()  # so that AutoModelForCausalLM knows the folders of converted models
