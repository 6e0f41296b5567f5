"""Hypergradients of the classical loop: train θ for some steps, estimate dg/dφ, move φ."""

from __future__ import annotations

import sys
import warnings
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Any, get_args

import torch

from hypergrad import tree as tr
from hypergrad._checks import check_choice, check_number
from hypergrad.autodiff.evaluation import filled, fresh_leaves, gradient
from hypergrad.bilevel.problem import Problem
from hypergrad.errors import DampingWarning, HypergradWarning, LinearSolveWarning
from hypergrad.hypergradients import hypergradient
from hypergrad.implicit.hypergradient import Implicit, implicit_hypergradient
from hypergrad.linsolve import Identity, LinearSolver, SGDSolve, StochasticNeumann
from hypergrad.linsolve.base import of_nothing
from hypergrad.operators import Mode
from hypergrad.operators.auto import linearised
from hypergrad.operators.gradients import value_and_gradients
from hypergrad.optimizers import from_torch
from hypergrad.results import Hypergradient
from hypergrad.tree import Tree


class Estimator(ABC):
    """Estimates ``dg/dφ`` at the θ that the inner optimiser has reached.

    A new one is a frozen dataclass with :meth:`estimate`.
    """

    @abstractmethod
    def estimate(self, problem: Problem, x0: Tree | None) -> Hypergradient:
        """The hypergradient at ``problem.params`` and ``problem.hparams``, neither of them changed.

        Args:
            problem: the problem; its objectives draw batches.
            x0: ``solve.x`` of the last estimate, if its solve got anywhere.
        """


@dataclass(frozen=True)
class ByImplicit(Estimator):
    """The estimator of :class:`hypergrad.Implicit`.

    Args:
        method: the options.

    Raises:
        ValueError: its solver wants a fresh batch for each product.
    """

    method: Implicit

    def __post_init__(self) -> None:
        solver = self.method.solver
        if solver.needs_fresh_batches:
            name = "StocBiO" if isinstance(solver, StochasticNeumann) else "AmIGO"
            raise ValueError(
                f"solver must take its operator for one fixed matrix in a loop, got "
                f"{type(solver).__name__}, which wants a fresh batch for each product; use "
                f"hg.bilevel.{name}(...), which draws them"
            )

    def estimate(self, problem: Problem, x0: Tree | None) -> Hypergradient:
        """As :func:`hypergrad.hypergradient` does, with one warning for each way to fail."""
        method, on_failure = self.method, problem.on_failure
        solver, curvature = method.solver, method.curvature
        warm = solver.gains_from_x0 if method.warm_start is None else method.warm_start
        batches = problem.draw_inner()
        result = implicit_hypergradient(
            replace(
                method,
                damping=problem.damping if method.damping == "auto" else method.damping,
                curvature=curvature and (lambda w, h: curvature(w, h, *batches)),
            ),
            problem.inner_objective(batches),
            problem.outer_objective(),
            problem.params.tree,
            problem.hparams.tree,
            on_failure="ignore" if on_failure == "warn" else on_failure,
            x0=x0 if warm else None,
            verify=problem.verify,
        )
        status = result.solve.status
        if on_failure == "warn" and status.failed:
            # The same words each time, so that Python's filter shows them once.
            warnings.warn(
                f"the linear solve of {type(solver).__name__} failed: {status.name}: "
                f"{status.value}{of_nothing(result.solve)}; history['status'] has every step",
                LinearSolveWarning,
                stacklevel=1,
            )
        if on_failure == "warn" and problem.damping.exceeds(result.damping or 0.0):
            warnings.warn(
                "damping='auto' took more than the largest curvature that was met: θ is far from a "
                "minimum of the inner objective; make more inner_steps or warmup_steps, or give "
                "method=hg.Implicit(damping=...) a number; history['damping'] has every step",
                DampingWarning,
                stacklevel=1,
            )
        return result


@dataclass(frozen=True)
class OneStep(Estimator):
    """What looks one step of gradient descent back or ahead.

    Args:
        lr: of that step; ``None`` takes the present one of the inner optimiser.
        mode: how the mixed product is computed.

    Raises:
        TypeError, ValueError: an option of the wrong kind or out of its range.
    """

    lr: float | None = None
    mode: Mode = "auto"

    def __post_init__(self) -> None:
        if self.lr is not None:
            check_number(self.lr, "lr", above=0.0)
        check_choice(self.mode, "mode", get_args(Mode))


@dataclass(frozen=True)
class T1T2(OneStep):
    """The hypergradient of the last inner step: ``∂_φ g − lr (∂_φ F)ᵀ ∂_θ g``.

    Luketina et al. 2016, *Scalable gradient-based tuning of continuous regularization
    hyperparameters*. One mixed product, no solve; short-sighted: exact only where H is ``I / lr``.

    Args:
        lr: ``None`` takes the present one of the inner optimiser, as the paper does.
        mode: how the mixed product is computed.

    Raises:
        TypeError, ValueError: an option of the wrong kind or out of its range.
    """

    def estimate(self, problem: Problem, x0: Tree | None) -> Hypergradient:
        """By a scaled identity in place of the inverse."""
        # Where a schedule has ended at 0 the last step did not move θ, and only ∂_φ g is left.
        scale = step_size(self.lr, problem, self) or sys.float_info.min
        return ByImplicit(Implicit(Identity(scale), mode=self.mode)).estimate(problem, None)


