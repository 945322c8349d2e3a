"""modlab: Mixture-of-Depths conversion, training, ragged-cache generation and a JupyterLab lab for it.

`import modlab` is cheap: it imports neither torch nor transformers. A public name is loaded when it is
first asked for, from the module that the table below names.
"""

import importlib
from typing import TYPE_CHECKING, Any

from modlab.integrations.registration import register_with_transformers

__version__ = "0.1.0"

if TYPE_CHECKING:
    from modlab import families, probes, widgets
    from modlab.cache.ragged import RaggedCache
    from modlab.cache.tracker import KVTracker
    from modlab.config import MoDConfig
    from modlab.conversion.convert import convert, revert
    from modlab.conversion.ranges import set_kv_cache_dtype
    from modlab.engine import disable_fast_generation, enable_fast_generation, fast_generation_report
    from modlab.errors import ModlabError
    from modlab.measure import calibrate, sweep
    from modlab.probes import GenerationHealth, generation_health, recall, retrieval
    from modlab.recipes import recipe
    from modlab.routing.kv_saving import set_kv_saving
    from modlab.routing.state import (
        is_converted,
        record_routing,
        routing_off,
        routing_override,
        set_keep_recent,
        set_threshold,
    )
    from modlab.routing.table import RoutingTable
    from modlab.saving.load import load
    from modlab.saving.save import save_routers
    from modlab.saving.start import start_from
    from modlab.traces.aggregate import RoutingAggregate, aggregate_routing
    from modlab.traces.routing_trace import RoutingTrace
    from modlab.traces.run import trace
    from modlab.training.config import TrainConfig
    from modlab.training.fit import fit_routers
    from modlab.training.fit_config import FitConfig
    from modlab.training.fit_projections import fit_projections
    from modlab.training.loop import train
    from modlab.training.result import TrainResult

# public name -> the module of this package that holds it; None: the name is such a module itself
_HOME: dict[str, str | None] = {
    "MoDConfig": "config",
    "ModlabError": "errors",
    "RaggedCache": "cache.ragged",
    "load": "saving.load",
    "save_routers": "saving.save",
    "start_from": "saving.start",
    "convert": "conversion.convert",
    "revert": "conversion.convert",
    "is_converted": "routing.state",
    "record_routing": "routing.state",
    "routing_off": "routing.state",
    "routing_override": "routing.state",
    "set_keep_recent": "routing.state",
    "set_kv_cache_dtype": "conversion.ranges",
    "set_kv_saving": "routing.kv_saving",
    "set_threshold": "routing.state",
    "RoutingTable": "routing.table",
    "enable_fast_generation": "engine",
    "disable_fast_generation": "engine",
    "fast_generation_report": "engine",
    "KVTracker": "cache.tracker",
    "calibrate": "measure",
    "sweep": "measure",
    "recipe": "recipes",
    "recall": "probes",
    "retrieval": "probes",
    "generation_health": "probes",
    "GenerationHealth": "probes",
    "RoutingAggregate": "traces.aggregate",
    "aggregate_routing": "traces.aggregate",
    "RoutingTrace": "traces.routing_trace",
    "trace": "traces.run",
    "FitConfig": "training.fit_config",
    "fit_routers": "training.fit",
    "fit_projections": "training.fit_projections",
    "TrainConfig": "training.config",
    "TrainResult": "training.result",
    "train": "training.loop",
    "families": None,
    "probes": None,
    "widgets": None,
}

__all__ = [
    "FitConfig",
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
    "fit_routers",
    "fit_projections",
    "generation_health",
    "is_converted",
    "load",
    "probes",
    "recall",
    "recipe",
    "record_routing",
    "retrieval",
    "revert",
    "routing_off",
    "routing_override",
    "save_routers",
    "set_keep_recent",
    "set_kv_cache_dtype",
    "set_kv_saving",
    "set_threshold",
    "start_from",
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


register_with_transformers()  # so that AutoModelForCausalLM knows the folders of converted models
