"""Hypergradients by the implicit function theorem.

dg/dφ = ∂_φ g − (∂_φ F)ᵀ v,   where   H v = ∂_θ g,   F = ∇_θ f(θ, φ),   H = ∂_θ F
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch

from hypergrad import tree as tr
from hypergrad._checks import (
    check_choice,
    check_like,
    check_number,
    check_objective,
    check_structure,
)
from hypergrad.autodiff.evaluation import Objective, fresh_leaves
from hypergrad.autodiff.isolation import isolated_buffers
from hypergrad.errors import DampingWarning, warn
from hypergrad.linsolve import CG, AutoDamping, LinearSolver, extreme_eigenvalues
from hypergrad.linsolve.base import OnFailure, check_solver, report_failure, residual_norm
from hypergrad.operators import Hessian, LinearOperator, Mode, damped
from hypergrad.operators.auto import linearised
from hypergrad.operators.gradients import value_and_gradients
from hypergrad.results import Hypergradient
from hypergrad.tree import Tree
from hypergrad.verification.dependence import warn_of_unused
from hypergrad.verification.differences import verifying
from hypergrad.verification.error_bound import ErrorBound, Source, error_bound
from hypergrad.verification.moving_buffers import FirstRun, warn_of_statistics
from hypergrad.verification.verification import (
    Course,
    Verify,
    report_verification,
    verify_derivatives,
)


@dataclass(frozen=True)
class Implicit:
    """``dg/dφ`` by the implicit function theorem, at a minimiser θ of the inner objective.

        dg/dφ = ∂_φ g − (∂_φ F)ᵀ v,   (H + damping · I) v = ∂_θ g,   F = ∇_θ f,   H = ∂²f/∂θ²

    A linear solver alone, as ``method=``, stands for ``Implicit(solver)``.

    Args:
        solver: how to solve for v.
        damping: λ ≥ 0, added to the diagonal of H. ``"auto"``: 0, or where the solver meets
            negative or no curvature, as much as it takes; the receipt says how much, and a loop
            starts each outer step from what the last one took. An
            :class:`hypergrad.linsolve.AutoDamping` that is given again to the next call goes on
            from there.
        curvature: a function of what ``inner`` takes, such as ``curvature(params, hparams)``, that
            returns the symmetric operator to solve with in place of H, such as
            :class:`hypergrad.operators.GaussNewton`. The mixed product stays exact.
        mode: how Hessian products are computed, see :func:`hypergrad.operators.hessian`.
        mu: μ, a number > 0 that no eigenvalue of H lies below, for an :class:`ErrorBound` of the
            answer; costs some ten to a hundred products more. ``"auto"`` takes what the operator
            knows (such as the damping of a positive semi-definite one) or else a Lanczos estimate,
            and says which. For an :class:`Averaged` objective it holds all batches in memory.
            ``None``: no bound.
        warm_start: in a loop, whether to start each solve from the last solution. ``None``: where
            the solver says that it gains from it (``gains_from_x0``).

    Raises:
        TypeError, ValueError: an option of the wrong kind or out of its range.

    References:
        Bengio 2000; Pedregosa 2016 (CG); Lorraine, Vicol & Duvenaud 2020 (Neumann); Hataya &
        Yamada 2023 (Nyström).
    """

    solver: LinearSolver = CG()
    damping: float | Literal["auto"] | AutoDamping = "auto"
    curvature: Callable[..., LinearOperator] | None = None
    mode: Mode = "auto"
    mu: float | Literal["auto"] | None = None
    warm_start: bool | None = None

    def __post_init__(self) -> None:
        check_solver(self.solver)
        if not (self.damping == "auto" or isinstance(self.damping, AutoDamping)):
            check_number(self.damping, "damping", at_least=0.0)
        if self.curvature is not None:
            check_objective(self.curvature, "curvature")
        check_choice(self.mode, "mode", get_args(Mode))
        if self.mu is not None and self.mu != "auto":
            check_number(self.mu, "mu", above=0.0)


def implicit_hypergradient(
    method: Implicit,
    inner: Objective,
    outer: Objective,
    params: Tree,
    hparams: Tree,
    *,
    x0: Tree | None,
    on_failure: OnFailure,
    verify: Verify,
) -> Hypergradient:
    """``dg/dφ`` by :class:`Implicit`; see :func:`hypergrad.hypergradient` for the arguments."""
    if x0 is not None:
        check_like(x0, params, "x0", "params")
    shift = AutoDamping() if method.damping == "auto" else method.damping
    course = Course(verify, method.mode, inner, outer, params, hparams)
    again = True
    start = shift.start if isinstance(shift, AutoDamping) else 0.0
    while again:
        if isinstance(shift, AutoDamping):
            # What products that turned out to be wrong asked for is forgotten.
            shift.start = start
        answer = _answer(
            method, inner, outer, params, hparams, shift, x0, course.mode, course.verifies
        )
        found = answer.result.verification
        again = found is not None and course.heard(found)
    result = answer.result
    if result.verification is not None:
        with verifying():
            warn_of_statistics(inner, outer, params, hparams, answer.first_run)
    report_verification(result.verification, mode=course.mode, on_failure=on_failure)
    report_failure(method.solver, result.solve, on_failure)
    if on_failure != "ignore":
        if isinstance(shift, AutoDamping):
            _warn_of_excess(shift, answer.damping)
        warn_of_unused(inner, outer, params, hparams, result.grads)
    if method.mu is not None:
        bound = _certify(inner, outer, params, hparams, answer, method.mu, course.mode)
        result = replace(result, error_bound=bound)
    return result


@dataclass(frozen=True)
class _Answer:
    """A hypergradient, and the operators and the right-hand side that made it."""

    result: Hypergradient
    exact: Hessian
    operator: LinearOperator
    rhs: Tree
    damping: float
    first_run: FirstRun


def _answer(
    method: Implicit,
    inner: Objective,
    outer: Objective,
    params: Tree,
    hparams: Tree,
    shift: float | AutoDamping,
    x0: Tree | None,
    mode: Mode,
    verifies: bool,
) -> _Answer:
    """The answer in one mode."""
    solver, curvature = method.solver, method.curvature
    # Both products at once would be one more program to compile.
    last = method.mu is None and mode != "compiled"
    # One isolation for all products: each costs as much as a few kernels.
    with torch.inference_mode(False), torch.no_grad(), isolated_buffers():
        theta, phi = fresh_leaves(params), fresh_leaves(hparams)
        outer_value, rhs, direct = value_and_gradients(outer, theta, phi, "outer")
        exact = linearised(inner, params, hparams, mode=mode)
        operator = exact if curvature is None else _operator(curvature, params, hparams)
        verification, first_run = None, FirstRun()
        with exact.repeated():
            if isinstance(shift, AutoDamping):
                solution, damping = shift.solve(solver, operator, rhs, x0=x0)
                operator = damped(operator, damping)
            else:
                damping, operator = shift, damped(operator, shift)
                solution = solver.solve(operator, rhs, x0=x0)
            if verifies:
                # A solve that failed at once says nothing, but its right-hand side does; and
                # where that is zero, perhaps because g detaches, the inner gradient.
                moved = tr.norm(solution.x) > 0.0
                instead = rhs if tr.norm(rhs) > 0.0 else exact.gradient
                direction = solution.x if moved else tr.at_least_float32(instead)
                if last:
                    second, along = exact.vjp(direction)
                else:
                    second, along = exact.matvec(direction), exact.vjp_outer(direction)
                mixed = along if moved else tr.zeros_like(along)
            else:
                mixed = exact.vjp_outer(solution.x)
        if verifies:
            verification = verify_derivatives(
                inner, outer, params, hparams,
                direction=direction, second=second if curvature is None else None, mixed=along,
                inner_value=exact.value, outer_value=outer_value, outer_grads=(rhs, direct),
                random_state=exact.random_state, first_run=first_run,
            )  # fmt: skip
    grads = tr.subtract(direct, mixed)
    result = Hypergradient(
        grads,
        outer_value,
        solution,
        inner_value=exact.value,
        inner_grad_norm=tr.norm(exact.gradient),
        damping=damping,
        verification=verification,
        # The mixed product is one more.
        matvecs=solution.matvecs + 1,
    )
    return _Answer(result, exact, operator, rhs, damping, first_run)


def _operator(
    curvature: Callable[..., LinearOperator], params: Tree, hparams: Tree
) -> LinearOperator:
    operator = curvature(tr.detach(params), tr.detach(hparams))
    if not isinstance(operator, LinearOperator):
        raise TypeError(
            f"curvature must return a hypergrad.operators.LinearOperator, got {operator!r}"
        )
    check_structure(operator.like, params, "the vectors of curvature's operator", "params")
    return operator


def _certify(
    inner: Objective,
    outer: Objective,
    params: Tree,
    hparams: Tree,
    answer: _Answer,
    mu: float | Literal["auto"],
    mode: Mode,
) -> ErrorBound:
    """The bound: on the exact system where μ is of the Hessian, else on the one that was solved."""
    result = answer.result
    system: LinearOperator = answer.exact
    source: Source = "given"
    if mu == "auto":
        system = answer.operator
        mu, source = system.lower_bound, "operator"
        if not mu > 0.0:
            ends = extreme_eigenvalues(system)
            mu, source = ends.smallest - ends.smallest_error, "estimated"
    v = result.solve.x
    return error_bound(
        inner,
        outer,
        params,
        hparams,
        v=v,
        grads=result.grads,
        residual_norm=residual_norm(system, v, tr.at_least_float32(answer.rhs)),
        rhs_norm=tr.norm(answer.rhs),
        inner_grad_norm=result.inner_grad_norm,
        mu=mu,
        source=source,
        mode=mode,
    )


def _warn_of_excess(auto: AutoDamping, damping: float) -> None:
    if not auto.exceeds(damping):
        return
    warn(
        f"damping='auto' took {damping:.3g}, more than the largest curvature that was met, "
        f"{auto.largest_curvature:.3g}: params are far from a minimum of inner, and the answer is "
        "a rough one; train longer, or pass damping= a number",
        DampingWarning,
    )
