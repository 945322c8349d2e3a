"""Saving and loading converted models: dense weights as transformers writes them, routers beside them, all or
nothing.

A folder holds what plain transformers reads (config.json, model.safetensors, ...) plus

    modlab_config.json            MoDConfig, current thresholds, the model it was converted from
    modlab_router.safetensors     router weights, fp32
    README.md                     the model card

and a marker in config.json by which `AutoModelForCausalLM` finds the routers once modlab is imported. Without
modlab the same folder is the dense model.

A folder of routers alone (`save_routers`) has the last three files only, and names the base model.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from huggingface_hub import HfApi, is_offline_mode, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import cached_file

from modlab.config import MoDConfig
from modlab.conversion.convert import HUB_ID, convert
from modlab.errors import ModlabError
from modlab.integrations.auto_model import MARKER
from modlab.routing.router import ROUTER
from modlab.routing.state import is_converted, routing_of, set_threshold
from modlab.saving.card import write_card
from modlab.saving.demos import DEMO_FOLDER, DEMOS

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from modlab.measure import Evaluation

CONFIG_FILE = "modlab_config.json"
ROUTER_FILE = "modlab_router.safetensors"
ADAPTER_CONFIG = "adapter_config.json"  # PEFT's
WEIGHT_PATTERNS = ("model*.safetensors", "model.safetensors.index.json", "pytorch_model*.bin")
HUB_ARGUMENTS = ("revision", "token", "cache_dir", "local_files_only", "force_download", "subfolder")


def load(
    name_or_path: str | os.PathLike[str], **kwargs: Any
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Loads a model and its tokenizer, converted if the folder was saved converted.

    Args:
        name_or_path: ``"demo"`` (a converted model that ships with modlab), ``"demo-dense"`` (its dense
            twin), ``"demo-kv"`` (that twin with routers for its cache), a local folder, or a hub id. A folder
            of PEFT adapters gives a `PeftModel` on its base; routers alone (`save_routers`) are put into the
            base that they name.
        kwargs: for `AutoModelForCausalLM.from_pretrained` (dtype, device_map, revision, ...). The demos load
            in fp32 unless `dtype` says otherwise, since two CPU cores are slow in bf16.

    Returns:
        (model in eval mode, tokenizer). A model saved dense comes back dense: call `modlab.convert` on it.

    Raises:
        ModlabError: no such folder, no weights in it, corrupt weights, or a hub id that cannot be reached.
    """
    name = str(name_or_path)
    source = name
    if name in DEMOS:
        source = str(DEMO_FOLDER / DEMOS[name])
        kwargs.setdefault("dtype", torch.float32)
        if not Path(source).is_dir():
            raise ModlabError(
                f"this installation lacks the demo model ({source}): reinstall modlab from its wheel, or "
                "make the demo with scripts/demo/run.py."
            )
    if Path(source, ADAPTER_CONFIG).is_file() and not Path(source, "config.json").is_file():
        from modlab.integrations.peft import load_adapter  # it loads the base by this function

        return load_adapter(source, **kwargs)
    try:
        base = _base_of_routers(source, kwargs)
    except OSError as error:  # of the hub: no such repository or revision, no access
        raise ModlabError(_explain(name, error)) from error
    if base is not None:
        elsewhere = {name: value for name, value in kwargs.items() if name not in ("revision", "subfolder")}
        model, tokenizer = load(base, **elsewhere)
        if is_converted(model):
            raise ModlabError(
                f"the base of {name!r}, {base!r}, is converted itself: routers need a dense one."
            )
        return restore_routers(model, source, **_hub_arguments(kwargs)).eval(), tokenizer
    _check_folder(source, kwargs)
    try:
        model = _from_pretrained(source, kwargs)
        tokenizer = AutoTokenizer.from_pretrained(source, **_hub_arguments(kwargs))
    except SafetensorError as error:
        raise ModlabError(
            f"the weights in {name!r} are corrupt ({error}): copy or download them again."
        ) from error
    except ModlabError:
        raise
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
        raise ModlabError(_explain(name, error)) from error
    if not is_converted(model):
        restore_routers(model, source, **_hub_arguments(kwargs))
    return model.eval(), tokenizer


