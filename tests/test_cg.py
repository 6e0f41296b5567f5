"""Conjugate gradient: against SciPy, in its error, and at its limits."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.sparse.linalg
import torch
from problems import spd_matrix
from systems import SPD, residual, rhs_for

import hypergrad as hg
from hypergrad import Status
from hypergrad.operators import Matrix


@pytest.mark.parametrize(("n", "condition"), SPD)
@pytest.mark.parametrize("rtol", [1e-3, 1e-6, 1e-10])
def test_cg_reaches_rtol_on_every_spd_problem(n: int, condition: float, rtol: float) -> None:
    A, b = spd_matrix(n, condition, n), rhs_for(n)
    solution = hg.CG(rtol=rtol).solve(Matrix(A), b)
    assert solution.status is Status.CONVERGED
    assert residual(A, solution, b) <= rtol * (1 + 1e-6)
    assert solution.relative_residual == pytest.approx(residual(A, solution, b), rel=1e-3)
    if n <= 20 and condition <= 10:
        assert solution.iterations <= n

    iterations = 0

    def count(_: np.ndarray) -> None:
        nonlocal iterations
        iterations += 1

    scipy.sparse.linalg.cg(A.numpy(), b.numpy(), rtol=rtol, callback=count)
    assert solution.iterations <= math.ceil(1.1 * iterations)
    # One product an iteration, one in twenty for the true residual, few to confirm.
    assert solution.matvecs <= 1.05 * solution.iterations + 3


def test_more_iterations_of_cg_are_never_worse_in_error() -> None:
    """hypergrad 0.0.1 had relative error 0.27 after 5 iterations and 2.3 after 100."""
    A, b = spd_matrix(100, 100.0, 0), rhs_for(100)
    exact = torch.linalg.solve(A, b)
    errors = [
        float((hg.CG(rtol=0.0, maxiter=k).solve(Matrix(A), b).x - exact).norm() / exact.norm())
        for k in (1, 2, 5, 10, 20, 40, 80, 160)
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-12


@pytest.mark.parametrize("k", [1, 20, 41])
def test_cg_without_a_tolerance_is_k_iterations_for_k_products(k: int) -> None:
    A, b = spd_matrix(100, 100.0, 0), rhs_for(100)
    found = hg.CG(rtol=None, maxiter=k).solve(Matrix(A), b)
    checked = hg.CG(rtol=0.0, maxiter=k).solve(Matrix(A), b)
    assert torch.equal(found.x, checked.x)
    assert found.status is Status.APPROXIMATE
    assert found.relative_residual is None
    # Of many iterations the true residual is looked at now and then, never after the last.
    assert (found.iterations, found.matvecs) == (k, k + (k - 1) // 20)


def test_cg_without_a_tolerance_still_says_what_went_wrong() -> None:
    A = Matrix(torch.diag(torch.tensor([1.0, -1.0])))
    solution = hg.CG(rtol=None, maxiter=5).solve(A, torch.tensor([1.0, 2.0]))
    assert solution.status is Status.NEGATIVE_CURVATURE
    with pytest.raises(ValueError, match="maxiter must be given with rtol=None"):
        hg.CG(rtol=None)


@pytest.mark.parametrize("c", [1e-6, 2.0, 1e6])
def test_cg_is_exact_after_one_iteration_on_a_multiple_of_the_identity(c: float) -> None:
    """hypertorch and BOAT return the iterate before the last: zero here."""
    b = rhs_for(6)
    solution = hg.CG().solve(Matrix(c * torch.eye(6, dtype=torch.float64)), b)
    assert solution.iterations == 1
    torch.testing.assert_close(solution.x, b / c)


def test_cg_stops_once_exact_with_fewer_eigenvalues_than_iterations() -> None:
    A = torch.diag(torch.tensor([1.0, 1.0, 3.0, 3.0, 7.0, 7.0], dtype=torch.float64))
    solution = hg.CG(rtol=1e-13).solve(Matrix(A), rhs_for(6))
    assert solution.iterations == 3
    torch.testing.assert_close(solution.x, rhs_for(6) / A.diagonal())


def test_a_preconditioner_cuts_the_iterations() -> None:
    diagonal = torch.logspace(0, 6, 200, dtype=torch.float64)
    A = torch.diag(diagonal) + 0.1 * spd_matrix(200, 10.0, 0)
    b = rhs_for(200)
    plain = hg.CG(rtol=1e-8).solve(Matrix(A), b)
    jacobi = hg.CG(rtol=1e-8, preconditioner=lambda r: r / A.diagonal()).solve(Matrix(A), b)
    assert jacobi.status is Status.CONVERGED
    assert jacobi.iterations < plain.iterations / 5
    with pytest.raises(ValueError, match="preconditioner must be positive definite"):
        hg.CG(preconditioner=lambda r: -r).solve(Matrix(A), b)


def test_a_nystrom_sketch_preconditions_cg() -> None:
    A = spd_matrix(50, 10.0, 0)
    A += 1e4 * torch.outer(rhs_for(50), rhs_for(50))
    b = torch.ones(50, dtype=torch.float64)
    sketch = hg.Nystrom(rank=10, rho=1.0, generator=torch.Generator().manual_seed(0)).sketch(
        Matrix(A)
    )
    plain = hg.CG(rtol=1e-8).solve(Matrix(A), b)
    assisted = hg.CG(rtol=1e-8, preconditioner=sketch.apply).solve(Matrix(A), b)
    assert assisted.status is Status.CONVERGED
    assert assisted.iterations < plain.iterations


def test_negative_curvature_is_reported_with_the_best_iterate() -> None:
    A = torch.diag(torch.tensor([4.0, 3.0, 2.0, -1.0], dtype=torch.float64))
    b = torch.tensor([1.0, 1.0, 1.0, 1e-3], dtype=torch.float64)
    solution = hg.CG(rtol=1e-10, record_residuals=True).solve(Matrix(A), b)
    assert solution.status is Status.NEGATIVE_CURVATURE
    assert solution.residuals is not None
    assert residual(A, solution, b) == pytest.approx(min(solution.residuals), rel=1e-6)
    assert solution.relative_residual == pytest.approx(residual(A, solution, b), rel=1e-6)
    at_once = hg.CG().solve(Matrix(-A), torch.tensor([1.0, 0.0, 0.0, 0.0], dtype=torch.float64))
    assert at_once.status is Status.NEGATIVE_CURVATURE
    assert torch.equal(at_once.x, torch.zeros(4, dtype=torch.float64))


def test_stagnation_is_called_by_its_name() -> None:
    A = spd_matrix(100, 1e4, 0).float()
    solution = hg.CG(rtol=1e-12).solve(Matrix(A), rhs_for(100).float())
    assert solution.status is Status.STAGNATED
    assert solution.relative_residual is not None
    assert solution.relative_residual < 1e-2


def test_absolute_tolerance_is_in_the_units_of_b() -> None:
    A, b = spd_matrix(50, 100.0, 0), 1e-6 * rhs_for(50)
    solution = hg.CG(rtol=0.0, atol=1e-9).solve(Matrix(A), b)
    assert solution.status is Status.CONVERGED
    assert 1e-12 < (b - A @ solution.x).norm() <= 1e-9


def test_cg_warm_start_is_worth_its_digits() -> None:
    A, b = spd_matrix(200, 1e3, 0), rhs_for(200)
    exact = torch.linalg.solve(A, b)
    cold = hg.CG(rtol=1e-8).solve(Matrix(A), b)
    near = exact * (1 + 1e-5 * rhs_for(200))
    warm = hg.CG(rtol=1e-8).solve(Matrix(A), b, x0=near)
    assert warm.status is Status.CONVERGED
    assert warm.iterations < 0.8 * cold.iterations
    assert residual(A, warm, b) <= 1e-8
