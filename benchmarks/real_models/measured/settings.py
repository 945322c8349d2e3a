"""A setting that is measured: a saving with its recent tokens, and what its pieces are called.

far@4                   4x with the recent tokens that the routers know of
far@4_recent_384        4x with 384 of them
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from modlab.errors import ModlabError

DENSE = "dense"


@dataclass(frozen=True)
class Setting:
    """Attributes:
    saving: that is asked for.
    recent: how many of the latest tokens stay anyway; None: what goes with the saving.
    """

    saving: float
    recent: int | None = None

    def __str__(self) -> str:
        return f"{self.saving:g}" + ("" if self.recent is None else f"_recent_{self.recent}")

    @property
    def order(self) -> tuple[float, int]:
        """By saving; the one with the saving's own recent tokens first."""
        return self.saving, self.recent or 0


def settings(savings: list[float], recent: list[int] | None) -> list[Setting]:
    """A setting a saving; one saving may come several times, with other recent tokens each time.

    Raises:
        ModlabError: not as many numbers of recent tokens as savings, or one setting twice.
    """
    if recent is not None and len(recent) != len(savings):
        raise ModlabError(
            f"{len(recent)} numbers of recent tokens for {len(savings)} savings: give one for each, such as "
            "--savings 4,4 --recent 256,384."
        )
    if recent is None:
        made = [Setting(saving) for saving in savings]
    else:
        made = [Setting(saving, tokens) for saving, tokens in zip(savings, recent, strict=True)]
    if twice := sorted({str(one) for one in made if made.count(one) > 1}):
        raise ModlabError(f"{', '.join(twice)} is asked for twice: give each setting once.")
    return made


def first_of_each(settings: list[Setting]) -> list[Setting]:
    """The first setting of each saving: the one that is held against controls."""
    first: dict[float, Setting] = {}
    for setting in settings:
        first.setdefault(setting.saving, setting)
    return list(first.values())


def named(name: str) -> Setting | None:
    """The setting of a piece's name; None: of the dense model."""
    if not (found := re.fullmatch(r"([\d.]+)(?:_recent_(\d+))?", name.rsplit("@", 1)[1])):
        return None
    return Setting(float(found[1]), int(found[2]) if found[2] else None)


def at(kind: str, setting: Setting | float | str) -> str:
    """The name of a piece: "far@4"."""
    said = f"{setting:g}" if isinstance(setting, (int, float)) else setting
    return f"{kind}@{said}".replace(" ", "_")