def _from_pretrained(source: str, kwargs: dict[str, Any]) -> PreTrainedModel:
    """The model; converted already if its config.json carries the marker of integrations/auto_model.py."""
    if kwargs.get("quantization_config") is None:
        return AutoModelForCausalLM.from_pretrained(source, **kwargs)
    # transformers takes the marker for a quantisation of its own, beside which it allows no other
    kwargs = dict(kwargs)
    quantization = kwargs.pop("quantization_config")  # or it would replace the marker in the config
    config, kwargs = AutoConfig.from_pretrained(source, return_unused_kwargs=True, **kwargs)
    if getattr(config, "quantization_config", None) == MARKER:
        del config.quantization_config
    return AutoModelForCausalLM.from_pretrained(
        source, config=config, quantization_config=quantization, **kwargs
    )


def restore_routers(model: PreTrainedModel, source: str, **hub_arguments: Any) -> PreTrainedModel:
    """Converts a model that was loaded dense, if its folder says so, and loads its routers.

    Args:
        model: dense, with the weights of `source`.
        source: local folder or hub id.
        hub_arguments: revision, token, cache_dir ... of a hub id.

    Raises:
        ModlabError: the routers or their description are missing, damaged, or another model's.
    """
    described = _file(source, CONFIG_FILE, hub_arguments)
    if described is None:
        return model
    weights = _file(source, ROUTER_FILE, hub_arguments)
    description = read_description(Path(described), source)
    if weights is None:
        raise ModlabError(f"{source!r} has {CONFIG_FILE} but no {ROUTER_FILE}: copy the whole folder.")
    routers = _read_routers(Path(weights), source)
    _convert_as(model, description)
    _fill_routers(model, routers, source)
    return model


def convert_as_described(model: PreTrainedModel, folder: Path) -> None:
    """Converts a dense model as modlab_config.json in `folder` says; the routers are new."""
    _convert_as(model, read_description(folder / CONFIG_FILE, str(folder)))


def _convert_as(model: PreTrainedModel, description: Description) -> None:
    convert(model, description.config)
    set_threshold(model, description.thresholds)
    model.mod_base_model = description.base_model  # type: ignore[assignment]
    routing_of(model).base_trained = description.base_trained


def _holds_model(folder: Path) -> bool:
    return any(next(folder.glob(name), None) for name in ("config.json", *WEIGHT_PATTERNS))


def describe_routing(model: PreTrainedModel, folder: Path) -> None:
    """Writes modlab_config.json of a converted model into `folder`."""
    routing = routing_of(model)
    described = {
        "config": routing.config.to_dict(),
        "thresholds": routing.thresholds,
        "base_model": model.mod_base_model,
        "base_trained": routing.base_trained,
    }
    (folder / CONFIG_FILE).write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")


def save_routers(
    model: PreTrainedModel,
    save_directory: str | os.PathLike[str],
    base_model: str | None = None,
    evaluation: Evaluation | None = None,
) -> None:
    """Writes the routers alone, a few KB: for a model whose other weights are still those of its base, as
    training with `TrainConfig(freeze_base=True)` leaves them. `modlab.load` puts them into the base again.

    Args:
        model: converted.
        save_directory: folder.
        base_model: what `modlab.load` shall load first: a hub id, a demo's name, or a folder. By default the
            hub id that the model came from. Whoever gives it says that the weights there are this model's.
        evaluation: figures for the model card, as `modlab.measure.evaluate` gives them.

    Raises:
        ModlabError: the model did not come from the hub, or other weights than the routers were trained, and
            `base_model` is not given; or the folder holds a model.
    """
    if base_model is None and routing_of(model).base_trained:
        raise ModlabError(
            "other weights than the routers of this model have been trained, or may have been: save all with "
            "save_pretrained, or give save_routers a base_model that has these very weights."
        )
    target = Path(save_directory)
    if _holds_model(target):
        raise ModlabError(
            f"{str(target)!r} holds a model, which routers alone would not go with: give another folder."
        )
    if base_model is not None and Path(base_model).is_dir():
        base_model = str(Path(base_model).resolve())
    if base_model is None and model.mod_base_model is None:
        raise ModlabError(
            "routers alone need to name the model that they are for, and this one did not come from the hub: "
            "give save_routers its base_model."
        )
    before = model.mod_base_model
    try:
        model.mod_base_model = base_model or before  # type: ignore[assignment]
        with atomic_directory(save_directory) as folder:
            save_file(_routers_in(model.state_dict()), folder / ROUTER_FILE)
            describe_routing(model, folder)
            write_card(model, folder, target, evaluation, routers_alone=True)
    finally:
        model.mod_base_model = before


