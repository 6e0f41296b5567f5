"""Outer parameters that nothing uses, tensors closed over, objectives swapped: told."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

import hypergrad as hg
from hypergrad.diagnosis.report import Finding

W = torch.ones(2)


def phi(**options: Any) -> dict[str, Tensor]:
    return {"used": torch.ones(2), "learning_rate": torch.tensor(0.1, **options)}


def f(w: Tensor, h: Any) -> Tensor:
    return (w - h["used"]).square().sum()


def g(w: Tensor, h: Any) -> Tensor:
    return (w + 1.0).square().sum()


UNUSED: dict[str, Any] = {
    "left out": f,
    "detached": lambda w, h: f(w, h) + h["learning_rate"].detach() * w.square().sum(),
    "a number": lambda w, h: f(w, h) + float(h["learning_rate"].item()) * w.square().sum(),
}


@pytest.mark.parametrize("name", UNUSED)
def test_what_no_gradient_reaches_is_told(name: str) -> None:
    with pytest.warns(hg.HypergradWarning, match=r"uses hparams\['learning_rate'\]: the") as seen:
        result = hg.hypergradient(UNUSED[name], g, W, phi())
    assert len(seen) == 1
    assert seen[0].filename == __file__
    assert "'used'" not in str(seen[0].message)
    assert result.grads["learning_rate"] == 0.0
    report = hg.check(UNUSED[name], g, W, phi())
    assert Finding.UNUSED_HPARAMS in report.findings
    assert report.unused == ("hparams['learning_rate']",)
    assert "hparams['learning_rate']" in str(report)


def test_an_average_is_looked_at_and_a_stream_is_left_alone() -> None:
    average = hg.Averaged(lambda w, h, batch: f(w, h) * batch, [torch.tensor(1.0)] * 3)
    with pytest.warns(hg.HypergradWarning, match="learning_rate"):
        hg.hypergradient(average, g, W, phi())
    stream = hg.Sampled(lambda w, h, batch: f(w, h) * batch, [torch.tensor(1.0)] * 3)
    hg.hypergradient(stream, g, W, phi(), method=hg.StochasticNeumann(3, 0.2))


def test_a_zero_that_is_used_and_what_is_asked_to_be_ignored_are_not_told() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = hg.hypergradient(
            lambda w, h: f(w, h) + h["learning_rate"].square() * w.sum(),
            lambda w, h: (w - 1.0).square().sum(),
            W,
            phi(),
        )
        assert not any(grad.any() for grad in result.grads.values())
        hg.hypergradient(f, g, W, phi(), on_failure="ignore")


def test_a_place_is_told_once_where_a_call_is_repeated() -> None:
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("default")
        for _ in range(3):
            hg.hypergradient(f, g, W, phi())
    assert len(seen) == 1


def test_a_loop_tells_once() -> None:
    w, h = torch.zeros(2), phi()
    with pytest.warns(hg.HypergradWarning, match="learning_rate") as seen:
        hg.BilevelSolver(
            hg.Level(lambda w, h, _: f(w, h), w, torch.optim.SGD([w], 0.1)),
            hg.Level(lambda w, h, _: g(w, h), h, torch.optim.SGD([*h.values()], 0.1)),
            outer_steps=2,
        ).run()
    assert len(seen) == 1


def test_tensors_that_are_closed_over_are_told() -> None:
    h = phi(requires_grad=True)

    def closing(w: Tensor, _: Any) -> Tensor:
        return f(w, _) + h["learning_rate"] * w.square().sum()

    with pytest.warns(hg.HypergradWarning, match=r"got hparams\['learning_rate'\] in inner from"):
        hg.hypergradient(closing, g, W, h)
    report = hg.check(closing, g, W, h)
    assert report.closed_over == ("hparams['learning_rate'] in inner",)
    assert Finding.CLOSED_OVER in report.findings
    theta = {"a": torch.ones(2, requires_grad=True), "b": torch.zeros(2)}
    alias = theta["a"].detach().requires_grad_()
    report = hg.check(
        lambda w, h: f(w["a"] + w["b"], h) + w["b"].square().sum() + w["a"].square().sum(),
        lambda w, h: g(w["a"] + alias, h) + h["learning_rate"],
        theta,
        phi(),
    )
    assert report.closed_over == ("params['a'] in outer",)


def test_objectives_in_the_wrong_order_are_told() -> None:
    inner = lambda w, h: f(w, h) + h["learning_rate"].exp() * w.square().sum()  # noqa: E731
    h = phi()
    trained = h["used"] / (1 + h["learning_rate"].exp())
    assert Finding.SWAPPED not in hg.check(inner, g, trained, h).findings
    assert Finding.SWAPPED in hg.check(g, inner, trained, h).findings
