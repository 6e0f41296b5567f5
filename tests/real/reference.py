"""Hypergradients of models of real libraries, and what first derivatives alone say of them.

The library is given ``functional_call(model, params, ...)``, as users write it. The reference
writes θ into the model, calls it, and never differentiates twice: products with second derivatives
are differences of gradients, with an error of the fourth order in the step.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import parameters_to_vector, vector_to_parameters

import hypergrad as hg

Call = Callable[..., Any]
Loss = Callable[[Call, Tensor], Tensor]
Objective = Callable[[dict[str, Tensor], Tensor], Tensor]
STENCIL = ((1.0, 2 / 3), (-1.0, -2 / 3), (2.0, -1 / 12), (-2.0, 1 / 12))


@dataclass(frozen=True)
class Problem:
    """``f`` and ``g`` as functions of something that is called as the model is, and of φ.

    Attributes:
        model: θ are its parameters that require gradients.
        inner: f.
        outer: g.
        hparams: φ.
        rtol: of the linear solve.
        step: of the differences, along a direction of norm 1.
        tolerance: the relative error that the solve, the rounding and the differences leave.
    """

    model: nn.Module
    inner: Loss
    outer: Loss
    hparams: Tensor
    rtol: float = 1e-7
    step: float = 1e-3
    tolerance: float = 1e-5

    def trained(self, steps: int = 30, lr: float = 1e-2) -> Problem:
        """The same problem after some steps of Adam on f, with the same dropout masks in each."""
        optimizer = torch.optim.Adam(self.params.values(), lr)
        for _ in range(steps):
            optimizer.zero_grad()
            with torch.random.fork_rng():
                self.inner(self.model, self.hparams).backward()
            optimizer.step()
        optimizer.zero_grad()
        return self

    @property
    def params(self) -> dict[str, Tensor]:
        return {k: p for k, p in self.model.named_parameters() if p.requires_grad}

    def functional(self, loss: Loss) -> Objective:
        """``loss`` as the library takes it."""

        def objective(params: dict[str, Tensor], hparams: Tensor) -> Tensor:
            return loss(lambda *a, **k: functional_call(self.model, params, a, k), hparams)

        return objective

    def hypergradient(self, **options: Any) -> hg.Hypergradient:
        """At the model's parameters, with the damping that the curvature asks for."""
        return hg.hypergradient(
            self.functional(self.inner),
            self.functional(self.outer),
            self.params,
            self.hparams,
            method=hg.Implicit(hg.CG(rtol=self.rtol)),
            on_failure="raise",
            **options,
        )


class Reference:
    """First derivatives of a problem by its model itself, as training code takes them."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.leaves = list(problem.params.values())
        self.theta = parameters_to_vector(self.leaves).detach()

    def gradients(self, loss: Loss, theta: Tensor) -> tuple[Tensor, Tensor]:
        """``(∂_θ, ∂_φ)`` of ``loss`` at θ, as vectors; the model is left as it was."""
        model = self.problem.model
        state = {k: v.detach().clone() for k, v in model.state_dict().items()}
        vector_to_parameters(theta, self.leaves)
        phi = self.problem.hparams.detach().clone().requires_grad_()
        with torch.random.fork_rng():  # dropout masks from the same state each time
            value = loss(model, phi)
        value.backward()  # what activation checkpointing of the old kind asks for
        grads = [p.grad if p.grad is not None else torch.zeros_like(p) for p in self.leaves]
        model.zero_grad()
        model.load_state_dict(state)
        theta_grad = torch.cat([grad.to_dense().flatten() for grad in grads])
        return theta_grad, torch.zeros_like(phi) if phi.grad is None else phi.grad

    def along(self, v: Tensor) -> tuple[Tensor, Tensor]:
        """``(H v, (∂_φ F)ᵀ v)`` by differences of the gradients of f along v."""
        step = self.problem.step / v.norm()
        product, mixed = torch.zeros_like(v), torch.zeros_like(self.problem.hparams)
        for place, weight in STENCIL:
            grads = self.gradients(self.problem.inner, self.theta + place * step * v)
            product, mixed = product + weight / step * grads[0], mixed + weight / step * grads[1]
        return product, mixed

    def errors(self, result: hg.Hypergradient) -> tuple[float, float]:
        """The relative residual of the solve, and the relative error of the answer for its v."""
        v = torch.cat([leaf.flatten() for leaf in result.solve.x.values()])
        rhs, direct = self.gradients(self.problem.outer, self.theta)
        product, mixed = self.along(v)
        residual = (product + result.damping * v - rhs).norm() / rhs.norm()
        expected = direct - mixed
        return float(residual), float((result.grads - expected).norm() / expected.norm())

    def hypergradient(self, damping: float) -> Tensor:
        """The answer, by the Hessian column by column."""
        columns = [self.along(row) for row in torch.eye(len(self.theta))]
        hessian = torch.stack([column[0] for column in columns])
        mixed = torch.stack([column[1] for column in columns])
        rhs, direct = self.gradients(self.problem.outer, self.theta)
        hessian = (hessian + hessian.T) / 2 + damping * torch.eye(len(rhs))
        return direct - torch.tensordot(torch.linalg.solve(hessian, rhs), mixed, 1)


def certify(problem: Problem, **options: Any) -> hg.Hypergradient:
    """The hypergradient, once first derivatives agree with it."""
    result = problem.hypergradient(**options)
    residual, error = Reference(problem).errors(result)
    assert residual < problem.tolerance, (residual, result.solve)
    assert error < problem.tolerance, error
    assert result.grads.norm() > 0.0
    return result


def certify_densely(problem: Problem, **options: Any) -> hg.Hypergradient:
    """The same for the whole Hessian, where θ is small."""
    result = problem.hypergradient(**options)
    expected = Reference(problem).hypergradient(result.damping)
    torch.testing.assert_close(result.grads, expected, rtol=problem.tolerance, atol=1e-9)
    assert result.grads.norm() > 0.0
    return result
