"""The model card of a converted model: what was routed, what it saves and costs, how to load it.

Names, paths and commands come from anywhere; in the card they are text, never Markdown or HTML.
"""

from __future__ import annotations

import html
import re
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from modlab.config import KV_BITS, MoDConfig
from modlab.routing.kv_saving import known_of
from modlab.routing.state import Routing, routing_of
from modlab.routing.trained import Trained
from modlab.saving.files import CARD_FILE, is_hub_id

if TYPE_CHECKING:
    from modlab.measure import Evaluation

OURS = "<!-- written by modlab -->"
"""Marks a card as generated: it may be written again. Take the line out to keep what you changed."""

PAPER = "https://arxiv.org/abs/2410.14268"
MARKDOWN = re.compile(r"([\\`*_{}\[\]()#+!|~^$-])")


def plain(text: str) -> str:
    """`text` as Markdown that shows it as it is, in one line."""
    return MARKDOWN.sub(r"\\\1", html.escape(" ".join(text.split()), quote=False))


def code(text: str) -> str:
    """`text` as inline code, in one line."""
    text = " ".join(text.split())
    ticks = "`" * (max((len(run) for run in re.findall("`+", text)), default=0) + 1)
    pad = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{ticks}{pad}{text}{pad}{ticks}"


def python_block(source: str) -> str:
    """Python in a fence that nothing inside can close."""
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", source)), default=0))
    return f"{fence}python\n{source}\n{fence}"


def write_card(
    model: Any,
    folder: Path,
    target: Path,
    evaluation: Evaluation | None = None,
    routers_of: str | None = None,
) -> None:
    """Writes README.md into `folder`, unless `target`, the folder it is meant for, has somebody else's.

    Args:
        model: a converted model.
        folder: where to write.
        target: where the files will lie; its name heads the card.
        evaluation: measured figures; without them the card says how to get them.
        routers_of: the base model, if the folder holds no weights but the routers.
    """
    old = target / CARD_FILE
    if old.is_file() and OURS not in old.read_text(encoding="utf-8", errors="replace"):
        return
    text = model_card(model, target.resolve().name, evaluation, routers_of)
    (folder / CARD_FILE).write_text(text, encoding="utf-8")


def model_card(
    model: Any, name: str, evaluation: Evaluation | None = None, routers_of: str | None = None
) -> str:
    """The card as Markdown with the hub's metadata block; arguments as in `write_card`."""
    routing, known = routing_of(model), routers_of or model.mod_base_model
    hub_base = known if is_hub_id(known) else None
    data = ModelCardData(
        model_name=" ".join(name.split()),
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["mixture-of-depths", "modlab"],
        base_model=hub_base,
        eval_results=_results(evaluation) if evaluation is not None else None,
    )
    base = ""
    if known:
        base = f" of [{hub_base}](https://huggingface.co/{hub_base})" if hub_base else f" of {code(known)}"
    config: MoDConfig = routing.config
    who = "a fixed rule" if routing.skip.decides_itself else "a router"
    lines = [
        f"# {plain(name)}",
        OURS,
        f"A Mixture-of-Depths version{base}: in {len(routing.layers)} of its {routing.num_layers} layers "
        f"{who} decides for each token {routing.skip.decides(config)} ([MoDification]({PAPER})).",
        "| | |\n|---|---|\n"
        f"| routed layers | {', '.join(map(str, routing.layers))} |\n"
        + _routing_lines(routing)
        + _figures(evaluation),
        _measured(evaluation, name) + (_trained(known_of(model)) if routing.trained else ""),
        "## How to load",
        python_block(
            "import modlab\n\n"
            f"model, tokenizer = modlab.load({_quoted(name)})  # a folder, or this repository's hub id"
        ),
        f"These are the routers alone, for the unchanged weights of {code(routers_of)}, which is loaded "
        "first."
        if routers_of
        else "`import modlab` also teaches `AutoModelForCausalLM.from_pretrained` to load it. Without modlab "
        "(`pip install modlab`) plain transformers loads the dense model from the same files.",
    ]
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(lines) + "\n"))


def _routing_lines(routing: Routing) -> str:
    """Rows of the table: what is routed, and by which gates and thresholds where gates decide."""
    config, routed = routing.config, routing.skip.words.routed
    if routing.skip.decides_itself:
        return f"| routing | {routed} |"
    values = sorted({round(float(p), 4) for p in routing.thresholds.values()})
    thresholds = f"{values[0]:g}" if len(values) == 1 else f"{values[0]:g} to {values[-1]:g}, one a layer"
    lines = [
        f"| routing | {config.operator}, {routed}, gate {config.gate} |",
        f"| threshold p | {thresholds} |",
    ]
    if routing.ranges:
        lines.append(f"| keys and values | in {KV_BITS[config.kv_cache_dtype]}, a step a token and KV head |")
    return "\n".join(lines)


def _quoted(name: str) -> str:
    """A Python literal, in double quotes where that is plain."""
    return f'"{name}"' if re.fullmatch(r"[^\\\"\x00-\x1f]*", name) and name.isprintable() else repr(name)


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
            f"{code(f'modlab eval {shlex.quote(name)} --data SOURCE')} measures them, and "
            "`model.save_pretrained(folder, evaluation=modlab.measure.evaluate(model, batches))` writes them "
            "here."
        )
    said = evaluation.source
    where = ", ".join(plain(str(said[key])) for key in ("device_name", "dtype", "date") if key in said)
    used = said.get("versions", {}).items()
    versions = ", ".join(plain(f"{package} {version}") for package, version in used)
    by = f" by {code(str(said['command']))}" if "command" in said else ""
    on = f" on {plain(str(said['data']))}" if "data" in said else ""
    return (
        f"Measured{on} ({evaluation.predicted_tokens:,} predicted tokens){by}"
        + "".join(f"; {part}" for part in (where, versions) if part)
        + "."
    )


def _trained(trained: Trained) -> str:
    """What is known of the routers, as further paragraphs."""
    known = ", ".join(
        f"{saving:.4g}x at p = {p:.4g}"
        + (f" with the latest {trained.recent[saving]:,}" if trained.recent else "")
        + (" (beyond the training)" if saving > trained.trained_to else "")
        for saving, p in sorted(trained.savings.items())
    )
    said = [
        f"Thresholds by KV saving, for `modlab.set_kv_saving(model, ...)`: {known}; over texts of "
        f"{trained.seq_len:,} tokens, of which one may get more or less."
        if known
        else "",
        f"The routers were trained on the weights of: {plain(trained.weights)}." if trained.weights else "",
        f"Their data, {trained.tokens:,} tokens: {plain(trained.data)}." if trained.data else "",
        f"How: {plain(trained.method)}." if trained.method else "",
        f"Measured: {plain(trained.results)}." if trained.results else "",
    ]
    return "".join(f"\n\n{paragraph}" for paragraph in said if paragraph)


def _results(evaluation: Evaluation) -> list[EvalResult]:
    dataset = " ".join(str(evaluation.source.get("data", "held-out text")).split())
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
