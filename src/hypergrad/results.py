"""What every method returns: a hypergradient and the receipt of how it came about."""

from __future__ import annotations

import math
from dataclasses import dataclass

from hypergrad.linsolve import Solution
from hypergrad.optimizers import State
from hypergrad.tree import Tree
from hypergrad.verification.error_bound import ErrorBound
from hypergrad.verification.verification import Verification


@dataclass(frozen=True)
class Trajectory:
    """The receipt of unrolled steps: where they ended, detached.

    Attributes:
        params: θ_T, where the next inner loop may start.
        state: of the optimiser there.
    """

    params: Tree
    state: State


@dataclass(frozen=True)
class Hypergradient:
    """A hypergradient and its receipt.

    Attributes:
        grads: ``dg/dφ``, in the structure of ``hparams``.
        outer_value: ``g(θ, φ)``; after unrolled steps ``g(θ_T, φ)``.
        receipt: of the linear solve or of the unrolled steps, if there was either; :attr:`solve`,
            :attr:`params` and :attr:`state` look into it.
        inner_value: ``f(θ, φ)`` where the hypergradient was taken; NaN if it was not evaluated.
        inner_grad_norm: ``‖∇_θ f(θ, φ)‖₂`` there; NaN if it was not evaluated. The implicit
            function theorem asks for 0. What is left of it is an error of the hypergradient that no
            linear solver sees.
        damping: λ of the linear solve, as given or as chosen by ``damping="auto"``; else ``None``.
        error_bound: a bound on the error of ``grads``, if ``mu`` was given.
        verification: whether the derivatives of f and g agree with differences; ``None`` if this
            call did not verify. Of unrolled steps: where they began.
        matvecs: products with second derivatives.
        multiplier: λ of a penalty method, for single loops of that kind.
    """

    grads: Tree
    outer_value: float
    receipt: Solution | Trajectory | None = None
    inner_value: float = math.nan
    inner_grad_norm: float = math.nan
    damping: float | None = None
    error_bound: ErrorBound | None = None
    verification: Verification | None = None
    matvecs: int = 0
    multiplier: float | None = None

    @property
    def solve(self) -> Solution:
        """The receipt of the linear solve; ``solve.x`` is v, a warm start for the next one.

        Raises:
            AttributeError: nothing was solved.
        """
        if not isinstance(self.receipt, Solution):
            raise AttributeError("solve: this hypergradient comes from no linear solve")
        return self.receipt

    @property
    def params(self) -> Tree:
        """θ_T, detached: where the next inner loop may start.

        Raises:
            AttributeError: no steps were unrolled.
        """
        return self._trajectory.params

    @property
    def state(self) -> State:
        """The state of the optimiser after the unrolled steps, detached.

        Raises:
            AttributeError: no steps were unrolled.
        """
        return self._trajectory.state

    @property
    def _trajectory(self) -> Trajectory:
        if not isinstance(self.receipt, Trajectory):
            raise AttributeError(
                "params and state: this hypergradient comes from no unrolled steps"
            )
        return self.receipt
