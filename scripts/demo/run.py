"""All stages of the demo pair in order. Finished ones are skipped, cut ones resume: run it again to go on."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import common

STAGES = ("01_tokenizer", "02_dense", "03_twin", "04_dense_continuation", "05_card")


def main() -> None:
    parser = common.parser(__doc__ or "")
    parser.add_argument("--minutes", type=float, default=8.0, help="length of each of the stages 02 and 03")
    parser.add_argument("--only", nargs="+", choices=STAGES, default=STAGES, help="run just these")
    parser.add_argument(
        "--stage-args", nargs="*", default=[], metavar="STAGE:ARGS", help='more for one, as "03_twin:--kl 1"'
    )
    args = parser.parse_args()
    extra = dict(item.split(":", 1) for item in args.stage_args)
    for stage in STAGES:
        if stage not in args.only:
            continue
        log = args.out / "logs" / f"{stage}.json"
        if (
            log.exists()
            and json.loads(log.read_text(encoding="utf-8")).get("stopped", "finished") == "finished"
        ):
            print(f"{stage}: done before ({log})")
            continue
        command = [sys.executable, str(Path(__file__).with_name(f"{stage}.py")), "--out", str(args.out)]
        own = extra.get(stage, "").split()
        if stage in ("02_dense", "03_twin") and "--steps" not in own:
            command += ["--minutes", str(args.minutes)]
        print(f"{stage}: {' '.join([*command[1:], *own])}", flush=True)
        code = subprocess.run([*command, *own]).returncode
        if code:
            raise SystemExit(f"{stage} failed with exit status {code}; run this again to take up from there.")


if __name__ == "__main__":
    main()
