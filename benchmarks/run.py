"""Runs modlab's benchmarks from a source tree: python benchmarks/run.py CASE ... (the same as modlab
bench)."""

import sys

from modlab.bench import main
from modlab.errors import ModlabError

if __name__ == "__main__":
    try:
        raise SystemExit(main())
    except ModlabError as error:
        sys.exit(f"error: {error}")
