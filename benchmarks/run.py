"""Runs modlab's benchmarks on this source tree: python benchmarks/run.py CASE ... (as `modlab bench`)."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from modlab.bench import main
from modlab.errors import ModlabError

if __name__ == "__main__":
    try:
        raise SystemExit(main())
    except ModlabError as error:
        sys.exit(f"error: {error}")
