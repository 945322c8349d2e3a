"""Loads models and their tokenizers: dense or converted, whole, as routers alone or as adapters."""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from modlab.conversion.ranges import set_kv_cache_dtype
from modlab.errors import ModlabError
from modlab.integrations.fsdp import every_process_loads
from modlab.paths import exists
from modlab.routing.state import is_converted
from modlab.saving import gguf
from modlab.saving.demos import DEMOS, SHIPPED, folder_named
from modlab.saving.depth import check_depth
from modlab.saving.description import read_description
from modlab.saving.files import (
    ADAPTER_CONFIG,
    CONFIG_FILE,
    MARKER,
    holds_model,
    is_hub_id,
    weight_files,
)
from modlab.saving.hub import download_arguments, file_of, require_reachable
from modlab.saving.load_adapters import load_adapter
from modlab.saving.reading import undisturbed
from modlab.saving.restore import restore_routers

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Loaded = tuple[Any, Any]
NAMES = ", ".join(map(repr, SHIPPED))
NO_NAME = "{!r}... names no folder and no model: {}."
CODE_ARGUMENTS = ("trust_remote_code", "code_revision")
OF_THE_NAMED = ("revision", "subfolder", *CODE_ARGUMENTS)
"""Arguments that are for what the user named, never for the base that its files name."""


