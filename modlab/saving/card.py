"""The model card of a converted model: what was routed, what it saves and costs, how to load it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from modlab.config import MoDConfig
from modlab.conversion.convert import HUB_ID
from modlab.routing.state import routing_of

if TYPE_CHECKING:
    from modlab.measure import Evaluation

OURS = "<!-- written by modlab -->"
"""Marks a card as generated: it may be written anew. Take the line out to keep what you changed."""

PAPER = "https://arxiv.org/abs/2410.14268"
ROUTED = {
    "kv": "keys and values",
    "layer": "whole layers",
    "attention": "attention alone",
    "mlp": "MLPs alone",
}


def write_card(
    model: Any, folder: Path, target: Path, evaluation: Evaluation | None = None, routers_alone: bool = False
) -> None:
    """Writes README.md into `folder`, unless `target`, the folder it is meant for, has somebody else's.

    Args:
        model: a converted model.
        folder: where to write.
        target: where the files will lie; its name heads the card.
        evaluation: measured figures; without them the card says how to get them.
        routers_alone: whether the folder holds no other weights.
    """
    old = target / "README.md"
    if old.is_file() and OURS not in old.read_text(encoding="utf-8"):
        return
    (folder / "README.md").write_text(
        model_card(model, target.name, evaluation, routers_alone), encoding="utf-8"
    )


def model_card(
    model: Any, name: str, evaluation: Evaluation | None = None, routers_alone: bool = False
) -> str:
    """The card as Markdown with the hub's metadata block."""
    routing, known = routing_of(model), model.mod_base_model
    hub_base = known if known and HUB_ID.fullmatch(known) and not Path(known).exists() else None
    data = ModelCardData(
        model_name=name,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["mixture-of-depths", "modlab"],
        base_model=hub_base,
        eval_results=_results(evaluation) if evaluation is not None else None,
    )
    base = (
        f" of [{hub_base}](https://huggingface.co/{hub_base})" if hub_base else f" of {known}" * bool(known)
    )
    config: MoDConfig = routing.config
    values = sorted({round(p, 4) for p in routing.thresholds.values()})
    thresholds = f"{values[0]:g}" if len(values) == 1 else f"{values[0]:g} to {values[-1]:g}, one a layer"
    lines = [
        f"# {name}",
        OURS,
        f"A Mixture-of-Depths version{base}: in {len(routing.layers)} of its {routing.num_layers} layers a "
        f"router decides for each token {_decides(config)} ([MoDification]({PAPER})).",
        "| | |\n|---|---|\n"
        f"| routed layers | {', '.join(map(str, routing.layers))} |\n"
        f"| routing | {config.operator}, {ROUTED[config.skip]}, gate {config.gate} |\n"
        f"| threshold p | {thresholds} |" + _figures(evaluation),
        _measured(evaluation, name),
        "## How to load",
        "```python\nimport modlab\n\n"
        f'model, tokenizer = modlab.load("{name}")  # a folder, or the hub id of this repository\n```',
        f"These are the routers alone, for the unchanged weights of {known}, which is loaded first."
        if routers_alone
        else "`import modlab` also teaches `AutoModelForCausalLM.from_pretrained` to load it. Without modlab "
        "(`pip install modlab`) plain transformers loads the dense model from the same files.",
    ]
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(lines) + "\n"))


def _decides(config: MoDConfig) -> str:
    """What a router decides, in half a sentence."""
    if config.skip == "kv":
        return (
            f"whether its keys and values stay in the cache beyond the latest {config.keep_recent} tokens. "
            "All tokens pass all layers"
        )
    what = {"layer": "the layer", "attention": "the layer's attention", "mlp": "the layer's MLP"}[config.skip]
    left = "" if config.skip == "mlp" else ". A skipped token leaves no keys and values there"
    return f"whether it runs through {what} or skips it{left}"


def _figures(evaluation: Evaluation | None) -> str:
    if evaluation is None:
        return ""
    return (
        f"\n| tokens kept in routed layers | {evaluation.keep_ratio:.1%} |"
        f"\n| KV cache | {evaluation.kv_saving:.2f}x smaller than the dense model's |"
        f"\n| loss | {evaluation.loss:.4f} nats a token (perplexity {evaluation.perplexity:,.2f}) |"
    )


def _measured(evaluation: Evaluation | None, name: str) -> str:
    if evaluation is None:
        return (
            "Keep ratio, KV saving and loss were not measured when this was saved: "
            f"`modlab eval {name} --data SOURCE --card` measures them and writes them here."
        )
    said = evaluation.source
    where = ", ".join(f"{said[key]}" for key in ("device_name", "dtype", "date") if key in said)
    versions = ", ".join(f"{package} {version}" for package, version in said.get("versions", {}).items())
    by = f" by `{said['command']}`" if "command" in said else ""
    on = f" on {said['data']}" if "data" in said else ""
    return (
        f"Measured{on} ({evaluation.predicted_tokens:,} predicted tokens){by}"
        + "".join(f"; {part}" for part in (where, versions) if part)
        + "."
    )


def _results(evaluation: Evaluation) -> list[EvalResult]:
    dataset = str(evaluation.source.get("data", "held-out text"))
    common: dict[str, Any] = {
        "task_type": "text-generation",
        "dataset_type": dataset,
        "dataset_name": dataset,
    }
    figures = {
        "loss": ("Loss (nats a token)", evaluation.loss),
        "keep_ratio": ("Tokens kept in routed layers", evaluation.keep_ratio),
        "kv_saving": ("KV cache saving", evaluation.kv_saving),
    }
    return [
        EvalResult(**common, metric_type=kind, metric_name=text, metric_value=round(value, 6))
        for kind, (text, value) in figures.items()
    ]
