"""What argmin, root and fixed_point do where they cannot succeed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_argmin import DECAY, gradient, inner
from torch import Tensor

import hypergrad as hg


def test_a_failed_solve_warns_or_raises_in_the_backward_pass() -> None:
    saddle = lambda w, c: 0.5 * w[0] ** 2 - w[1] ** 2 - (c * w).sum()  # noqa: E731
    solution = lambda c: torch.stack([c[0], -c[1] / 2])  # noqa: E731
    c = torch.ones(2, requires_grad=True)
    with pytest.warns(hg.LinearSolveWarning, match="NEGATIVE_CURVATURE"):
        hg.argmin(saddle)(solution)(c).sum().backward()
    with pytest.raises(hg.LinearSolveError, match="negative curvature"):
        hg.argmin(saddle, on_failure="raise")(solution)(c).sum().backward()
    c.grad = None
    hg.argmin(saddle, solver=hg.MINRES())(solution)(c).sum().backward()
    torch.testing.assert_close(c.grad, torch.tensor([1.0, -0.5]))


class Once(torch.autograd.Function):
    """½ w², differentiable once."""

    @staticmethod
    def forward(ctx: Any, w: Tensor) -> Tensor:
        ctx.save_for_backward(w)
        return 0.5 * w**2

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return ctx.saved_tensors[0] * g


def test_what_has_no_second_derivative_gives_a_first_one_or_raises() -> None:
    fit = hg.argmin(lambda w, c: Once.apply(w) - c * w)(lambda c: c * 1.0)
    c = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    with pytest.warns(hg.DoubleBackwardWarning, match="Once"):
        (first,) = torch.autograd.grad(fit(c), c)
    assert first.item() == pytest.approx(1.0)
    plain = hg.argmin(lambda w, c: Once.apply(w) - c * w, mode="finite-difference")
    fit = plain(lambda c: c * 1.0)
    assert torch.autograd.grad(fit(c), c)[0].item() == pytest.approx(1.0)
    with pytest.raises(hg.DoubleBackwardError, match="Once"):
        torch.autograd.grad(fit(c), c, create_graph=True)


BAD: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "inner": (lambda: hg.argmin(3), TypeError, "inner must be a function of"),  # type: ignore[arg-type]
    "function": (lambda: hg.root(None), TypeError, "function must be a function of"),  # type: ignore[arg-type]
    "fit": (lambda: hg.argmin(inner)(3), TypeError, "fit must be a function"),  # type: ignore[arg-type]
    "solver": (lambda: hg.argmin(inner, solver=hg.CG), TypeError, "solver must be a LinearSolver"),  # type: ignore[arg-type]
    "symmetric": (
        lambda: hg.root(gradient, solver=hg.CG()),
        ValueError,
        "solver must not need a symmetric operator here, got CG; use GMRES",
    ),
    "damping": (lambda: hg.argmin(inner, damping=-1.0), ValueError, "damping must be a finite"),
    "on_failure": (lambda: hg.argmin(inner, on_failure="x"), ValueError, "on_failure must be"),  # type: ignore[arg-type]
    "mode": (lambda: hg.argmin(inner, mode="x"), ValueError, "mode must be one of"),  # type: ignore[arg-type]
    "module": (
        lambda: hg.argmin(inner)(lambda m: DECAY)(torch.nn.Linear(2, 2)),
        TypeError,
        "got the module Linear; pass dict",
    ),
    "integer-solution": (
        lambda: hg.argmin(inner)(lambda d: torch.arange(3))(DECAY),
        TypeError,
        "the value of fit must be a floating-point tensor",
    ),
    "numpy-solution": (
        lambda: hg.argmin(inner)(lambda d: d.numpy())(DECAY),
        TypeError,
        "the value of fit must be a tensor, got ndarray",
    ),
    "structure": (
        lambda: (
            hg.root(lambda w, d: (w, w))(lambda d: d * 1.0)(DECAY.clone().requires_grad_())
            .sum()
            .backward()
        ),
        ValueError,
        "the value of function must have the structure of params",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused(case: str) -> None:
    build, error, words = BAD[case]
    with pytest.raises(error, match=words):
        build()
