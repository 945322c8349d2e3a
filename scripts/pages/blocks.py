"""Which blocks there are, which pages hold them, and how a page is filled."""

import re
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

from scripts.pages import (
    architecture,
    bits,
    classes,
    commands,
    costs,
    defaults,
    depth,
    depth_goals,
    depth_times,
    fitted,
    many_gpus,
    measured,
    models,
    quality,
    real_models,
    results,
    robustness,
    speed,
)

ROOT = Path(__file__).resolve().parents[2]
PAGES = (
    "README.md",
    "docs/results.md",
    "docs/quality.md",
    "docs/defaults.md",
    "docs/models.md",
    "docs/commands.md",
    "docs/fast_generation.md",
    "docs/architecture.md",
    "docs/robustness.md",
    "docs/many_gpus.md",
)
BLOCKS: dict[str, Callable[[Path], str]] = {
    "why": costs.why,
    "real": costs.real_sentence,
    "costs": costs.costs,
    "real distilled": costs.distilled_sentence,
    "real table": costs.real_table,
    "demos": results.demos,
    "benchmarks": results.benchmarks,
    "headline speed": results.headline_speed,
    "growth": speed.block,
    "quality": quality.block,
    "real gates": real_models.block,
    "recipes": real_models.recipes,
    "distilled": real_models.trained,
    "quick": fitted.block,
    "measured": measured.block,
    "measured best verdicts": measured.best_verdicts,
    "measured verdicts": measured.verdicts,
    "measured int8": partial(measured.block, stored=measured.INT8),
    "measured int8 verdicts": partial(measured.verdicts, stored=measured.INT8),
    "measured k6v4": partial(measured.block, stored=measured.K6V4),
    "measured k6v4 verdicts": partial(measured.verdicts, stored=measured.K6V4),
    "measured by bits": bits.block,
    "depth": depth.block,
    "depth goals": depth_goals.block,
    "depth times": depth_times.block,
    "token classes": classes.block,
    "defaults": defaults.block,
    "supported": models.supported,
    "supported by skip": models.by_skip,
    "refused": models.refused,
    "command table": commands.overview,
    "commands": commands.reference,
    "tree": architecture.tree,
    "robustness": robustness.block,
    "many gpus": many_gpus.block,
}
"""What stands between a block's markers, from the files below a root."""

_BLOCK = re.compile(r"<!-- made: (?P<name>[\w ]+) -->\n(?P<text>.*?)<!-- end: (?P=name) -->", re.S)


def fill(text: str, root: Path = ROOT) -> str:
    """`text` with every block written afresh.

    Raises:
        KeyError: a marker names a block that does not exist.
    """

    def block(match: re.Match[str]) -> str:
        name = match["name"]
        return f"<!-- made: {name} -->\n{BLOCKS[name](root).strip()}\n<!-- end: {name} -->"

    return _BLOCK.sub(block, text)


def names(text: str) -> list[str]:
    """The blocks of a page, in their order."""
    return [match["name"] for match in _BLOCK.finditer(text)]


def write(pages: Iterable[str] = PAGES, root: Path = ROOT) -> list[str]:
    """Fills the pages in place and returns those that changed."""
    changed = []
    for page in pages:
        old = (root / page).read_text(encoding="utf-8")
        if (new := fill(old, root)) != old:
            (root / page).write_text(new, encoding="utf-8")
            changed.append(page)
    return changed


def stale(pages: Iterable[str] = PAGES, root: Path = ROOT) -> list[str]:
    """The pages that `write` would change."""
    return [page for page in pages if fill(text := (root / page).read_text(encoding="utf-8"), root) != text]
