"""Exit statuses that mean something."""

BAD_INPUT = 2
"""Of everything the user can correct; 1 is a run that failed, as of a notebook cell."""

INTERRUPTED = 130
"""Of Ctrl-C."""
