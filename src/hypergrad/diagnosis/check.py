"""``check``: is this problem fit for hypergradients, and by which method?"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from typing import overload

import torch
from torch import Tensor, nn

from hypergrad import tree as tr
from hypergrad.autodiff.evaluation import Objective, fresh_leaves
from hypergrad.autodiff.isolation import Buffers, RandomState
from hypergrad.autodiff.modules import modes_put_back
from hypergrad.diagnosis.differences import directional_derivative
from hypergrad.diagnosis.report import Finding, Report, Trial, UnrolledReport
from hypergrad.hypergradients import Method, as_method, hypergradient
from hypergrad.implicit.hypergradient import Implicit
from hypergrad.linsolve import (
    CG,
    MINRES,
    Dense,
    Extremes,
    LinearSolver,
    Neumann,
    Nystrom,
    NystromPreconditioner,
    Status,
    extreme_eigenvalues,
    sufficient_damping,
)
from hypergrad.minibatches import on_trees
from hypergrad.operators import Damped, Hessian
from hypergrad.operators.auto import linearised
from hypergrad.operators.gradients import value_and_gradients
from hypergrad.results import Hypergradient
from hypergrad.tree import Tree
from hypergrad.unrolling.hypergradient import (
    Unrolled,
    unrolled_hypergradient,
)
from hypergrad.verification.dependence import examine
from hypergrad.verification.differences import Verdict
from hypergrad.verification.verification import Verification, Verify, verify_further

# A Newton step longer than this part of θ moves the hypergradient visibly.
_STATIONARY = 1e-2
_ILL_CONDITIONED = 1e5
_AGREE = 1e-2
# The outer gradient as a part of the inner one, where θ looks trained on the outer objective.
_SWAPPED = 1e-3
_DENSE_SIZE = 1000
_ITERATIVE = CG(rtol=1e-8, maxiter=500)
_RTOL = 1e-4  # of the trials
_TIMINGS = 5
_DIRECTIONS = 3  # of the verification, at random, and the solution of the reference
_RANK = 25


@overload
def check(
    inner: Objective,
    outer: Objective,
    params: Tree | nn.Module,
    hparams: Tree | nn.Module,
    *,
    method: LinearSolver | Implicit = ...,
    generator: torch.Generator | None = None,
) -> Report: ...


@overload
def check(
    inner: Callable[..., Tensor],
    outer: Objective,
    params: Tree | nn.Module,
    hparams: Tree | nn.Module,
    *,
    method: Unrolled,
    generator: torch.Generator | None = None,
) -> UnrolledReport: ...


def check(
    inner: Objective,
    outer: Objective,
    params: Tree | nn.Module,
    hparams: Tree | nn.Module,
    *,
    method: Method = CG(),
    generator: torch.Generator | None = None,
) -> Report | UnrolledReport:
    """Examine a bilevel problem once: stationarity, curvature, agreement, cost, recommendation.

    It measures the distance of ``params`` from a stationary point, the extreme eigenvalues of H,
    the time of a product, the hypergradient by five solvers, and the slope of the outer objective
    along a random direction in φ by central differences, with the inner problem solved again by
    Newton's method on either side. It verifies the derivatives along four directions, see
    :class:`Verification`. Costs some hundreds of gradients.

    With ``method=hg.Unrolled(...)`` it compares the unrolled hypergradient with central differences
    of whole runs, from the same random state, and verifies the derivatives where these begin.

    Args:
        inner: f, see :func:`hypergradient`.
        outer: g.
        params: θ, at or near a minimiser of f.
        hparams: φ.
        method: a linear solver or :class:`Implicit`, which is tried next to the five solvers and
            whose ``mode`` all of them use; or :class:`Unrolled` with its optimiser and steps.
        generator: for the random direction and the sketches; ``None`` is a fixed one.

    Returns:
        A :class:`Report`, or an :class:`UnrolledReport`; ``print`` it.

    Raises:
        TypeError, ValueError, DoubleBackwardError: see :func:`hypergradient`.

    Examples:
        >>> import torch, hypergrad as hg
        >>> f = lambda w, c: 0.5 * ((w - 3.0) ** 2).sum() + 0.5 * (c.exp() * w**2).sum()
        >>> g = lambda w, c: 0.5 * (w**2).sum()
        >>> c = torch.tensor([0.0, 1.0], dtype=torch.float64)
        >>> report = hg.check(f, g, 3.0 / (1.0 + c.exp()), c)
        >>> report.ok
        True
    """
    generator = generator or torch.Generator().manual_seed(0)
    method = as_method(method)
    modules = params, hparams
    inner, outer, params, hparams = on_trees(params, hparams, inner=inner, outer=outer)
    with modes_put_back(*modules):
        if isinstance(method, Unrolled):
            return _check_unrolled(method, inner, outer, params, hparams, generator)
        return _check_implicit(method, inner, outer, params, hparams, generator)


def _check_implicit(
    method: Implicit,
    inner: Objective,
    outer: Objective,
    params: Tree,
    hparams: Tree,
    generator: torch.Generator,
) -> Report:
    mode = method.mode
    operator = linearised(inner, params, hparams, mode=mode)
    size = tr.size(params)
    ends = extreme_eigenvalues(operator, maxiter=min(100, size), rtol=1e-8)

    def attempt(solver: LinearSolver, damping: float) -> Hypergradient:
        return hypergradient(
            inner, outer, params, hparams,
            method=Implicit(solver, damping=damping, mode=mode),
            on_failure="ignore", verify="never",
        )  # fmt: skip

    damping = _needed_damping(ends)
    reference_solver: LinearSolver = Dense() if size <= _DENSE_SIZE else _ITERATIVE
    reference = attempt(reference_solver, damping)
    if reference_solver is not _ITERATIVE and reference.solve.status.failed:
        # A dense solve takes what rounding hides for zero, where iterations may still see it.
        other = attempt(_ITERATIVE, damping)
        if _left(other) < _left(reference):
            reference_solver, reference = _ITERATIVE, other
    norm = tr.norm(reference.grads)
    trials = {}
    solvers = _solvers(size, ends, damping, generator)
    if method.solver != CG():
        solvers[f"given: {type(method.solver).__name__}"] = method.solver
    for name, solver in solvers.items():
        result = attempt(solver, damping)
        difference = tr.norm(tr.subtract(result.grads, reference.grads))
        solve = result.solve
        trials[name] = Trial(
            difference / norm if norm else difference, solve.status, solve.iterations, solve.matvecs
        )

    leaves = fresh_leaves(params), fresh_leaves(hparams)
    outer_gradient = value_and_gradients(outer, *leaves, "outer")[1]
    step = reference_solver.solve(Damped(operator, damping), operator.gradient).x
    length = tr.norm(params)
    newton_step = tr.norm(step) / length if length else tr.norm(step)
    gradient_seconds, matvec_seconds = _costs(inner, params, hparams, operator)
    direction = tr.random_normal_like(hparams, generator)
    direction = tr.divide(direction, tr.norm(direction))
    slope = float(tr.dot(reference.grads, direction))
    measured = math.nan
    findings = _curvature_findings(ends)
    if Finding.NEGATIVE_CURVATURE not in findings:
        measured = directional_derivative(inner, outer, params, hparams, direction, mode=mode)

    directions = [
        reference.solve.x if tr.norm(reference.solve.x) else operator.gradient,
        *[tr.random_normal_like(params, generator) for _ in range(_DIRECTIONS)],
    ]
    verification = verify_further(
        inner, outer, params, hparams, mode=mode, directions=directions
    )  # fmt: skip
    if verification.status is Verdict.FAILED:
        findings.append(Finding.DERIVATIVE_WRONG)
    if newton_step > _STATIONARY:
        findings.append(Finding.NOT_STATIONARY)
        if tr.norm(outer_gradient) <= _SWAPPED * reference.inner_grad_norm:
            findings.append(Finding.SWAPPED)
    if norm == 0.0:
        findings.append(Finding.ZERO_HYPERGRADIENT)
    unused, closed_over = examine(inner, outer, params, hparams)
    if unused:
        findings.append(Finding.UNUSED_HPARAMS)
    if closed_over:
        findings.append(Finding.CLOSED_OVER)
    if any(t.status is Status.CONVERGED and t.difference > _AGREE for t in trials.values()):
        findings.append(Finding.SOLVERS_DISAGREE)
    if math.isnan(measured):
        findings.append(Finding.FINITE_DIFFERENCES_FAILED)
    elif _differ(measured, slope, norm):
        findings.append(Finding.FINITE_DIFFERENCES_DISAGREE)
    return Report(
        size=size,
        outer_size=tr.size(hparams),
        inner_grad_norm=reference.inner_grad_norm,
        newton_step=newton_step,
        eigenvalues=ends,
        damping=damping,
        gradient_seconds=gradient_seconds,
        matvec_seconds=matvec_seconds,
        reference=type(reference_solver).__name__,
        trials=trials,
        slope=slope,
        slope_by_differences=measured,
        verification=verification,
        findings=tuple(findings),
        recommendation=_recommend(findings, trials, damping, _rank(size)),
        unused=tuple(unused),
        closed_over=tuple(closed_over),
    )


def _check_unrolled(
    method: Unrolled,
    inner: Callable[..., Tensor],
    outer: Objective,
    params: Tree,
    hparams: Tree,
    generator: torch.Generator,
) -> UnrolledReport:
    random_state = RandomState(params, hparams)

    def run(displaced: Tree, verify: Verify) -> Hypergradient:
        buffers = Buffers(differentiable=True)
        try:
            with random_state.replayed():
                return unrolled_hypergradient(
                    method, inner, outer, params, displaced, verify=verify, buffers=buffers
                )
        finally:
            buffers.take_back()

    result = run(hparams, "always")
    phi = tr.detach(hparams)
    direction = tr.random_normal_like(phi, generator)
    direction = tr.divide(direction, tr.norm(direction))
    step = max(tr.epsilon(params), tr.epsilon(phi)) ** (1 / 3) * (1.0 + tr.largest(phi))
    ahead, behind = (
        run(tr.add(phi, direction, sign * step), "never").outer_value for sign in (1.0, -1.0)
    )
    slope = float(tr.dot(result.grads, direction))
    measured = (ahead - behind) / (2.0 * step)
    norm = tr.norm(result.grads)
    findings = []
    # Where no second derivative takes part none is verified.
    verification = result.verification or Verification(Verdict.INCONCLUSIVE)
    if verification.status is Verdict.FAILED:
        findings.append(Finding.DERIVATIVE_WRONG)
    if norm == 0.0:
        findings.append(Finding.ZERO_HYPERGRADIENT)
    biased = method.first_order or method.truncate is not None or method.directions is not None
    if _differ(measured, slope, norm):
        findings.append(Finding.UNROLLED_DISAGREES)
    advice = "The unrolled hypergradient is the slope of whole runs."
    if findings:
        advice = "See the findings."
    if biased:
        advice += " first_order, truncate and directions give an estimate that may differ."
    return UnrolledReport(
        outer_size=tr.size(hparams),
        steps=result.state.step - (0 if method.state is None else method.state.step),
        outer_value=result.outer_value,
        slope=slope,
        slope_by_differences=measured,
        verification=verification,
        findings=tuple(findings),
        recommendation=advice,
    )


def _differ(measured: float, slope: float, norm: float) -> bool:
    return abs(measured - slope) > 0.02 * max(abs(measured), abs(slope), 1e-2 * norm)


def _curvature_findings(ends: Extremes) -> list[Finding]:
    noise = 1e-6 * ends.magnitude
    if ends.smallest < -noise:
        return [Finding.NEGATIVE_CURVATURE]
    if ends.smallest <= 1e-9 * ends.magnitude:
        return [Finding.SINGULAR]
    if ends.magnitude / ends.smallest > _ILL_CONDITIONED:
        return [Finding.ILL_CONDITIONED]
    return []


def _needed_damping(ends: Extremes) -> float:
    trouble = _curvature_findings(ends)
    if Finding.NEGATIVE_CURVATURE in trouble or Finding.SINGULAR in trouble:
        return sufficient_damping(ends.smallest - ends.smallest_error, ends.largest)
    return 0.0


def _solvers(
    size: int, ends: Extremes, damping: float, generator: torch.Generator
) -> dict[str, LinearSolver]:
    rank = _rank(size)
    limit = min(10 * size, 500)
    sketch = NystromPreconditioner(rank, generator=generator)
    scale = max(abs(ends.smallest) + damping, 1e-3 * ends.magnitude) or 1.0
    return {
        "CG": CG(rtol=_RTOL, maxiter=limit),
        "Nyström-PCG": CG(rtol=_RTOL, maxiter=limit, preconditioner=sketch),
        "MINRES": MINRES(rtol=_RTOL, maxiter=limit),
        "Neumann": Neumann(terms=50),
        "Nyström": Nystrom(rank=rank, rho=scale, test="gaussian", generator=generator),
    }


def _rank(size: int) -> int:
    """A sketch of more than a quarter of a small problem would be a dense solve in disguise."""
    return min(_RANK, max(1, size // 4))


def _costs(inner: Objective, params: Tree, hparams: Tree, operator: Hessian) -> tuple[float, float]:
    theta, phi = fresh_leaves(params), fresh_leaves(hparams)
    vector = tr.detach(operator.gradient)

    def median(work: Callable[[], object]) -> float:
        seconds = []
        for _ in range(_TIMINGS):
            began = time.perf_counter()
            work()
            _wait(theta)
            seconds.append(time.perf_counter() - began)
        return statistics.median(seconds)

    gradient_seconds = median(lambda: value_and_gradients(inner, theta, phi, "inner"))
    return gradient_seconds, median(lambda: operator.matvec(vector))


def _wait(tree: Tree) -> None:
    for leaf in tr.leaves(tree):
        if leaf.device.type == "cuda":
            torch.cuda.synchronize(leaf.device)


def _recommend(findings: list[Finding], trials: dict[str, Trial], damping: float, rank: int) -> str:
    advice = []
    if Finding.NOT_STATIONARY in findings:
        advice.append("First train the inner problem to a stationary point.")
    if Finding.NEGATIVE_CURVATURE in findings or Finding.SINGULAR in findings:
        advice.append(
            f"Use hg.CG(rtol=1e-3) with the default damping='auto' (about {damping:.2g} here), or "
            "curvature= a Gauss-Newton operator with a little damping."
        )
        return " ".join(advice)
    rtol = _tolerance(trials)
    plain, assisted = trials["CG"], trials["Nyström-PCG"]
    cheap = trials["Neumann"]
    if assisted.iterations <= 0.6 * plain.iterations and plain.iterations > 10:
        advice.append(
            f"Use hg.CG(rtol={rtol}, preconditioner=hg.NystromPreconditioner(rank={rank})) and "
            f"keep the preconditioner across outer steps: {assisted.iterations} iterations where "
            f"plain CG takes {plain.iterations}."
        )
    elif cheap.difference <= _AGREE and cheap.matvecs < plain.matvecs:
        advice.append(f"Use hg.Neumann(terms={cheap.iterations}): it converges fast here.")
    else:
        advice.append(f"Use hg.CG(rtol={rtol}): {plain.iterations} iterations reach 1e-4 here.")
    return " ".join(advice)


def _tolerance(trials: dict[str, Trial]) -> str:
    """Of a residual that leaves an error of 1 %: 1e-3, or less where 1e-4 left more than that."""
    errors = [t.difference for t in trials.values() if t.status is Status.CONVERGED]
    worst = max(errors, default=0.0)
    power = -3 if worst <= _AGREE else math.floor(math.log10(_RTOL * _AGREE / worst))
    return f"1e{max(power, -8)}"


def _left(result: Hypergradient) -> float:
    """What the solve left of its right-hand side."""
    residual = result.solve.relative_residual
    return math.inf if residual is None or math.isnan(residual) else residual
