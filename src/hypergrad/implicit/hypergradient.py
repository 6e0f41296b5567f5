"""Hypergradients by the implicit function theorem.

dg/dφ = ∂_φ g − (∂_φ F)ᵀ v,   where   H v = ∂_θ g,   F = ∇_θ f(θ, φ),   H = ∂_θ F
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias, get_args, overload

import torch
from torch import Tensor

from hypergrad import tree as tr
from hypergrad._checks import (
    check_choice,
    check_like,
    check_number,
    check_objective,
    check_structure,
    check_tree,
    given,
)
from hypergrad.autodiff.evaluation import Objective, fresh_leaves
from hypergrad.autodiff.isolation import isolated_buffers
from hypergrad.errors import DampingWarning, LinearSolveWarning
from hypergrad.implicit.error_bound import ErrorBound, Source, error_bound
from hypergrad.linsolve import (
    CG,
    AutoDamping,
    LinearSolveError,
    LinearSolver,
    Solution,
    extreme_eigenvalues,
)
from hypergrad.linsolve.base import residual_norm
from hypergrad.operators import Hessian, LinearOperator, Mode, damped, hessian
from hypergrad.operators.gradients import value_and_gradients
from hypergrad.tree import Tree
from hypergrad.unrolling.hypergradient import (
    Unrolled,
    UnrolledHypergradient,
    check_unrolled,
    unrolled_hypergradient,
)
from hypergrad.verification.dependence import warn_of_unused
from hypergrad.verification.differences import verifying
from hypergrad.verification.moving_buffers import warn_of_statistics
from hypergrad.verification.verification import (
    Course,
    Verification,
    Verify,
    report_verification,
    verify_derivatives,
)

OnFailure: TypeAlias = Literal["warn", "raise", "ignore"]


@dataclass(frozen=True)
class Hypergradient:
    """A hypergradient and its receipt.

    Attributes:
        grads: ``dg/dφ``, in the structure of ``hparams``.
        solve: the receipt of the linear solve; ``solve.x`` is v, a warm start for the next one.
        inner_grad_norm: ``‖∇_θ f(θ, φ)‖₂``. The theorem asks for 0: what is left of it is an error
            of the hypergradient that no linear solver sees.
        inner_value: ``f(θ, φ)``.
        outer_value: ``g(θ, φ)``.
        damping: λ, as given or as chosen by ``damping="auto"``.
        error_bound: a bound on the error of ``grads``, if ``mu`` was given.
        verification: whether the derivatives of f and g agree with differences; ``None`` if this
            call did not verify.
    """

    grads: Tree
    solve: Solution
    inner_grad_norm: float
    inner_value: float
    outer_value: float
    damping: float = 0.0
    error_bound: ErrorBound | None = None
    verification: Verification | None = None


@overload
def hypergradient(
    inner: Objective,
    outer: Objective,
    params: Tree,
    hparams: Tree,
    *,
    solver: LinearSolver = CG(),
    damping: float | Literal["auto"] | AutoDamping = "auto",
    curvature: Callable[[Tree, Tree], LinearOperator] | None = None,
    mu: float | Literal["auto"] | None = None,
    x0: Tree | None = None,
    on_failure: OnFailure = "warn",
    mode: Mode = "auto",
    verify: Verify = "once",
    method: None = None,
) -> Hypergradient: ...


@overload
def hypergradient(
    inner: Callable[..., Tensor],
    outer: Objective,
    params: Tree,
    hparams: Tree,
    *,
    verify: Verify = "once",
    method: Unrolled,
) -> UnrolledHypergradient: ...


def hypergradient(
    inner: Objective,
    outer: Objective,
    params: Tree,
    hparams: Tree,
    *,
    solver: LinearSolver = CG(),
    damping: float | Literal["auto"] | AutoDamping = "auto",
    curvature: Callable[[Tree, Tree], LinearOperator] | None = None,
    mu: float | Literal["auto"] | None = None,
    x0: Tree | None = None,
    on_failure: OnFailure = "warn",
    mode: Mode = "auto",
    verify: Verify = "once",
    method: Unrolled | None = None,
) -> Hypergradient | UnrolledHypergradient:
    """``dg/dφ`` at a minimiser θ of the inner objective, by implicit differentiation.

        dg/dφ = ∂_φ g − (∂_φ F)ᵀ v,   (H + damping · I) v = ∂_θ g,   F = ∇_θ f,   H = ∂²f/∂θ²

    The inner gradient is evaluated and linearised once, the outer one once; the solver's products
    and the mixed product follow. Nothing of the caller's is changed: no ``.grad``, no
    ``requires_grad``, no module buffer, no random state (but for a solver that draws from PyTorch's
    default generator because it was given none). Graphs that ``params`` or ``hparams`` carry are
    ignored. Both objectives start from the current random state, so dropout masks are fixed for the
    whole call. With half-precision parameters the solver's vectors and inner products are float32;
    the products are computed in the precision of the model.

    Args:
        inner: ``f(params, hparams)``, a scalar; the same trees as given here, as new leaf tensors.
            Over mini-batches: :class:`Averaged` or :class:`Sampled`.
        outer: ``g(params, hparams)``, a scalar; likewise.
        params: θ, a tree of floating-point tensors, such as ``dict(model.named_parameters())``.
        hparams: φ, likewise.
        solver: how to solve for v.
        damping: λ ≥ 0, added to the diagonal of H. ``"auto"``: 0, or where the solver meets
            negative or no curvature, as much as it takes; the receipt says how much. An
            :class:`hypergrad.linsolve.AutoDamping` that is given again to the next call goes on
            from there.
        curvature: ``curvature(params, hparams)`` returns the symmetric operator to solve with in
            place of H, such as :class:`hypergrad.operators.GaussNewton`. The mixed product stays
            exact.
        mu: μ, a number > 0 that no eigenvalue of H lies below, for an :class:`ErrorBound` of the
            answer; costs some ten to a hundred products more. ``"auto"`` takes what the operator
            knows (such as the damping of a positive semi-definite one) or else a Lanczos estimate,
            and says which. For an :class:`Averaged` objective it holds all batches in memory.
            ``None``: no bound.
        x0: where the solver starts, such as ``solve.x`` of the last outer step.
        on_failure: what a failed solve or verification does: ``"warn"``, ``"raise"`` or
            ``"ignore"``. The answer from its best iterate is returned in the first and the last
            case. The last one is also silent about outer parameters that neither objective uses.
        mode: how Hessian products are computed, see :func:`hypergrad.operators.hessian`.
        verify: whether to compare the derivatives with differences along the solution, see
            :class:`Verification`: ``"once"`` for each pair of objectives and each kind of
            ``params`` and ``hparams`` in a process, ``"always"`` or ``"never"``. It costs two
            gradients and two values. Where only second derivatives are wrong, ``mode="auto"`` goes
            on with finite differences and warns once.
        method: :class:`Unrolled`, for the hypergradient through the steps of an optimiser instead;
            ``params`` is then where it starts, and only ``verify`` of the other options applies.

    Returns:
        The gradients in the structure and dtypes of ``hparams`` (zero for an outer parameter that
        neither objective uses) and the receipt; with ``method`` an :class:`UnrolledHypergradient`.

    Raises:
        TypeError: an argument is of the wrong kind, or a leaf is no floating-point tensor.
        ValueError: an argument is out of its range, a tree is empty or does not match, or an
            objective is not a finite scalar that depends on ``params``.
        LinearSolveError: the solve failed and ``on_failure="raise"``.
        VerificationError: a derivative is wrong and ``on_failure="raise"``.
        DoubleBackwardError: ``mode="reverse"`` or ``"compiled"``, and an operation has no second
            derivative.
        ForwardModeError: ``mode="forward"``, and an operation has no forward derivative.
        CompilationError: ``mode="compiled"``, and ``inner`` cannot be compiled.

    Examples:
        Ridge regression on one number: θ* = 3 / (1 + φ), so dg/dφ = −θ* · 3 / (1 + φ)² = −9/8.

        >>> import torch, hypergrad as hg
        >>> f = lambda w, c: 0.5 * (w - 3.0) ** 2 + 0.5 * c * w**2
        >>> g = lambda w, c: 0.5 * w**2
        >>> hg.hypergradient(f, g, torch.tensor(1.5), torch.tensor(1.0)).grads
        tensor(-1.1250)

    References:
        Bengio 2000; Pedregosa 2016 (CG); Lorraine, Vicol & Duvenaud 2020 (Neumann); Hataya &
        Yamada 2023 (Nyström).
    """
    check_objective(inner, "inner")
    check_objective(outer, "outer")
    check_tree(params, "params")
    check_tree(hparams, "hparams")
    check_solver(solver)
    check_choice(verify, "verify", get_args(Verify))
    if method is not None:
        check_unrolled(method)
        implicit_only = (solver, damping, curvature, mu, x0, on_failure, mode)
        if implicit_only != (CG(), "auto", None, None, None, "warn", "auto"):
            raise ValueError(
                "method must come without the options of implicit differentiation (solver, "
                "damping, curvature, mu, x0, on_failure, mode); give it its own"
            )
        return unrolled_hypergradient(method, inner, outer, params, hparams, verify)
    shift = AutoDamping() if damping == "auto" else damping
    if not isinstance(shift, AutoDamping):
        check_number(shift, "damping", at_least=0.0)
    if curvature is not None:
        check_objective(curvature, "curvature")
    if mu is not None and mu != "auto":
        check_number(mu, "mu", above=0.0)
    if x0 is not None:
        check_like(x0, params, "x0", "params")
    check_choice(on_failure, "on_failure", get_args(OnFailure))

    course = Course(verify, mode, inner, outer, params, hparams)
    again = True
    start = shift.start if isinstance(shift, AutoDamping) else 0.0
    while again:
        if isinstance(shift, AutoDamping):
            # What products that turned out to be wrong asked for is forgotten.
            shift.start = start
        answer = _answer(
            inner, outer, params, hparams, solver, shift, curvature, x0, course.mode,
            # Both products at once would be one more program to compile.
            verifies=course.verifies, last=mu is None and course.mode != "compiled",
        )  # fmt: skip
        found = answer.result.verification
        again = found is not None and course.heard(found)
    result = answer.result
    if result.verification is not None:
        with verifying():
            warn_of_statistics(inner, outer, params, hparams)
    report_verification(result.verification, mode=course.mode, on_failure=on_failure)
    report_failure(solver, result.solve, on_failure)
    if isinstance(shift, AutoDamping) and on_failure != "ignore":
        _warn_of_excess(shift, result.damping)
    if on_failure != "ignore":
        warn_of_unused(inner, outer, params, hparams, result.grads)
    if mu is not None:
        bound = _certify(inner, outer, params, hparams, answer, mu, course.mode)
        result = replace(result, error_bound=bound)
    return result


@dataclass(frozen=True)
class _Answer:
    """A hypergradient, and the operators and the right-hand side that made it."""

    result: Hypergradient
    exact: Hessian
    operator: LinearOperator
    rhs: Tree


def _answer(
    inner: Objective,
    outer: Objective,
    params: Tree,
    hparams: Tree,
    solver: LinearSolver,
    shift: float | AutoDamping,
    curvature: Callable[[Tree, Tree], LinearOperator] | None,
    x0: Tree | None,
    mode: Mode,
    *,
    verifies: bool,
    last: bool,
) -> _Answer:
    """The answer in one mode; ``last`` if no more products are asked for."""
    # One isolation for all products: each costs as much as a few kernels.
    with torch.inference_mode(False), torch.no_grad(), isolated_buffers():
        theta, phi = fresh_leaves(params), fresh_leaves(hparams)
        outer_value, rhs, direct = value_and_gradients(outer, theta, phi, "outer")
        exact = hessian(inner, params, hparams, mode=mode)
        operator = exact if curvature is None else _operator(curvature, params, hparams)
        verification = None
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
                random_state=exact.random_state,
            )  # fmt: skip
    grads = tr.subtract(direct, mixed)
    result = Hypergradient(
        grads, solution, tr.norm(exact.gradient), exact.value, outer_value, damping,
        verification=verification,
    )  # fmt: skip
    return _Answer(result, exact, operator, rhs)


def _operator(
    curvature: Callable[[Tree, Tree], LinearOperator], params: Tree, hparams: Tree
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
    warnings.warn(
        f"damping='auto' took {damping:.3g}, more than the largest curvature that was met, "
        f"{auto.largest_curvature:.3g}: params are far from a minimum of inner, and the answer is "
        "a rough one; train longer, or pass damping= a number",
        DampingWarning,
        stacklevel=3,
    )


def check_solver(solver: object) -> None:
    """Raise ``TypeError`` unless ``solver`` is a :class:`LinearSolver`."""
    if not isinstance(solver, LinearSolver):
        raise TypeError(f"solver must be a LinearSolver such as hg.CG(), got {given(solver)}")


def report_failure(solver: LinearSolver, solution: Solution, on_failure: OnFailure) -> None:
    """Warn or raise, as asked, if the solve failed."""
    if on_failure == "ignore" or not solution.status.failed:
        return
    message = f"the linear solve of {type(solver).__name__} failed: {solution}"
    message += of_nothing(solution)
    if on_failure == "raise":
        raise LinearSolveError(message, solution)
    warnings.warn(message, LinearSolveWarning, stacklevel=3)


def of_nothing(solution: Solution) -> str:
    """What to add to the words of a failed solve whose answer is zero."""
    if tr.norm(solution.x) > 0.0:
        return ""
    return "; nothing was solved, so the hypergradient is ∂g/∂φ alone (v = 0)"
