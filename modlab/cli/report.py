"""`modlab report`: what routing costs and saves, on one page."""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modlab.cli.flags import Command, add_kv_cache_dtype, read_floats, read_integers, read_name, read_path
from modlab.cli.models import add_model_flags, load_model, store_as_asked
from modlab.errors import ModlabError

if TYPE_CHECKING:
    from modlab.measure.reporting import Report, Setting


def add(command: Command) -> None:
    """The parser of this command."""
    sub = command(
        "report",
        run,
        "compare a converted model with its dense self, and write a page of it",
        "KL and agreement by position, recall and retrieval by distance, with standard errors of paired "
        "differences; keep ratio and allocated bytes of each text. One load: the dense side is the same "
        "weights with routing off.",
    )
    sub.add_argument("model", metavar="MODEL", type=read_name, help="converted model")
    sub.add_argument(
        "--data",
        metavar="[NAME=]SOURCE",
        nargs="+",
        required=True,
        help="texts, each as for `modlab eval`; give some that are unlike the training",
    )
    sub.add_argument(
        "--base", metavar="MODEL", type=read_name, help="base of routers alone, instead of the hub's"
    )
    sub.add_argument(
        "--kv-saving",
        metavar="X,X",
        type=read_floats,
        default=(),
        help="KV savings to measure at, fewer bits included (default: as its thresholds stand)",
    )
    sub.add_argument("--seq-len", metavar="T", type=int, help="tokens a row (default: at most 2048)")
    sub.add_argument("--rows", metavar="N", type=int, default=4, help="rows of each text")
    sub.add_argument(
        "--limit-tokens", metavar="N", type=int, default=131072, help="use at most N tokens a text"
    )
    sub.add_argument(
        "--distances", metavar="D,D", type=read_integers, help="of recall and retrieval, in tokens"
    )
    sub.add_argument(
        "--questions", metavar="N", type=int, default=64, help="passages and questions a distance"
    )
    sub.add_argument("--pairs", metavar="N", type=int, default=8, help="names and values in a row")
    sub.add_argument(
        "--lengths",
        metavar="T,T",
        type=read_integers,
        default=(),
        help="also RULER-kind tasks of so many tokens",
    )
    sub.add_argument("--samples", metavar="N", type=int, default=20, help="questions a task and length")
    sub.add_argument("--seed", metavar="S", type=int, default=0, help="of all material")
    sub.add_argument("--batch-size", metavar="B", type=int, default=1, help="rows a forward")
    sub.add_argument(
        "--out",
        metavar="FILE",
        type=read_path,
        default=Path("report.html"),
        help="page; figures as .json next to it",
    )
    add_kv_cache_dtype(sub, "keys and values of routed layers")
    add_model_flags(sub)


def run(options: argparse.Namespace) -> int:
    """Runs the command and returns its exit status."""
    out: Path = options.out
    if out.suffix not in (".html", ".htm") or not out.resolve().parent.is_dir():
        raise ModlabError(f"--out {out}: the name of a page (.html) in a folder that is there.")
    sources = [_named(text, number) for number, text in enumerate(options.data, 1)]
    if len(dict(sources)) < len(sources):
        raise ModlabError(f"--data {' '.join(options.data)}: two texts have one name; say NAME=SOURCE.")

    from modlab.bench.results import circumstances, source_commit
    from modlab.measure.reporting import figures_of, report
    from modlab.routing.state import routing_of

    figures_of(out)  # refuses before hours of measuring
    model, tokenizer = load_model(options, options.model, base=options.base)
    store_as_asked(options, model)
    routing_of(model)  # a dense model is refused before data are read
    texts = {name: _rows(source, tokenizer, options.limit_tokens) for name, source in sources}
    asked: dict[str, Any] = {"distances": options.distances} if options.distances else {}
    source = {
        "command": shlex.join(["modlab", *sys.argv[1:]]),
        "commit": source_commit(),
        **circumstances(model.device, model.dtype),
    }

    def keep(found: Report) -> None:
        """Writes what there is so far: the rest may take hours, and be interrupted."""
        found.source = source
        found.write(out)
        print(_sentence(found.settings[-1]), flush=True)

    report(
        model,
        texts,
        tokenizer,
        savings=options.kv_saving,
        name=options.model,
        seq_len=options.seq_len,
        rows=options.rows,
        questions=options.questions,
        pairs=options.pairs,
        lengths=options.lengths,
        samples=options.samples,
        seed=options.seed,
        batch_size=options.batch_size,
        each=keep,
        **asked,
    )
    print(f"page: {out}\nfigures: {figures_of(out)}")
    return 0


def _sentence(setting: Setting) -> str:
    """What a setting saves and costs, in a line."""
    from modlab.measure.report_page import answers_in_words, gap_in_words, kl_in_words

    name = "present thresholds" if setting.asked is None else f"{setting.asked:g}x"
    return (
        f"{name}: K/V {setting.kv_saving:.2f}x smaller, KL {kl_in_words(setting)}, recall gap up to "
        f"{gap_in_words(setting)} tokens, dense's answers kept: {answers_in_words(setting)}"
    )


def _named(text: str, number: int) -> tuple[str, str]:
    """NAME=SOURCE, or a source that is called by its last part."""
    name, equals, source = text.partition("=")
    if not equals:
        name, source = Path(text).stem or text, text
    if not name.strip() or not source.strip():
        raise ModlabError(f"--data, text {number}: {text!r} is not of the form NAME=SOURCE or SOURCE.")
    return name, source


def _rows(source: str, tokenizer: Any, limit: int) -> list[Any]:
    """The text as long rows: probes and rows of any length are cut from them."""
    from modlab.data import packed

    split = None if Path(source).exists() else "heldout"
    dataset = packed(source, tokenizer, seq_len=512, split=split, limit_tokens=limit)
    return [row["input_ids"] for row in dataset]
