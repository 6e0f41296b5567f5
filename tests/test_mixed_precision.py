"""A bfloat16 model with float32 solve vectors, and autocast, beside float32 throughout."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

import hypergrad as hg
from hypergrad.operators import GaussNewton

Params = dict[str, Tensor]
MODEL = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 10))


def rows(split: slice, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    X, y = load_digits(return_X_y=True)
    return torch.from_numpy(X / 16.0).to(dtype)[split], torch.from_numpy(y)[split]


def objectives(dtype: torch.dtype, autocast: bool) -> tuple[Callable, Callable]:
    """f and g of a network that computes in `dtype`, or under autocast to bfloat16."""

    def loss(w: Params, split: slice) -> Tensor:
        x, y = rows(split, dtype)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            logits = functional_call(MODEL, w, (x,))
        return F.cross_entropy(logits.float(), y)

    def inner(w: Params, h: Tensor) -> Tensor:
        squares = [d * t.float().square().sum() for d, t in zip(h.exp(), w.values(), strict=True)]
        return loss(w, slice(0, 512)) + 0.5 * torch.stack(squares).sum()

    return inner, lambda w, h: loss(w, slice(512, 1024))


@pytest.fixture(scope="module")
def trained() -> Params:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 10))
    w = {k: v.detach().clone().requires_grad_() for k, v in model.named_parameters()}
    inner, _ = objectives(torch.float32, autocast=False)
    optimizer = torch.optim.Adam(w.values(), lr=1e-2)
    for _ in range(100):
        optimizer.zero_grad()
        inner(w, DECAY).backward()
        optimizer.step()
    return {k: v.detach() for k, v in w.items()}


DECAY = torch.full((4,), -5.0)


@pytest.mark.parametrize("solver", [
    hg.CG(rtol=1e-2), hg.MINRES(rtol=1e-2), hg.GMRES(rtol=1e-2), hg.BlockCG(rtol=1e-2),
    hg.CG(rtol=1e-2, preconditioner=hg.NystromPreconditioner(10)),
])  # fmt: skip
@pytest.mark.parametrize("how", ["bfloat16 parameters", "autocast"])
def test_half_precision_models_are_within_five_percent(
    solver: hg.LinearSolver, how: str, trained: Params
) -> None:
    torch.manual_seed(0)
    single = objectives(torch.float32, autocast=False)
    reference = hg.hypergradient(
        *single, trained, DECAY, method=hg.Implicit(hg.CG(rtol=1e-6), damping=0.1)
    )
    if how == "autocast":
        half = objectives(torch.float32, autocast=True)
        params = trained
    else:
        half = objectives(torch.bfloat16, autocast=False)
        params = {k: v.bfloat16() for k, v in trained.items()}
    result = hg.hypergradient(*half, params, DECAY, method=hg.Implicit(solver, damping=0.1))
    assert result.solve.converged
    assert all(leaf.dtype == torch.float32 for leaf in result.solve.x.values())
    error = (result.grads - reference.grads).norm() / reference.grads.norm()
    assert error < 0.05


def test_gauss_newton_in_half_precision_is_within_five_percent(trained: Params) -> None:
    def solve(dtype: torch.dtype) -> Tensor:
        x, y = rows(slice(0, 512), dtype)
        return hg.hypergradient(
            *objectives(dtype, autocast=False),
            {k: v.to(dtype) for k, v in trained.items()},
            DECAY,
            method=hg.Implicit(
                hg.CG(rtol=1e-2),
                damping=0.1,
                curvature=lambda w, h: GaussNewton(
                    lambda w, h: functional_call(MODEL, w, (x,)),
                    lambda z, h: F.cross_entropy(z.float(), y),
                    w,
                    h,
                ),
            ),
        ).grads

    exact, half = solve(torch.float32), solve(torch.bfloat16)
    assert (half - exact).norm() < 0.05 * exact.norm()
