"""Check a built wheel: what must be in it is in it, what must not be is not, and the demo stays small.

python scripts/check_wheel.py dist/modlab-*.whl
"""

import sys
import zipfile
from pathlib import Path

DEMO_LIMIT = 40 * 1000**2  # bytes, uncompressed, all demo files together (the project's own promise)
REQUIRED = (
    "modlab/__init__.py",
    "modlab/cli/__init__.py",
    "modlab/py.typed",
    "modlab/_notebooks/README.md",
    "modlab/_notebooks/quickstart.ipynb",
    "modlab/_notebooks/1_convert.ipynb",
    "modlab/_notebooks/2_train.ipynb",
    "modlab/_notebooks/3_where_tokens_go.ipynb",
    "modlab/_notebooks/4_thresholds.ipynb",
    "modlab/_notebooks/5_what_it_buys.ipynb",
    "modlab/_notebooks/6_many_gpus.ipynb",
    "modlab/_notebooks/7_your_own_experiment.ipynb",
    "modlab/demo/dense/config.json",
    "modlab/demo/dense/model.safetensors",
    "modlab/demo/mod/config.json",
    "modlab/demo/mod/model.safetensors",
    "modlab/demo/mod/modlab_config.json",
    "modlab/demo/mod/modlab_router.safetensors",
    "modlab/demo/kv/modlab_config.json",
    "modlab/demo/kv/modlab_router.safetensors",
    "modlab/routers/smollm2-kv/modlab_router.safetensors",
    "modlab/routers/coder-0.5b-kv/modlab_router.safetensors",
    "modlab/routers/coder-1.5b-kv/modlab_router.safetensors",
)


def problems(wheel: Path) -> list[str]:
    """Everything wrong with the wheel, one line each."""
    with zipfile.ZipFile(wheel) as archive:
        sizes = {info.filename: info.file_size for info in archive.infolist()}
    found = [f"missing: {name}" for name in REQUIRED if name not in sizes]
    demo = sum(size for name, size in sizes.items() if name.startswith("modlab/demo/"))
    if demo > DEMO_LIMIT:
        found.append(f"modlab/demo takes {demo / 1e6:.1f} MB, the limit is {DEMO_LIMIT / 1e6:.0f} MB")
    if not any(name.startswith("modlab/widgets/") and name.endswith(".js") for name in sizes):
        found.append("missing: the JavaScript of modlab/widgets")
    if not any(name.startswith("modlab/_results/") and name.endswith(".json") for name in sizes):
        found.append("missing: the benchmark results in modlab/_results")
    found += [
        f"does not belong in a wheel: {name}"
        for name in sizes
        if not name.startswith("modlab") or "__pycache__" in name or name.endswith((".pyc", ".pkl", ".bin"))
    ]
    print(f"{wheel.name}: {len(sizes)} files, {wheel.stat().st_size / 1e6:.1f} MB, demo {demo / 1e6:.1f} MB")
    found += [
        f"left behind by a run of a notebook: {name}"
        for name in sizes
        if name.startswith("modlab/_notebooks/") and name.endswith(".html")
    ]
    return found


def main(arguments: list[str]) -> int:
    if not arguments:
        print(__doc__, file=sys.stderr)
        return 2
    found = [line for name in arguments for line in problems(Path(name))]
    for line in found:
        print(line, file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
