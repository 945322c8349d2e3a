"""The settings of `modlab.fit_routers` and their refusals."""

from __future__ import annotations

from dataclasses import dataclass

from modlab.errors import ModlabError, check_count, check_number
from modlab.routing.recent_tokens import check_recent_range


@dataclass
class FitConfig:
    """Settings of `modlab.fit_routers`. Every default works.

    Attributes:
        keep_ratio: share of tokens that the routed layers keep afterwards, mean over them, in (0, 1].
        recent_range: how many of the latest tokens stay anyway (`MoDConfig.keep_recent`), from the second
            at 2x less K/V to the first at 16x: `modlab.set_kv_saving` sets them with the threshold. None: as
            converted, at all savings.
        tokens: of text that is read, the share `held_out` of it not for fitting; None: 16,384 on a CPU,
            196,608 on a GPU. Text that is shorter gives what it has.
        context: tokens of a text, which is read twice in a row; None: 1,024 on a CPU, 2,048 on a GPU, or half
            of the model's context where that is less.
        batch_size: rows a forward; None: 1 on a CPU, 4 on a GPU.
        ridge: how far the linear part is held back, in tokens.
        hidden_steps: steps that the routers' hidden layer is fitted for on what the linear part leaves, one
            sampled token in eight set aside to see which were best; 0 leaves it out, None: 400 on a GPU, none
            on a CPU.
        sample_mib: MiB of states that the hidden layer is fitted to, all layers together; up to twice as much
            while those of layers that are fitted at once are copied.
        held_out: share of the rows that are not fitted to: R² and thresholds are of these.
        seed: of the rows and of what is drawn.
    """

    keep_ratio: float = 0.5
    recent_range: tuple[int, int] | None = (128, 1024)
    tokens: int | None = None
    context: int | None = None
    batch_size: int | None = None
    ridge: float = 1000.0
    hidden_steps: int | None = None
    sample_mib: int = 1024
    held_out: float = 0.125
    seed: int = 0

    def check(self) -> None:
        """Refuses impossible settings.

        Raises:
            ModlabError: says which, with what value, and what to do.
        """
        for name in ("tokens", "context", "batch_size"):
            if (value := getattr(self, name)) is not None:
                check_count(name, value)
        if self.recent_range is not None:
            check_recent_range(self.recent_range)
        check_count("sample_mib", self.sample_mib)
        check_count("seed", self.seed, 0)
        if self.hidden_steps is not None:
            check_count("hidden_steps", self.hidden_steps, 0)
        if check_number("ridge", self.ridge) <= 0:
            raise ModlabError(f"ridge={self.ridge} has to be above 0; 1000 is a good start.")
        for name in ("keep_ratio", "held_out"):
            if not 0 < check_number(name, getattr(self, name)) <= 1:
                raise ModlabError(f"{name}={getattr(self, name)} is a share and has to lie in (0, 1].")
        if self.held_out > 0.5:
            raise ModlabError(f"held_out={self.held_out} leaves too little to fit to: 0.5 at most.")
