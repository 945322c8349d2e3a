"""Which of the kernel's threads a widget's messages are handled in."""

from __future__ import annotations

from typing import Any


def answer_anywhere(widget: Any) -> None:
    """Leave it to the front end in which of the kernel's shells this widget's messages are handled.

    JupyterLab asks for a shell beside the main one, so that a slider answers while a cell runs. But ipykernel
    7.4 ties a widget to the shell that spoke last to the browser, at first the main one, in which a waiting
    cell would keep the Stop button waiting, too. Other versions have no such tie, and this does nothing.
    """
    if widget.comm is not None:
        vars(widget.comm).pop("_reply_subshell_id", None)
