"""Error bounds hold, and are not much larger than the errors."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import Problem, dense_parts, logistic, mlp, quadratic, relative_error, ridge
from torch import Tensor

import hypergrad as hg
from hypergrad import tree as tr
from hypergrad.operators import GaussNewton


@dataclass(frozen=True)
class Drawn:
    """A strongly convex problem with everything known, and an approximate answer to ask for."""

    inner: object
    outer: object
    params: Tensor
    hparams: Tensor
    exact: Tensor
    mu: float


def draw_problem(
    seed: int, n: int, m: int, condition: float, scale: float, displacement: float
) -> Drawn:
    """`f = ½ θᵀAθ − θᵀ(Bφ + c) + ½ Σ_j exp(φ_j) θ_j²`, `g` quadratic in θ and in φ.

    θ is off its minimiser by a relative `displacement`. μ is the exact λ_min of the Hessian.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    Q = torch.linalg.qr(draw(n, n)).Q
    A = (Q * torch.logspace(0, math.log10(condition), n, dtype=torch.float64)) @ Q.T * scale
    B, c, phi, t, D = draw(n, m), draw(n), 0.3 * draw(m), draw(n), draw(n, n)
    shared = min(n, m)

    def inner(w: Tensor, h: Tensor) -> Tensor:
        decay = 0.5 * scale * (h[:shared].exp() * w[:shared].square()).sum()
        return 0.5 * w @ A @ w - w @ (B @ h + c) + decay

    def outer(w: Tensor, h: Tensor) -> Tensor:
        return 0.5 * (D @ (w - t)).square().sum() / n + 0.5 * h.square().sum()

    H = (A + A.T) / 2
    H[range(shared), range(shared)] += scale * phi[:shared].exp()
    theta = torch.linalg.solve(H, B @ phi + c)
    mixed = -B.clone()
    mixed[range(shared), range(shared)] += scale * phi[:shared].exp() * theta[:shared]
    slope = D.T @ D @ (theta - t) / n
    exact = phi - mixed.T @ torch.linalg.solve(H, slope)
    noise = draw(n)
    params = theta + displacement * theta.norm() * noise / noise.norm()
    mu = float(torch.linalg.eigvalsh(H)[0])
    return Drawn(inner, outer, params, phi, exact, mu)


CASES = {
    "seed": st.integers(0, 2**31),
    "n": st.integers(1, 30),
    "m": st.integers(1, 8),
    "log_condition": st.floats(0.0, 3.0),
    "log_scale": st.floats(-3.0, 3.0),
    "log_displacement": st.one_of(st.none(), st.floats(-8.0, -1.0)),
    "method": st.sampled_from(["cg", "minres", "neumann", "nystrom", "identity", "dense"]),
    "budget": st.integers(1, 30),
}


@pytest.mark.parametrize("cases", [100, pytest.param(1000, marks=pytest.mark.long)])
def test_the_bound_holds_and_is_within_a_hundred_times_the_error_in_the_median(cases: int) -> None:
    """The median is over the cases whose error is more than rounding."""
    ratios: list[float] = []

    @settings(max_examples=cases, deadline=None, derandomize=True, database=None)
    @given(**CASES)
    def holds(**case: Any) -> None:
        ratio = ratio_to_the_error(**case)
        if ratio is not None:
            ratios.append(ratio)

    holds()
    assert len(ratios) > cases // 2
    assert statistics.median(ratios) < 100


def ratio_to_the_error(
    seed: int,
    n: int,
    m: int,
    log_condition: float,
    log_scale: float,
    log_displacement: float | None,
    method: str,
    budget: int,
) -> float | None:
    """Of the bound of one case, which must hold; ``None`` if the error is rounding."""
    displacement = 0.0 if log_displacement is None else 10**log_displacement
    p = draw_problem(seed, n, m, 10**log_condition, 10**log_scale, displacement)
    solver = {
        "cg": hg.CG(rtol=1e-12, maxiter=budget),
        "minres": hg.MINRES(rtol=1e-12, maxiter=budget),
        "neumann": hg.Neumann(terms=budget),
        "nystrom": hg.Nystrom(
            rank=min(budget, n), rho=p.mu, generator=torch.Generator().manual_seed(seed)
        ),
        "identity": hg.Identity(1.0 / p.mu / budget),
        "dense": hg.Dense(),
    }[method]
    result = hg.hypergradient(
        p.inner,
        p.outer,
        p.params,
        p.hparams,
        method=hg.Implicit(solver, mu=p.mu),
        on_failure="ignore",
    )
    bound = result.error_bound
    assert bound is not None
    assert bound.source == "given"
    error = float((result.grads - p.exact).norm())
    assert error <= bound.absolute
    assert error <= bound.relative * float(p.exact.norm()) * (1 + 1e-9)
    return bound.absolute / error if error > 1e-10 * float(p.exact.norm()) else None


@pytest.mark.parametrize("problem", [quadratic(20, 100.0), ridge(), logistic()], ids=repr)
@pytest.mark.parametrize("maxiter", [2, 5, 1000])
def test_known_problems(problem: Problem, maxiter: int) -> None:
    H, *_ = dense_parts(problem)
    mu = float(torch.linalg.eigvalsh(H)[0])
    solver = hg.CG(rtol=1e-12, maxiter=maxiter)
    arguments = (problem.inner, problem.outer, problem.params, problem.hparams)
    result = hg.hypergradient(*arguments, method=hg.Implicit(solver, mu=mu), on_failure="ignore")
    bound = result.error_bound
    assert bound is not None
    assert relative_error(result.grads, problem.hypergradient) <= bound.relative
    assert bound.absolute == bound.solve_term + bound.stationarity_term
    estimated = hg.hypergradient(
        *arguments, method=hg.Implicit(solver, mu="auto"), on_failure="ignore"
    )
    assert estimated.error_bound is not None
    assert estimated.error_bound.estimated
    assert estimated.error_bound.mu == pytest.approx(mu, rel=0.5)