def load(
    name_or_path: str | os.PathLike[str],
    *,
    base: str | os.PathLike[str] | None = None,
    kv_cache_dtype: str | None = None,
    **kwargs: Any,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Loads a model and its tokenizer, converted if the folder was saved converted.

    Args:
        name_or_path: ``"demo"`` (a converted model that ships with modlab), ``"demo-dense"`` (its dense
            twin), ``"demo-kv"`` (that twin with routers for its cache), ``"smollm2-kv"``,
            ``"coder-0.5b-kv"`` and ``"coder-1.5b-kv"`` (routers that ship with modlab, for the cache of
            SmolLM2-135M-Instruct, Qwen2.5-Coder-0.5B- and -1.5B-Instruct, in the model's own type, set to 2x,
            where the latest 1,024 tokens are kept, so shorter texts save nothing; for what
            `recipe("default")` aims at say ``kv_cache_dtype="int8"``, then `modlab.set_kv_saving(model, 6)`),
            a local folder, or a hub id. A folder of PEFT
            adapters gives a `PeftModel` on its base; routers alone (`save_routers`) are put into the base
            that they name.
        base: for routers alone: a folder or hub id to take the base from instead of what they name. Its type,
            sizes and input embedding have to be those that the routers were trained on; another dtype and
            quantised copies are fine.
        kv_cache_dtype: how routed layers store keys and values: "int8" or "k6v4" (`set_kv_cache_dtype`, which
            runs one forward to measure their range), or "auto"; by default as it was saved.
        kwargs: for `AutoModelForCausalLM.from_pretrained` (dtype, device_map, revision, gguf_file, ...). The
            demos load in fp32 unless `dtype` says otherwise, since two CPU cores are slow in bf16.
            `trust_remote_code=True` is for code of `name_or_path` alone, not of a base that its files name.

    Returns:
        (model in eval mode, tokenizer). A model saved dense comes back dense: call `modlab.convert` on it.

    Raises:
        ModlabError: no such folder, no weights in it, corrupt or missing weights, or a hub id that cannot be
            reached; a `kv_cache_dtype` for a dense model, or one that the model cannot have.
    """
    for said, value in (("name_or_path", name_or_path), ("base", base)):
        if not isinstance(value, (str, os.PathLike)) and not (said == "base" and value is None):
            raise ModlabError(
                f"{said} is a {type(value).__name__}: give the name of a model, a hub id or a folder."
            )
        if value is not None and not os.fspath(value).strip():
            raise ModlabError(f"{said}={value!r} is empty: give a hub id or a folder ('.' is this one)")
    given = {} if base is None else {"base": os.fspath(base)}
    model, tokenizer = _load(str(name_or_path), (), **given, **kwargs)
    if kv_cache_dtype is not None:
        set_kv_cache_dtype(model, kv_cache_dtype)
    return model, tokenizer


def _load(name: str, asked: tuple[str, ...], **kwargs: Any) -> Loaded:
    """`load`, for a base too: `asked` are the sources whose files led here."""
    source = str(folder_named(name))
    if name in DEMOS:
        kwargs.setdefault("dtype", torch.float32)
        _require_demo(source)
    here = os.path.realpath(source) if exists(source, NO_NAME) else source
    if here in asked:
        raise ModlabError(
            f"{asked[0]!r} names itself as its base model"
            f"{f' by way of {asked[-1]!r}' if len(asked) > 1 else ''}: give the base that it was made for."
        )
    return undisturbed(Path(source), lambda: _load_once(name, source, (*asked, here), kwargs))


def _load_once(name: str, source: str, asked: tuple[str, ...], kwargs: dict[str, Any]) -> Loaded:
    kwargs = dict(kwargs)
    given: str | None = kwargs.pop("base", None)
    base_loader = functools.partial(load_base, asked=asked)
    if Path(source, ADAPTER_CONFIG).is_file() and not Path(source, "config.json").is_file():
        if given is not None:
            raise _no_routers_alone(name, given)
        return load_adapter(Path(source), base_loader, **kwargs)
    try:
        base = _base_of_routers(source, kwargs, given)
    except OSError as error:  # of the hub: no such repository or revision, no access
        raise ModlabError(_explain(name, error)) from error
    if base is None:
        if given is not None:
            raise _no_routers_alone(name, given)
        return _load_whole(name, source, kwargs)
    model, tokenizer = base_loader(base, **kwargs)
    if is_converted(model):
        raise ModlabError(f"the base of {name!r}, {base!r}, is converted itself: routers need a dense one.")
    model = restore_routers(model, source, given, **download_arguments(kwargs)).eval()
    model.mod.source = source
    return model, tokenizer


def _no_routers_alone(name: str, base: str) -> ModlabError:
    return ModlabError(
        f"base={base!r} is for routers alone, and {name!r} has weights of its own: leave base out, or load "
        f"{base!r} and convert it."
    )


def load_base(name: str, asked: tuple[str, ...] = (), **kwargs: Any) -> Loaded:
    """`load` of a base that a file named: without the arguments that concern what the user named.

    Args:
        asked: the sources whose files led here, to tell when they name each other.
    """
    return _load(name, asked, **{key: value for key, value in kwargs.items() if key not in OF_THE_NAMED})


def _load_whole(name: str, source: str, kwargs: dict[str, Any]) -> Loaded:
    """A source that holds weights of its own."""
    _check_folder(source, kwargs)
    kwargs = {"trust_remote_code": False, **kwargs}  # transformers would ask at the terminal
    hub = download_arguments(kwargs)
    code = {key: kwargs[key] for key in CODE_ARGUMENTS if key in kwargs}
    packed = {"gguf_file": kwargs["gguf_file"]} if kwargs.get("gguf_file") else {}
    try:
        model = _from_pretrained(source, kwargs)
    except SafetensorError as error:
        raise ModlabError(
            f"the weights in {name!r} are corrupt ({error}): copy or download them again."
        ) from error
    except ModlabError:
        raise
    except Exception as error:  # transformers raises every kind for files that are not what they should be
        raise ModlabError(_explain(name, error)) from error
    tokenizer = _tokenizer(name, source, {**hub, **code, **packed})
    if packed:
        gguf.forget_file(model)
    elif not is_converted(model):
        restore_routers(model, source, **hub)
    return model.eval(), tokenizer


def _tokenizer(name: str, source: str, kwargs: dict[str, Any]) -> Any:
    """What lies next to the model, which `model.save_pretrained` alone does not put there."""
    try:
        return AutoTokenizer.from_pretrained(source, **kwargs)
    except ModlabError:
        raise
    except Exception as error:  # of every kind, as above
        if not Path(source).is_dir():
            raise ModlabError(_explain(name, error)) from error
        raise ModlabError(
            f"the model in {name!r} can be loaded, and its tokenizer cannot ({_first_line(error)}): put it "
            f"next to the model, tokenizer.save_pretrained({name!r}), or load the model alone, "
            f"AutoModelForCausalLM.from_pretrained({name!r})."
        ) from error


def _from_pretrained(source: str, kwargs: dict[str, Any]) -> PreTrainedModel:
    """The model; converted already if its config.json carries the marker of integrations/auto_model.py.

    Raises:
        ModlabError: weights are missing, which transformers would make up.
    """
    with every_process_loads():
        model, found = _with_findings(source, {**kwargs, "output_loading_info": True})
    if missing := sorted(found.get("missing_keys") or ()):
        raise ModlabError(
            f"the weights in {source!r} lack {len(missing)} of the model's tensors ({missing[0]}), which "
            "transformers would fill with random values: copy or download them again."
        )
    return model


def _with_findings(source: str, kwargs: dict[str, Any]) -> tuple[Any, Any]:
    """The model, and what transformers has to say about its weights."""
    from_pretrained: Any = AutoModelForCausalLM.from_pretrained
    if kwargs.get("quantization_config") is None or kwargs.get("gguf_file"):
        return from_pretrained(source, **kwargs)
    # transformers takes the marker for a quantisation of its own, next to which it allows no other
    quantization = kwargs.pop("quantization_config")  # or it would replace the marker in the config
    config, kwargs = AutoConfig.from_pretrained(source, return_unused_kwargs=True, **kwargs)
    if getattr(config, "quantization_config", None) == MARKER:
        del config.quantization_config
    return from_pretrained(source, config=config, quantization_config=quantization, **kwargs)


def _base_of_routers(source: str, kwargs: dict[str, Any], given: str | None) -> str | None:
    """The base model of a source of routers alone: the one given, or else the one named there; None for any
    other source.

    Raises:
        ModlabError: the routers do not name it.
    """
    if Path(source).is_dir():
        described = str(Path(source, CONFIG_FILE))
        if holds_model(Path(source)) or not Path(described).is_file():
            return None
    elif not is_hub_id(source):
        return None
    else:
        hub = download_arguments(kwargs)
        _check_hub(source, hub)
        found = None if file_of(source, "config.json", **hub) else file_of(source, CONFIG_FILE, **hub)
        if found is None:
            return None
        described = found
    base = given or read_description(Path(described), source).base_model
    if base is None:
        raise ModlabError(
            f"{source!r} holds routers alone and does not name their base model: name it, "
            f"modlab.load({source!r}, base=FOLDER)."
        )
    return base


def _require_demo(folder: str) -> None:
    if not Path(folder).is_dir():
        raise ModlabError(
            f"this installation lacks the demo model ({folder}): reinstall modlab from its wheel, or make "
            "the demo with scripts/demo/run.py."
        )


def _check_folder(source: str, kwargs: dict[str, Any]) -> None:
    """Refuses a local path without a model in it, before transformers takes it for a hub id."""
    folder = Path(source)
    looks_local = folder.exists() or source.startswith((".", "/", "~")) or source.count("/") > 1
    if not looks_local:
        _check_hub(source, download_arguments(kwargs))
        return
    if not folder.is_dir():
        raise ModlabError(f"{source!r} is not a folder: give a model folder, a hub id, or one of {NAMES}.")
    if kwargs.get("gguf_file"):
        gguf.check_file(folder, str(kwargs["gguf_file"]))
        return
    if not (folder / "config.json").is_file():
        ggufs = sorted(file.name for file in folder.glob("*.gguf"))
        cure = (
            f"name the file: gguf_file={ggufs[0]!r}" if ggufs else "give a folder that save_pretrained wrote"
        )
        raise ModlabError(f"{source!r} holds no config.json, so no model: {cure}.")
    if not weight_files(folder):
        raise ModlabError(f"{source!r} holds no weights (model*.safetensors): copy or download them into it.")
    check_depth(folder)


def _check_hub(name: str, arguments: dict[str, Any]) -> None:
    try:
        require_reachable(name, ("config.json", CONFIG_FILE), arguments)
    except Exception as error:
        raise ModlabError(_explain(name, error)) from error


def _first_line(error: Exception) -> str:
    """What it says first, without the stop."""
    lines = str(error).strip().splitlines()
    return (lines[0][:300] if lines else type(error).__name__).rstrip(".")


def _explain(name: str, error: Exception) -> str:
    first = _first_line(error) + "."
    if Path(name).exists():
        return f"the model in {name!r} cannot be loaded: {first}"
    return (
        f"{name!r} is neither a local folder nor a model that the hub gave: {first} "
        f"Check the name and the network, or give a local folder, or one of {NAMES}."
    )
