"""Gaussian processes of gpytorch and neural differential equations of torchdiffeq."""

from __future__ import annotations

import contextlib
from typing import Any

import gpytorch
import pytest
import torch
import torchdiffeq
from reference import Call, Problem, certify_densely
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

import hypergrad as hg


class Process(gpytorch.models.ExactGP):
    def __init__(self, x: Tensor, y: Tensor, likelihood: nn.Module, kernel: nn.Module) -> None:
        super().__init__(x, y, likelihood)
        self.mean = gpytorch.means.ConstantMean()
        self.kernel = gpytorch.kernels.ScaleKernel(kernel)

    def forward(self, x: Tensor) -> Any:
        return gpytorch.distributions.MultivariateNormal(self.mean(x), self.kernel(x))


class Regression(nn.Module):
    """A Gaussian process and its likelihood as one module."""

    def __init__(self, x: Tensor, y: Tensor, kernel: nn.Module) -> None:
        super().__init__()
        self.likelihood = gpytorch.likelihoods.GaussianLikelihood()
        self.process = Process(x, y, self.likelihood, kernel)
        self.evidence = gpytorch.mlls.ExactMarginalLogLikelihood(self.likelihood, self.process)

    def forward(self, x: Tensor, y: Tensor, x_new: Tensor | None = None) -> Tensor:
        """−log p(y) of the rows, or the mean at new ones."""
        self.process.set_train_data(x, y, strict=False)
        if x_new is None:
            self.train()
            return -self.evidence(self.process(x), y)
        self.eval()
        return self.process(x_new).mean


def kernel_problem(
    *, predict: bool = False, scales: int | None = 2, detach: bool = False, **options: Any
) -> Problem:
    """Parameters of a kernel by their evidence: φ are corrections of the training targets."""
    x, x_val = torch.rand(2, 15, 2)
    y, y_val = (torch.sin(3 * rows.sum(1)) + 0.1 * torch.randn(15) for rows in (x, x_val))

    def inner(call: Call, hparams: Tensor) -> Tensor:
        return call(x, y + hparams)

    def outer(call: Call, hparams: Tensor) -> Tensor:
        if not predict:
            return call(x_val, y_val)
        with gpytorch.settings.detach_test_caches(detach):
            return F.mse_loss(call(x, y + hparams, x_val), y_val)

    model = Regression(x, y, gpytorch.kernels.RBFKernel(ard_num_dims=scales))
    return Problem(model, inner, outer, 0.1 * torch.randn(15), **options)


@pytest.mark.parametrize("predict", [False, True])
def test_kernels_agree_with_a_dense_hessian(predict: bool) -> None:
    certify_densely(kernel_problem(predict=predict).trained())


def test_a_kernel_without_second_derivatives_goes_on_with_differences() -> None:
    """With one length scale, gpytorch has a function of its own for the kernel's gradient."""
    problem = kernel_problem(scales=None).trained()
    with pytest.warns(hg.DoubleBackwardWarning, match="RBFCovariance"):
        certify_densely(problem)


def test_a_prediction_whose_caches_are_detached_is_told() -> None:
    problem = kernel_problem(predict=True, detach=True).trained()
    with pytest.raises(hg.VerificationError, match="first derivative of outer"):
        problem.hypergradient()


class Field(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 5), nn.Tanh(), nn.Linear(5, 2))

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return self.net(y)


TIMES = torch.linspace(0.0, 1.0, 5, dtype=torch.float64)


class Flow(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.field, self.options = Field(), options

    def forward(self, start: Tensor) -> Tensor:
        return torchdiffeq.odeint(self.field, start, TIMES, **self.options)


def trajectories(model: nn.Module, **options: Any) -> Problem:
    """Paths from given starts: φ are the weights of the training paths."""
    start, start_val = torch.randn(2, 6, 2)
    paths, paths_val = torch.randn(2, 5, 6, 2)

    def inner(call: Call, hparams: Tensor) -> Tensor:
        return hparams.exp() @ (call(start) - paths).square().mean((0, 2))

    def outer(call: Call, hparams: Tensor) -> Tensor:
        return (call(start_val) - paths_val).square().mean()

    return Problem(model, inner, outer, 0.3 * torch.randn(6), **options)


# The few steps lead to no minimum, and the Hessian asks for much damping: it is part of the system.
@pytest.mark.filterwarnings("ignore::hypergrad.DampingWarning")
@pytest.mark.parametrize("method", ["rk4", "dopri5"])
def test_differential_equations_agree_with_a_dense_hessian(method: str) -> None:
    problem = trajectories(Flow(method=method, rtol=1e-8, atol=1e-8))
    certify_densely(problem.trained(10))


def adjoint_problem() -> tuple[Any, Any, dict[str, Tensor], Tensor]:
    """Paths by `odeint` and by `odeint_adjoint`, whose backward pass records no graph."""
    field = nn.Sequential(nn.Linear(2, 5), nn.Tanh(), nn.Linear(5, 2))
    start, paths = torch.randn(6, 2), torch.randn(5, 6, 2)

    def solve(params: dict[str, Tensor], adjoint: bool) -> Tensor:
        def slope(t: Tensor, y: Tensor) -> Tensor:
            return functional_call(field, params, (y,))

        if not adjoint:
            return torchdiffeq.odeint(slope, start, TIMES, rtol=1e-10, atol=1e-10)
        leaves = tuple(params.values())
        return torchdiffeq.odeint_adjoint(
            slope, start, TIMES, adjoint_params=leaves, rtol=1e-10, atol=1e-10
        )

    def loss(params: dict[str, Tensor], hparams: Tensor, adjoint: bool) -> Tensor:
        misfit = (solve(params, adjoint) - paths).square().mean((0, 2))
        return hparams.exp() @ misfit + sum(p.square().sum() for p in params.values())

    def outer(params: dict[str, Tensor], hparams: Tensor) -> Tensor:
        return solve(params, False)[-1].square().mean()

    params = {k: p.detach() for k, p in field.named_parameters()}
    return loss, outer, params, 0.3 * torch.randn(6)


def test_an_adjoint_goes_on_with_differences() -> None:
    loss, outer, params, hparams = adjoint_problem()
    answers = []
    for adjoint in (False, True):
        told = pytest.warns(hg.DoubleBackwardWarning, match="OdeintAdjointMethod")
        with told if adjoint else contextlib.nullcontext():
            answers.append(
                hg.hypergradient(
                    lambda p, h: loss(p, h, adjoint),  # noqa: B023
                    outer, params, hparams,
                    method=hg.Implicit(hg.CG(rtol=1e-6), damping=20.0), verify="always",
                ).grads
            )  # fmt: skip
    torch.testing.assert_close(answers[1], answers[0], rtol=1e-4, atol=1e-7)
