"""`python -m modlab` is the same program as `modlab`."""

import sys

from modlab.cli import main

if __name__ == "__main__":
    sys.exit(main())
