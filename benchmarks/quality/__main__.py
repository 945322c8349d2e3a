"""python -m benchmarks.quality STAGE"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from benchmarks.quality import corpus
from benchmarks.quality.arms import ARMS
from benchmarks.quality.base import train_base
from benchmarks.quality.report import read_runs, write_result
from benchmarks.quality.run import run_arms
from benchmarks.quality.scale import SCALES

ROOT = Path(__file__).resolve().parents[2]


def main() -> None:
    """Reads the command line and runs the stages it names."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.quality",
        description="Quality of conversion recipes and controls on a base model trained here. Stages that "
        "are done are skipped, so the same command goes on where it was cut short.",
    )
    parser.add_argument(
        "stage", choices=["corpus", "base", "arms", "report", "all"], help="all: the four in turn"
    )
    parser.add_argument("--scale", choices=SCALES, default="full")
    parser.add_argument("--work", type=Path, help="corpus, base, checkpoints (build/quality/SCALE)")
    parser.add_argument("--results", type=Path, help="folder for the runs' JSON (benchmarks/results/quality)")
    parser.add_argument("--novels", type=Path, help="folder with train/ and heldout/ of .txt files")
    parser.add_argument("--tokenizer", type=Path, help="a finished tokenizer.json")
    parser.add_argument("--arms", default="all", help="names with commas between them; all: every one")
    parser.add_argument(
        "--tokens", type=float, help="millions of tokens an arm (the scale's screening budget)"
    )
    parser.add_argument("--seeds", default="0", help="as in 0,1,2")
    parser.add_argument("--deep", action="store_true", help="recall, retrieval and generation too")
    parser.add_argument("--minutes", type=float, help="begin no arm that would end later")
    parser.add_argument(
        "--compile", action=argparse.BooleanOptionalAction, default=True, help="the layers, on a GPU"
    )
    parser.add_argument("--per-gpu", type=int, default=1, help="processes that share a GPU")
    parser.add_argument("--commit", help="of this code, where git cannot say")
    options = parser.parse_args()
    scale = SCALES[options.scale]
    work = options.work or ROOT / "build" / "quality" / scale.name
    results = options.results or (
        ROOT / "benchmarks" / "results" / "quality" if scale.name == "full" else work / "results"
    )
    if options.stage in ("corpus", "all"):
        corpus.prepare(scale, work / "corpus", options.novels, options.tokenizer)
    if options.stage in ("base", "all"):
        train_base(scale, work / "corpus", work / "base", options.minutes)
    if options.stage in ("arms", "all"):
        names = list(ARMS) if options.arms == "all" else options.arms.split(",")
        tokens = int(options.tokens * 1e6) if options.tokens else scale.screen_tokens
        seeds = [int(seed) for seed in options.seeds.split(",")]
        run_arms(
            scale, names, tokens, seeds, work, results,
            deep=options.deep, minutes=options.minutes, compile=options.compile, commit=options.commit,
            per_gpu=options.per_gpu,
        )  # fmt: skip
    if options.stage in ("report", "all") and "QUALITY_WORKER" not in os.environ:
        print(write_result(read_runs(results), results.parent))


if __name__ == "__main__":
    main()
