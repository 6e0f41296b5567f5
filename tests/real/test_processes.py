"""Gaussian processes of gpytorch and neural differential equations of torchdiffeq."""

from __future__ import annotations

from typing import Any

import gpytorch
import pytest
import torch
import torchdiffeq
from reference import Call, Problem, certify_densely
from torch import Tensor, nn
from torch.nn import functional as F


class Process(gpytorch.models.ExactGP):
    def __init__(self, x: Tensor, y: Tensor, likelihood: nn.Module) -> None:
        super().__init__(x, y, likelihood)
        self.mean = gpytorch.means.ConstantMean()
        self.kernel = gpytorch.kernels.ScaleKernel(gpytorch.kernels.RBFKernel(ard_num_dims=2))

    def forward(self, x: Tensor) -> Any:
        return gpytorch.distributions.MultivariateNormal(self.mean(x), self.kernel(x))


class Regression(nn.Module):
    """A Gaussian process and its likelihood as one module."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        super().__init__()
        self.likelihood = gpytorch.likelihoods.GaussianLikelihood()
        self.process = Process(x, y, self.likelihood)
        self.evidence = gpytorch.mlls.ExactMarginalLogLikelihood(self.likelihood, self.process)

    def forward(self, x: Tensor, y: Tensor, x_new: Tensor | None = None) -> Tensor:
        """−log p(y) of the rows, or the mean at new ones."""
        self.process.set_train_data(x, y, strict=False)
        if x_new is None:
            self.train()
            return -self.evidence(self.process(x), y)
        self.eval()
        return self.process(x_new).mean


def kernel_problem(predict: bool) -> Problem:
    """Parameters of a kernel by their evidence: φ are corrections of the training targets."""
    x, x_val = torch.rand(2, 15, 2)
    y, y_val = (torch.sin(3 * rows.sum(1)) + 0.1 * torch.randn(15) for rows in (x, x_val))

    def inner(call: Call, hparams: Tensor) -> Tensor:
        return call(x, y + hparams)

    def outer(call: Call, hparams: Tensor) -> Tensor:
        if not predict:
            return call(x_val, y_val)
        with gpytorch.settings.detach_test_caches(False):
            return F.mse_loss(call(x, y + hparams, x_val), y_val)

    return Problem(Regression(x, y), inner, outer, 0.1 * torch.randn(15))


@pytest.mark.parametrize("predict", [False, True])
def test_kernels_agree_with_a_dense_hessian(predict: bool) -> None:
    certify_densely(kernel_problem(predict).trained())


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


@pytest.mark.parametrize("method", ["rk4", "dopri5"])
def test_differential_equations_agree_with_a_dense_hessian(method: str) -> None:
    problem = trajectories(Flow(method=method, rtol=1e-8, atol=1e-8))
    certify_densely(problem.trained(10))