def _base_of_routers(source: str, kwargs: dict[str, Any]) -> str | None:
    """The base model that a source of routers alone names; None for any other source.

    Raises:
        ModlabError: the routers do not name it.
    """
    if Path(source).is_dir():
        described = str(Path(source, CONFIG_FILE))
        if _holds_model(Path(source)) or not Path(described).is_file():
            return None
    elif Path(source).exists() or not HUB_ID.fullmatch(source):
        return None
    else:
        _check_hub(source, kwargs)
        found = None if _file(source, "config.json", kwargs) else _file(source, CONFIG_FILE, kwargs)
        if found is None:
            return None
        described = found
    base = read_description(Path(described), source).base_model
    if base is not None and Path(base).exists() and Path(base).resolve() == Path(source).resolve():
        raise ModlabError(f"{source!r} names itself as the base model of its routers.")
    if base is None:
        raise ModlabError(
            f"{source!r} holds routers alone and does not name their base model: load that, and then "
            f"modlab.saving.checkpoint.restore_routers(model, {source!r})."
        )
    return base


def _routers_in(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: t.detach().cpu().contiguous() for name, t in state.items() if f".{ROUTER}." in name}


def load_routers(model: PreTrainedModel, file: Path) -> None:
    """Gives a converted model the routers of a file that `save_pretrained` wrote.

    Raises:
        ModlabError: the file is missing, damaged, or another model's.
    """
    if not file.is_file():
        raise ModlabError(f"there are no routers at {str(file)!r}: copy the whole checkpoint there.")
    _fill_routers(model, _read_routers(file, str(file.parent)), str(file.parent))


class Description(NamedTuple):
    """What a modlab_config.json says."""

    config: MoDConfig
    thresholds: dict[int, float]
    base_model: str | None
    base_trained: bool


def read_description(file: Path, name: str) -> Description:
    """Reads a modlab_config.json; `name` is said in errors."""
    try:
        saved = json.loads(file.read_text(encoding="utf-8"))
        thresholds = {int(layer): p for layer, p in saved["thresholds"].items()}
        trained = saved.get("base_trained", True)  # earlier versions did not say
        return Description(MoDConfig.from_dict(saved["config"]), thresholds, saved.get("base_model"), trained)
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ModlabError(
            f"{CONFIG_FILE} in {name!r} cannot be read ({error!r}): save the model again."
        ) from error


def _read_routers(file: Path, name: str) -> dict[str, Tensor]:
    try:
        return load_file(file)
    except SafetensorError as error:
        raise ModlabError(
            f"{ROUTER_FILE} in {name!r} is corrupt ({error}): copy the folder again."
        ) from error


def _fill_routers(model: PreTrainedModel, routers: dict[str, Tensor], name: str) -> None:
    expected = set(_router_state(model))
    if set(routers) != expected:
        raise ModlabError(
            f"{ROUTER_FILE} in {name!r} holds routers for other layers than this model has "
            f"({sorted(set(routers) ^ expected)[0]}): the folder mixes two models, save it again."
        )
    own = model.state_dict()
    other = next((key for key, router in routers.items() if router.shape != own[key].shape), None)
    if other is not None:
        raise ModlabError(
            f"{ROUTER_FILE} in {name!r} holds routers for another model: {other} is "
            f"{list(routers[other].shape)} there and {list(own[other].shape)} here."
        )
    model.load_state_dict(routers, strict=False)


def save_converted(
    model: Any,
    save_dense: Callable[..., Any],
    save_directory: str | os.PathLike[str],
    *,
    is_main_process: bool = True,
    state_dict: dict[str, Tensor] | None = None,
    evaluation: Evaluation | None = None,
    **kwargs: Any,
) -> None:
    """Writes a converted model; `RoutedModel.save_pretrained` calls this with the dense class's own
    `save_pretrained`.

    Args:
        evaluation: figures for the model card, as `modlab.measure.evaluate` gives them.
    """
    if not is_main_process:
        return
    state = dict(model.state_dict() if state_dict is None else state_dict)
    routers = _routers_in(state)
    with atomic_directory(save_directory, replaces=WEIGHT_PATTERNS) as folder:
        with _left_out(model, routers):
            save_dense(folder, state_dict=state, **kwargs)
        save_file(routers, folder / ROUTER_FILE)
        describe_routing(model, folder)
        mark_converted(folder / "config.json")
        write_card(model, folder, Path(save_directory), evaluation)


def mark_converted(config_json: Path) -> None:
    """Tells `AutoModelForCausalLM` that the folder holds a converted model; a truly quantised one keeps its
    own entry, and only `modlab.load` finds its routers."""
    values = json.loads(config_json.read_text(encoding="utf-8"))
    if values.setdefault("quantization_config", MARKER) == MARKER:
        config_json.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")


