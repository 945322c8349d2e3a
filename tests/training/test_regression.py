"""Hidden layers of routers: fitted together as each by itself, and never to the harm of unseen tokens."""

from __future__ import annotations

import weakref

import pytest
import torch
from torch import Tensor

from modlab.routing.router import HiddenRouter
from modlab.training import regression
from modlab.training.regression import Sample, fit_hidden, logits

D, A, U = 12, 2, 8


@pytest.fixture(autouse=True)
def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(regression, "BATCH", 256)


def drawn(seed: int, S: int = 2048, gates: int = A, of: str = "hidden") -> Sample:
    """A router whose linear part is the best there is, states, and scores that a hidden layer can tell
    ("hidden") or nothing can ("noise")."""
    generator = torch.Generator().manual_seed(seed)
    router = HiddenRouter(D, 0.5, U, gates=gates)
    x_SD = torch.randn(S, D, generator=generator)
    n_SD = regression.normalised(x_SD)
    y_SA = 3 * n_SD[:, :gates].abs() if of == "hidden" else torch.randn(S, gates, generator=generator)
    seen = slice(0, S - S // regression.ASIDE)
    with_ones = torch.nn.functional.pad(n_SD, (0, 1), value=1.0)
    found = torch.linalg.lstsq(with_ones[seen], y_SA[seen]).solution
    router.weight.data, router.bias.data = found[:D].T.reshape(router.weight.shape).clone(), found[D].clone()
    return router, x_SD, y_SA


def error(sample: Sample) -> float:
    router, x_SD, y_SA = sample
    with torch.no_grad():
        return float((logits(router, x_SD) - y_SA).square().mean())


def weights(router: HiddenRouter) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in router.parameters()]


@pytest.mark.parametrize("together", [regression.TOGETHER, 1])
def test_layers_fitted_together_are_as_each_by_itself(together: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Others of another shape are among them, and a router with one gate: a dimension less in its weights."""
    monkeypatch.setattr(regression, "TOGETHER", together)

    def made() -> list[Sample]:
        return [drawn(0), drawn(1), drawn(2, S=1200), drawn(3, gates=1), drawn(4)]

    all_at_once, alone = made(), made()
    fit_hidden(list(all_at_once), 300, seed=5)
    for sample in alone:
        fit_hidden([sample], 300, seed=5)
    for before, one, other in zip(made(), all_at_once, alone, strict=True):
        assert error(one) < 0.95 * error(before)
        for got, want in zip(weights(one[0]), weights(other[0]), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4)


def test_samples_are_let_go_once_they_are_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of the layers that are fitted, not of all others."""
    monkeypatch.setattr(regression, "TOGETHER", 2 * regression.BATCH * D)
    samples = [drawn(seed) for seed in range(4)]
    held = [[weakref.ref(x_SD), weakref.ref(y_SA)] for _, x_SD, y_SA in samples]
    alive: list[list[bool]] = []

    def look(layers: regression._Layers) -> list[Tensor]:
        alive.append([any(one() is not None for one in refs) for refs in held])
        return copied(layers)

    copied = regression._Layers.copy
    monkeypatch.setattr(regression._Layers, "copy", look)
    fit_hidden(samples, 2, seed=0)
    assert alive == [[False, False, True, True], [False] * 4]


def test_a_layer_that_only_loses_on_what_is_set_aside_stays_linear_and_others_do_not() -> None:
    stays, moves = drawn(0, of="noise"), drawn(1)
    router, x_SD, y_SA = stays
    aside = slice(-(len(x_SD) // regression.ASIDE), None)
    with torch.no_grad():
        y_SA[aside] = logits(router, x_SD[aside])  # told by the linear part to the last digit
    before = weights(router)
    fit_hidden([stays, moves], 100, seed=0)
    assert all(torch.equal(*pair) for pair in zip(before, weights(router), strict=True))
    assert moves[0].out.abs().max() > 0


def test_unseen_tokens_lose_nothing_by_a_fit_to_few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a fit to its end loses."""

    def of_linear() -> float:
        """The error on unseen tokens, in those of the linear part."""
        router, x_SD, y_SA = drawn(3, S=48)
        y_SA += torch.randn(y_SA.shape, generator=torch.Generator().manual_seed(9))
        unseen = drawn(8)
        linear = error((router, *unseen[1:]))
        fit_hidden([(router, x_SD, y_SA)], 400, seed=0)
        return error((router, *unseen[1:])) / linear

    assert of_linear() < 1.01
    keep_better = regression._Layers.keep_better

    def keep_latest(layers: regression._Layers, best: list[Tensor], better_L: Tensor) -> None:
        keep_better(layers, best, torch.ones_like(better_L))

    monkeypatch.setattr(regression._Layers, "keep_better", keep_latest)
    assert of_linear() > 1.1


def test_tokens_too_few_to_set_one_aside_leave_the_linear_part() -> None:
    sample = drawn(0, S=7)
    before = weights(sample[0])
    fit_hidden([sample], 10, seed=0)
    assert [torch.equal(*pair) for pair in zip(before, weights(sample[0]), strict=True)] == [True] * 4