def test_each_term_says_what_takes_it_away() -> None:
    p = draw_problem(0, 20, 4, 30.0, 1.0, 1e-3)
    at_minimum = draw_problem(0, 20, 4, 30.0, 1.0, 0.0)

    def bound(problem: Drawn, maxiter: int) -> hg.ErrorBound:
        solver = hg.CG(rtol=1e-13, maxiter=maxiter)
        result = hg.hypergradient(
            problem.inner,
            problem.outer,
            problem.params,
            problem.hparams,
            method=hg.Implicit(solver, mu=problem.mu),
            on_failure="ignore",
        )
        assert result.error_bound is not None
        return result.error_bound

    rough, fine, exact = bound(p, 2), bound(p, 100), bound(at_minimum, 100)
    assert fine.solve_term < 1e-9 < 1e-4 < rough.solve_term
    assert fine.stationarity_term == pytest.approx(rough.stationarity_term, rel=0.9)
    assert exact.stationarity_term < 1e-9 < fine.stationarity_term
    assert bound(p, 1).relative == math.inf, "an error as large as the answer"


def test_damping_of_a_semidefinite_curvature_is_known() -> None:
    X = torch.randn(50, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    y = X.sum(1)

    def loss(z: Tensor, h: Tensor) -> Tensor:
        return 0.5 * (z - y).square().mean()

    def inner(w: Tensor, h: Tensor) -> Tensor:
        return loss(X @ w, h) - w @ h

    w = torch.linalg.solve(X.T @ X / 50, X.T @ y / 50 + 0.1)
    h = torch.full((5,), 0.1, dtype=torch.float64)
    result = hg.hypergradient(
        inner,
        lambda w, h: w.square().sum(),
        w,
        h,
        method=hg.Implicit(
            damping=0.5,
            curvature=lambda w, h: GaussNewton(lambda w, h: X @ w, loss, w, h),
            mu="auto",
        ),
    )
    bound = result.error_bound
    assert bound is not None
    assert (bound.source, bound.mu, bound.estimated) == ("operator", 0.5, False)
    exact = torch.linalg.solve(X.T @ X / 50 + 0.5 * torch.eye(5, dtype=torch.float64), 2 * w)
    assert float((result.grads - exact).norm()) <= bound.absolute
    # Against the undamped problem the damping itself is the error, and a given μ counts it.
    mu = float(torch.linalg.eigvalsh(X.T @ X / 50)[0])
    against_undamped = hg.hypergradient(
        inner, lambda w, h: w.square().sum(), w, h, method=hg.Implicit(damping=0.5, mu=mu)
    )
    undamped = torch.linalg.solve(X.T @ X / 50, 2 * w)
    assert against_undamped.error_bound is not None
    error = float((against_undamped.grads - undamped).norm())
    assert 0.1 * error < error <= against_undamped.error_bound.absolute


def test_without_positive_curvature_there_is_no_bound() -> None:
    p = mlp()
    result = hg.hypergradient(
        p.inner,
        p.outer,
        p.params,
        p.hparams,
        method=hg.Implicit(hg.MINRES(), mu="auto"),
        on_failure="ignore",
    )
    assert result.error_bound is not None
    assert result.error_bound.absolute == math.inf
    assert result.error_bound.estimated
    assert result.error_bound.mu < 0
    assert (
        hg.hypergradient(
            p.inner, p.outer, p.params, p.hparams, method=hg.Implicit(damping=p.damping)
        ).error_bound
        is None
    )


@pytest.mark.parametrize(("mu", "error"), [(0.0, ValueError), (-1.0, ValueError), ("x", TypeError)])
def test_bad_mu_is_refused(mu: object, error: type[Exception]) -> None:
    p = ridge()
    with pytest.raises(error, match="mu must be"):
        hg.hypergradient(p.inner, p.outer, p.params, p.hparams, method=hg.Implicit(mu=mu))  # type: ignore[arg-type]


@pytest.mark.parametrize("solver", [hg.CG(), hg.BlockCG(), hg.Neumann(terms=500)])
def test_automatic_damping_is_zero_unless_needed_and_says_what_it_chose(
    solver: hg.LinearSolver,
) -> None:
    convex, saddle = ridge(), mlp()
    plain = hg.hypergradient(
        convex.inner, convex.outer, convex.params, convex.hparams, method=solver
    )
    assert plain.damping == 0.0
    assert relative_error(plain.grads, convex.hypergradient) < 1e-2
    arguments = (saddle.inner, saddle.outer, saddle.params, saddle.hparams)
    # A network at random parameters has as much negative curvature as positive one.
    with pytest.warns(hg.DampingWarning, match="more than the largest curvature"):
        result = hg.hypergradient(*arguments, method=solver)
    assert not result.solve.status.failed
    H = hg.operators.hessian(*arguments[:1], *arguments[2:]).dense()
    lowest, highest = (float(v) for v in torch.linalg.eigvalsh(H)[[0, -1]])
    assert -lowest < result.damping < -3 * lowest + 0.05 * max(abs(lowest), highest)
    same = hg.hypergradient(*arguments, method=hg.Implicit(hg.Dense(), damping=result.damping))
    assert relative_error(result.grads, same.grads) < 1e-1
    # The products of the failed attempt and of the estimate are counted too.
    alone = hg.hypergradient(*arguments, method=hg.Implicit(solver, damping=result.damping)).solve
    assert result.solve.matvecs > alone.matvecs
    assert tr.is_finite(result.grads)