@contextlib.contextmanager
def _left_out(model: Any, names: Iterable[str]) -> Iterator[None]:
    """transformers' `save_pretrained` inside this block leaves these weights out, also where a quantiser
    gathers them anew."""
    before = model._keys_to_ignore_on_save
    model._keys_to_ignore_on_save = {*(before or ()), *names}
    try:
        yield
    finally:
        model._keys_to_ignore_on_save = before


def _router_state(model: PreTrainedModel) -> list[str]:
    return [name for name in model.state_dict() if f".{ROUTER}." in name]


@contextlib.contextmanager
def atomic_directory(path: str | os.PathLike[str], replaces: tuple[str, ...] = ()) -> Iterator[Path]:
    """Yields a temporary folder beside `path`; its files move into `path` only once the block has ended well.

    A full disk, an error or Ctrl-C inside the block leaves `path` as it was. Other files in `path` stay.

    Args:
        path: the folder to fill; made if absent.
        replaces: glob patterns of old files in `path` that go when the new ones are in place (shards of
            another count).
    """
    target = Path(path)
    if target.exists() and not target.is_dir():
        raise ModlabError(f"{str(path)!r} is a file: give the name of a folder to save to.")
    target.parent.mkdir(parents=True, exist_ok=True)
    outer = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    temporary = outer / target.name  # model cards are headed by their folder's name
    try:
        temporary.mkdir(exist_ok=True)
        yield temporary
        temporary.chmod(0o755)
        new = sorted(p.relative_to(temporary) for p in temporary.rglob("*") if p.is_file())
        if not target.exists():
            temporary.rename(target)
            return
        stale = {p.relative_to(target) for pattern in replaces for p in target.glob(pattern)} - set(new)
        for file in new:
            (target / file).parent.mkdir(parents=True, exist_ok=True)
            os.replace(temporary / file, target / file)
        for file in stale:
            (target / file).unlink()
    except (OSError, SafetensorError) as error:
        raise ModlabError(
            f"saving to {str(path)!r} failed ({error}); the folder is as it was. Free some space or choose "
            "another."
        ) from error
    finally:
        shutil.rmtree(outer, ignore_errors=True)


def _check_folder(source: str, kwargs: dict[str, Any]) -> None:
    """Refuses a local path without a model in it, before transformers takes it for a hub id."""
    folder = Path(source)
    looks_local = folder.exists() or source.startswith((".", "/", "~")) or source.count("/") > 1
    if not looks_local:
        _check_hub(source, kwargs)
        return
    if not folder.is_dir():
        raise ModlabError(
            f"{source!r} is not a folder: give a model folder, a hub id, 'demo', 'demo-dense' or 'demo-kv'."
        )
    if not (folder / "config.json").is_file():
        raise ModlabError(
            f"{source!r} holds no config.json, so no model: give a folder that save_pretrained wrote."
        )
    if not any(next(folder.glob(pattern), None) for pattern in WEIGHT_PATTERNS):
        raise ModlabError(f"{source!r} holds no weights (model*.safetensors): copy or download them into it.")


def _check_hub(name: str, kwargs: dict[str, Any]) -> None:
    """Refuses at once where the hub cannot be reached: transformers would retry, loudly, for most of a
    minute.
    """
    where = {key: kwargs[key] for key in ("cache_dir", "revision") if key in kwargs}
    cached = any(
        isinstance(try_to_load_from_cache(name, f, **where), str) for f in ("config.json", CONFIG_FILE)
    )
    try:
        if not (cached or kwargs.get("local_files_only") or is_offline_mode()):
            HfApi().model_info(name, timeout=10)
    except HfHubHTTPError:
        return  # the hub answered: from_pretrained explains a missing or gated model better
    except Exception as error:  # whatever the hub client's transport raises; it changes between releases
        raise ModlabError(_explain(name, error)) from error


def _explain(name: str, error: Exception) -> str:
    lines = str(error).strip().splitlines()
    first = (lines[0][:300] if lines else type(error).__name__).rstrip(".") + "."
    if Path(name).exists():
        return f"the model in {name!r} cannot be loaded: {first}"
    return (
        f"{name!r} is neither a local folder nor a model that the hub gave: {first} "
        "Check the name and the network, or give a local folder, 'demo', 'demo-dense' or 'demo-kv'."
    )


def _hub_arguments(kwargs: dict[str, Any]) -> dict[str, Any]:
    return {name: kwargs[name] for name in HUB_ARGUMENTS if name in kwargs}


def _file(source: str, name: str, kwargs: dict[str, Any]) -> str | None:
    path = cached_file(
        source,
        name,
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
        **_hub_arguments(kwargs),
    )
    return None if path is None else str(path)
