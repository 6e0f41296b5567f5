"""The table of linear solvers that every solver test loops over: a new solver is a new row."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from problems import Problem

import hypergrad as hg


@dataclass(frozen=True)
class SolverCase:
    """One solver, as the tests use it.

    `cheap` builds it with a small budget, to test receipts and failure paths, and with the residual
    measured. `exact` builds it in the limit where it solves a problem to about 1e-10, if it has
    one; `affordable(n, condition)` says for which problems that limit can be paid.
    """

    cheap: Callable[[], hg.LinearSolver]
    exact: Callable[[Problem], hg.LinearSolver] | None = None
    affordable: Callable[[int, float], bool] = lambda n, condition: True
    solves_small_systems: bool = False  # even with the small budget, to 1e-4


def neumann_terms(problem: Problem) -> int:
    """So many that (1 − 1/κ)^terms < 1e-11, times two for the estimate of λ_max."""
    return math.ceil(2 * problem.condition * math.log(1e11)) + 2


SOLVERS: dict[str, SolverCase] = {
    "cg": SolverCase(
        cheap=hg.CG,
        exact=lambda problem: hg.CG(rtol=1e-11),
        solves_small_systems=True,
    ),
    "neumann": SolverCase(
        cheap=lambda: hg.Neumann(measure_residual=True),
        exact=lambda problem: hg.Neumann(terms=neumann_terms(problem), rtol=1e-11),
        affordable=lambda n, condition: condition <= 200,
    ),
    "nystrom": SolverCase(
        cheap=lambda: hg.Nystrom(rank=1, measure_residual=True),
        exact=lambda problem: hg.Nystrom(rank=problem.n, rho=1e-11),
        affordable=lambda n, condition: n <= 300,
    ),
    "nystrom-chunked": SolverCase(
        cheap=lambda: hg.Nystrom(rank=1, chunk_size=1, measure_residual=True),
        exact=lambda problem: hg.Nystrom(rank=problem.n, rho=1e-11, chunk_size=7),
        affordable=lambda n, condition: n <= 60,
    ),
    "nystrom-gaussian": SolverCase(
        cheap=lambda: hg.Nystrom(rank=1, test="gaussian", measure_residual=True),
        exact=lambda problem: hg.Nystrom(rank=problem.n, rho=1e-11, test="gaussian"),
        # At full rank Ω is square, and as ill-conditioned as square Gaussian matrices are.
        affordable=lambda n, condition: n <= 60 and condition <= 200,
    ),
    "nystrom-orthonormal": SolverCase(
        cheap=lambda: hg.Nystrom(rank=1, test="orthonormal", measure_residual=True),
        exact=lambda problem: hg.Nystrom(rank=problem.n, rho=1e-11, test="orthonormal"),
        affordable=lambda n, condition: n <= 300,
    ),
    "nystrom-gaussian-chunked": SolverCase(
        cheap=lambda: hg.Nystrom(rank=1, test="gaussian", chunk_size=1, measure_residual=True),
        exact=lambda problem: hg.Nystrom(rank=problem.n, rho=1e-11, test="gaussian", chunk_size=7),
        affordable=lambda n, condition: n <= 20,
    ),
    "nystrom-auto": SolverCase(
        cheap=lambda: hg.Nystrom(rank="auto", max_rank=1, measure_residual=True),
        exact=lambda problem: hg.Nystrom(rank="auto", max_rank=problem.n, rho=1e-11),
        affordable=lambda n, condition: n <= 60,
    ),
    "cg-nystrom": SolverCase(
        cheap=lambda: hg.CG(preconditioner=hg.NystromPreconditioner(3)),
        exact=lambda problem: hg.CG(rtol=1e-11, preconditioner=hg.NystromPreconditioner(10)),
        solves_small_systems=True,
    ),
    "cg-nystrom-auto": SolverCase(
        cheap=lambda: hg.CG(preconditioner=hg.NystromPreconditioner("auto")),
        exact=lambda problem: hg.CG(rtol=1e-11, preconditioner=hg.NystromPreconditioner("auto")),
        affordable=lambda n, condition: n <= 300,
        solves_small_systems=True,
    ),
    "cg-jacobi": SolverCase(
        cheap=lambda: hg.CG(preconditioner=hg.JacobiPreconditioner(3)),
        exact=lambda problem: hg.CG(rtol=1e-11, preconditioner=hg.JacobiPreconditioner()),
        solves_small_systems=True,
    ),
    "block-cg": SolverCase(
        cheap=hg.BlockCG,
        exact=lambda problem: hg.BlockCG(rtol=1e-11),
        solves_small_systems=True,
    ),
    "minres": SolverCase(
        cheap=hg.MINRES,
        exact=lambda problem: hg.MINRES(rtol=1e-11),
        solves_small_systems=True,
    ),
    "minres-nystrom": SolverCase(
        cheap=lambda: hg.MINRES(preconditioner=hg.NystromPreconditioner(3)),
        exact=lambda problem: hg.MINRES(rtol=1e-11, preconditioner=hg.NystromPreconditioner(10)),
        affordable=lambda n, condition: n <= 300,
        solves_small_systems=True,
    ),
    "gmres": SolverCase(
        cheap=hg.GMRES,
        exact=lambda problem: hg.GMRES(rtol=1e-11, restart=200),
        affordable=lambda n, condition: n <= 300,
        solves_small_systems=True,
    ),
    "normal-cg": SolverCase(
        cheap=hg.NormalCG,
        exact=lambda problem: hg.NormalCG(rtol=1e-11),
        affordable=lambda n, condition: condition <= 200,
        solves_small_systems=True,
    ),
    "fixed-point": SolverCase(cheap=hg.FixedPoint),
    "stochastic-neumann": SolverCase(cheap=lambda: hg.StochasticNeumann(measure_residual=True)),
    "sgd": SolverCase(cheap=lambda: hg.SGDSolve(measure_residual=True)),
    "dense": SolverCase(
        cheap=hg.Dense,
        exact=lambda problem: hg.Dense(),
        affordable=lambda n, condition: n <= 500,
        solves_small_systems=True,
    ),
    "identity": SolverCase(cheap=lambda: hg.Identity(measure_residual=True)),
}
