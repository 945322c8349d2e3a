"""Which causal language models can be converted: found out by converting a tiny random one of each type.

A row of the report is a fact about the installed transformers, not a promise from a list: the type's own
class is built with small sizes and held against every claim of `families/proof.py`. Whatever goes
wrong is the reason.
"""

import gc
import re
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from modlab.errors import ModlabError
from modlab.families.proof import FreshProcess, Unproven, prove
from modlab.families.tiny_models import tiny_config, tiny_model  # kept where they used to be

if TYPE_CHECKING:
    import pandas

__all__ = ["REQUIRED", "causal_types", "report", "tiny_config", "tiny_model", "why_not"]

# What the project promises; the rest of the report is what turned out to work.
REQUIRED = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "gpt_neox", "gpt2")

# What transformers registers as a causal LM though it is none, or none on its own.
DRAFT = "a draft model: it reads the keys and values of the model that it drafts for"
CODES = "it generates several audio codes a step, not one token"
NO_LANGUAGE_MODEL = {
    "gemma4_assistant": DRAFT,
    "gemma4_unified_assistant": DRAFT,
    "musicgen": CODES,
    "musicgen_melody": CODES,
    "reformer": "its attention is hashed or local, over chunks of the text, and its layers are reversible",
}


def causal_types() -> dict[str, str]:
    """Every model_type that the installed transformers has a causal LM for, with its class name."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return {
        model_type: names if isinstance(names, str) else names[0]
        for model_type, names in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items()
    }


def report(model_types: Iterable[str] | None = None, progress: bool = True) -> "pandas.DataFrame":
    """Try to convert a tiny random model of each causal LM type.

    Takes a second or two for each type on one CPU core.

    Args:
        model_types: the types to try, by `config.model_type`; None tries all of the installed transformers.
        progress: show a bar on stderr.

    Returns:
        One row a type: model_type, class_name, supported (bool), reason ("" where supported, else one line).

    Raises:
        ModlabError: a name in `model_types` is not a causal LM type of the installed transformers.
    """
    import pandas
    from tqdm.auto import tqdm

    known = causal_types()
    wanted = list(known) if model_types is None else list(model_types)
    unknown = [name for name in wanted if name not in known]
    if unknown:
        import transformers

        raise ModlabError(
            f"transformers {transformers.__version__} has no causal LM type {', '.join(map(repr, unknown))}; "
            "modlab.families.causal_types() lists those it has."
        )
    rows = []
    with FreshProcess() as fresh:
        for model_type in (bar := tqdm(wanted, unit="type", disable=not progress)):
            bar.set_description(model_type)
            reason = why_not(model_type, fresh)
            rows.append((model_type, known[model_type], not reason, reason))
            gc.collect()
    return pandas.DataFrame(rows, columns=["model_type", "class_name", "supported", "reason"])


def why_not(model_type: str, fresh: FreshProcess) -> str:
    """The reason why a model of this type cannot be converted, in one line; "" if it can.

    Args:
        model_type: by `config.model_type`.
        fresh: the process that reloads the tiny model once it is converted and saved.
    """
    if model_type in NO_LANGUAGE_MODEL:
        return NO_LANGUAGE_MODEL[model_type]
    try:
        with tempfile.TemporaryDirectory() as folder:
            prove(model_type, Path(folder, "model"), fresh)
        return ""
    except (ModlabError, Unproven) as problem:
        return _first_line(problem)
    except ImportError as problem:
        missing = re.findall(r"requires the (\S+) library", str(problem))
        if not missing:
            return _first_line(problem)
        return f"transformers' class needs packages that are not installed: {', '.join(missing)}"
    except Exception as problem:  # whatever a third-party class raises is an answer here
        return f"no tiny model of it works: {type(problem).__name__}: {_first_line(problem)}"


def _first_line(problem: Exception) -> str:
    return next((line.strip() for line in str(problem).splitlines() if line.strip()), "no message")[:300]