@dataclass(frozen=True)
class DARTS(OneStep):
    """One virtual step ahead: ``∂_φ g(θ', φ) + (∂_φ F)ᵀ (∂θ'/∂F)ᵀ ∂_θ g(θ', φ)``.

    ``θ'`` is where the inner optimiser would lead on the gradient ``F(θ, φ)``, with its momentum
    and weight decay: for gradient descent ``θ − lr F``. Liu et al. 2019, *DARTS:
    differentiable architecture search*, Equation 7, with the mixed product by central differences
    of the gradient in φ (Equation 8): first derivatives only. Where the optimiser has no
    differentiable twin the step is one of gradient descent, and a warning says so.

    Args:
        lr: of the virtual step; ``None`` takes the present one of the inner optimiser, as the paper
            does.
        mode: how the mixed product is computed.

    Raises:
        TypeError, ValueError: an option of the wrong kind or out of its range.
    """

    mode: Mode = "finite-difference"

    def estimate(self, problem: Problem, x0: Tree | None) -> Hypergradient:
        """By Equations 7 and 8."""
        inner = linearised(
            problem.inner_objective(), problem.params.tree, problem.hparams.tree, mode=self.mode
        )
        grads = fresh_leaves(inner.gradient)
        with torch.enable_grad():
            ahead = self._ahead(problem, grads)
        leaves = fresh_leaves(ahead), fresh_leaves(problem.hparams.tree)
        value, cotangent, direct = value_and_gradients(problem.outer_objective(), *leaves, "outer")
        # For plain gradient descent −lr times the cotangent.
        vector = filled(gradient(tr.pairing(ahead, cotangent), grads), grads)
        return Hypergradient(
            tr.add(direct, inner.vjp_outer(vector)) if tr.norm(vector) > 0.0 else direct,
            value,
            inner_value=inner.value,
            inner_grad_norm=tr.norm(inner.gradient),
            matvecs=1,
        )

    def _ahead(self, problem: Problem, grads: Tree) -> Tree:
        """θ', a function of the gradient."""
        params = tr.detach(problem.params.tree)
        try:
            optimizer: Any = problem.inner.optimizer
            twin = from_torch(optimizer)
        except TypeError:
            warnings.warn(
                f"DARTS looks ahead by a step of gradient descent, since "
                f"{type(problem.inner.optimizer).__name__} has no differentiable twin; use "
                "inner.optimizer torch.optim.SGD(...) or Adam(...) to look ahead by the step that "
                "trains",
                HypergradWarning,
                stacklevel=1,
            )
            return tr.add(params, grads, -step_size(self.lr, problem, self))
        twin = twin if self.lr is None else twin.with_lr(self.lr)
        return twin.update(grads, twin.init(problem.params.tree), params)[0]


@dataclass(frozen=True)
class StocBiO(Estimator):
    """A Neumann series whose every factor is a fresh mini-batch, unbiased for that of their mean.

    Ji, Yang & Liang 2021, *Bilevel optimization: convergence analysis and enhanced design*,
    Algorithm 2. The inner loop is plain SGD, warm-started.

    Args:
        terms: Q of the paper; costs ``terms − 1`` products.
        step: η of the paper; ``None`` is 1/λ_max, estimated each time by ten products.

    Raises:
        TypeError, ValueError: an option of the wrong kind or out of its range.
    """

    terms: int = 20
    step: float | None = None

    def __post_init__(self) -> None:
        StochasticNeumann(self.terms, self.step)

    def estimate(self, problem: Problem, x0: Tree | None) -> Hypergradient:
        """By :class:`hypergrad.StochasticNeumann`."""
        return _sampled(problem, StochasticNeumann(self.terms, self.step), None)


@dataclass(frozen=True)
class AmIGO(Estimator):
    """Stochastic gradient descent on the linear system, a fresh mini-batch a step, warm-started.

    Arbel & Mairal 2022, *Amortized implicit differentiation for stochastic bilevel optimization*,
    Algorithm 1.

    Args:
        steps: N of the paper; each costs one product.
        step: β of the paper; ``None`` is 1/λ_max, estimated each time by ten products.

    Raises:
        TypeError, ValueError: an option of the wrong kind or out of its range.
    """

    steps: int = 10
    step: float | None = None

    def __post_init__(self) -> None:
        SGDSolve(self.steps, self.step)

    def estimate(self, problem: Problem, x0: Tree | None) -> Hypergradient:
        """By :class:`hypergrad.SGDSolve`."""
        # The last iterate: the mean of a few would hold back what the warm start gains.
        return _sampled(problem, SGDSolve(self.steps, self.step, average=False), x0)


def step_size(lr: float | None, problem: Problem, method: object) -> float:
    """``lr``, or that of the inner optimiser.

    Raises:
        ValueError: there is neither.
    """
    if lr is None:
        lr = problem.inner_lr
    if lr is None:
        raise ValueError(
            f"lr of {type(method).__name__} must be given where inner.optimizer has no one lr"
        )
    return lr


def _sampled(problem: Problem, solver: LinearSolver, x0: Tree | None) -> Hypergradient:
    return hypergradient(
        problem.sampled_inner(),
        problem.outer_objective(),
        problem.params.tree,
        problem.hparams.tree,
        method=Implicit(solver, damping=problem.damping),
        x0=x0,
    )
