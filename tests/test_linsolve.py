"""What every linear solver promises, and where the peers went wrong."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from problems import spd_matrix
from solvers import SOLVERS
from systems import SPD, CountingMatrix, Diagonal, DiagonalTree, residual, rhs_for

import hypergrad as hg
from hypergrad import Status
from hypergrad import tree as tr
from hypergrad.linsolve import extreme_eigenvalues
from hypergrad.operators import Matrix

EVERY_SOLVER = pytest.mark.parametrize("name", SOLVERS)


@EVERY_SOLVER
def test_zero_right_hand_side_gives_zero_for_nothing(name: str) -> None:
    A, b = Matrix(spd_matrix(5, 10.0, 0)), torch.zeros(5, dtype=torch.float64)
    solution = SOLVERS[name].cheap().solve(A, b)
    assert torch.equal(solution.x, b)
    assert solution.status is Status.CONVERGED
    assert (solution.matvecs, solution.relative_residual) == (0, 0.0)


@EVERY_SOLVER
@pytest.mark.parametrize(
    ("dtype", "scale"),
    [
        (torch.float16, 6e-8),
        (torch.bfloat16, 1e-38),
        (torch.float32, 1e-42),
        (torch.float64, 1e-200),
    ],
)
def test_a_tiny_right_hand_side_does_not_underflow(
    name: str, dtype: torch.dtype, scale: float
) -> None:
    A = torch.eye(4, dtype=dtype) * 0.5
    b = torch.full((4,), scale, dtype=dtype)
    solution = SOLVERS[name].cheap().solve(Matrix(A), b)
    assert not solution.status.failed
    assert torch.isfinite(solution.x).all()
    assert (solution.x != 0).all()
    if SOLVERS[name].solves_small_systems:
        torch.testing.assert_close(solution.x.double(), 2 * b.double(), rtol=1e-2, atol=0.0)


@EVERY_SOLVER
def test_a_scalar_unknown(name: str) -> None:
    A = Matrix(torch.tensor([[4.0]]), like=torch.zeros(()))
    solution = SOLVERS[name].cheap().solve(A, torch.tensor(2.0))
    assert solution.x.shape == ()
    assert torch.isfinite(solution.x)
    if SOLVERS[name].solves_small_systems:
        assert solution.x.item() == pytest.approx(0.5, rel=1e-4)


@EVERY_SOLVER
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_non_finite_numbers_are_reported_and_never_returned(name: str, bad: float) -> None:
    b = torch.ones(3)
    broken_rhs = SOLVERS[name].cheap().solve(Matrix(torch.eye(3)), torch.tensor([1.0, bad, 1.0]))
    broken_operator = SOLVERS[name].cheap().solve(Diagonal(torch.full((3,), bad)), b)
    for solution in (broken_rhs, broken_operator):
        assert torch.isfinite(solution.x).all()
    assert broken_rhs.status is Status.NON_FINITE
    assert broken_operator.status is Status.NON_FINITE or name == "identity"


def test_singular_operators() -> None:
    A = Matrix(torch.diag(torch.tensor([3.0, 1.0, 0.0], dtype=torch.float64)))
    inside = torch.tensor([3.0, 2.0, 0.0], dtype=torch.float64)
    outside = torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64)
    expected = torch.tensor([1.0, 2.0, 0.0], dtype=torch.float64)
    for solver in (hg.CG(rtol=1e-12), hg.Dense()):
        solution = solver.solve(A, inside)
        assert solution.status is Status.CONVERGED
        torch.testing.assert_close(solution.x, expected)
        assert solver.solve(A, outside).status is Status.BREAKDOWN
    assert hg.CG().solve(Matrix(torch.zeros(2, 2)), torch.ones(2)).status is Status.BREAKDOWN
    torch.testing.assert_close(hg.Dense().solve(A, outside).x, expected)


def test_dense_solves_indefinite_and_non_symmetric_systems() -> None:
    indefinite = torch.diag(torch.tensor([1.0, -2.0, 5.0], dtype=torch.float64))
    skewed = torch.tensor([[1.0, 2.0], [-3.0, 1.0]], dtype=torch.float64)
    for A in (indefinite, skewed):
        b = torch.ones(len(A), dtype=torch.float64)
        solution = hg.Dense().solve(Matrix(A), b)
        assert solution.status is Status.CONVERGED
        torch.testing.assert_close(solution.x, torch.linalg.solve(A, b))
    with pytest.raises(ValueError, match="at most max_size = 2 elements for Dense, got 3"):
        hg.Dense(max_size=2).solve(Matrix(indefinite), torch.ones(3, dtype=torch.float64))


@EVERY_SOLVER
def test_x0_starts_from_a_correction_and_the_exact_answer_stays(name: str) -> None:
    A, b = spd_matrix(5, 10.0, 0), rhs_for(5)
    exact = torch.linalg.solve(A, b)
    solution = SOLVERS[name].cheap().solve(Matrix(A), b, x0=exact)
    torch.testing.assert_close(solution.x, exact, rtol=1e-9, atol=1e-12)


def test_a_start_that_is_worse_than_zero_is_not_used() -> None:
    """As after a solve on quite another mini-batch: few iterations from there would end far off."""
    A, b = Matrix(spd_matrix(20, 100.0, 0)), torch.ones(20, dtype=torch.float64)
    solver = hg.CG(rtol=1e-12, maxiter=2)
    from_zero = solver.solve(A, b)
    assert torch.equal(solver.solve(A, b, x0=1e3 * b).x, from_zero.x)
    near = solver.solve(A, b, x0=0.9 * torch.linalg.solve(spd_matrix(20, 100.0, 0), b))
    assert near.relative_residual < 0.2 * from_zero.relative_residual


def test_neumann_is_the_series_it_says() -> None:
    A, b = spd_matrix(8, 10.0, 0), rhs_for(8)
    M = torch.eye(8, dtype=torch.float64) - 0.1 * A
    for terms in (1, 2, 7):
        series = sum(0.1 * torch.linalg.matrix_power(M, k) @ b for k in range(terms))
        solution = hg.Neumann(terms=terms, step=0.1, rtol=0.0, measure_residual=True).solve(
            Matrix(A), b
        )
        torch.testing.assert_close(solution.x, series)
        assert solution.iterations == terms
        assert solution.matvecs == terms
        assert solution.relative_residual == pytest.approx(residual(A, solution, b), rel=1e-9)


def test_neumann_estimates_its_step_and_stops_at_rtol() -> None:
    for n, condition in SPD[:3]:
        A, b = spd_matrix(n, condition, n), rhs_for(n)
        solution = hg.Neumann(terms=100_000, rtol=1e-9, record_residuals=True).solve(Matrix(A), b)
        assert solution.status is Status.CONVERGED
        assert residual(A, solution, b) <= 1.01e-9
        assert solution.residuals is not None
        assert solution.residuals[0] == pytest.approx(1.0)
        estimate = extreme_eigenvalues(Matrix(A)).largest
        assert 0.5 * condition < estimate <= condition * (1 + 1e-9)


def test_neumann_reports_divergence_with_its_best_sum() -> None:
    A, b = spd_matrix(8, 10.0, 0), rhs_for(8)
    too_long = hg.Neumann(terms=1000, step=0.5).solve(Matrix(A), b)
    assert too_long.status is Status.DIVERGED
    assert too_long.relative_residual is not None
    assert too_long.relative_residual <= 1.0
    indefinite = hg.Neumann(terms=1000).solve(Matrix(A - 5 * torch.eye(8)), b)
    assert indefinite.status is Status.DIVERGED


def test_identity_scales() -> None:
    b = rhs_for(3)
    solution = hg.Identity(0.25, measure_residual=True).solve(Matrix(2 * torch.eye(3).double()), b)
    torch.testing.assert_close(solution.x, b / 4)
    assert solution.relative_residual == pytest.approx(0.5)
    assert solution.status is Status.APPROXIMATE


@EVERY_SOLVER
def test_receipts_are_honest(name: str) -> None:
    """Products are counted from outside, residuals measured from outside."""
    A, b = spd_matrix(6, 10.0, 0), rhs_for(6)
    counter = CountingMatrix(A)
    solution = SOLVERS[name].cheap().solve(counter, b)
    assert solution.matvecs == counter.products
    assert solution.relative_residual == pytest.approx(residual(A, solution, b), abs=1e-12)


@EVERY_SOLVER
def test_trees_solve_like_flat_vectors(name: str) -> None:
    A, b = spd_matrix(6, 10.0, 0), rhs_for(6)
    coupled = {"a": b[:2].reshape(2, 1), "b": (b[2], [b[3:]])}
    torch.manual_seed(0)
    flat = SOLVERS[name].cheap().solve(Matrix(A), b)
    torch.manual_seed(0)
    tree = SOLVERS[name].cheap().solve(Matrix(A, like=coupled), coupled)
    back = torch.cat([leaf.reshape(-1) for leaf in tr.leaves(tree.x)])
    torch.testing.assert_close(back, flat.x)


def test_one_wide_leaf_and_non_contiguous_leaves() -> None:
    """TorchOpt counts a (100, 200) leaf as 300 unknowns; views break hypertorch."""
    diagonal = torch.linspace(1.0, 5.0, 20_000, dtype=torch.float64).reshape(100, 200)
    b = rhs_for(20_000).reshape(200, 100).T
    assert not b.is_contiguous()
    for solver in (hg.CG(rtol=1e-12), hg.Neumann(terms=500, rtol=1e-12)):
        solution = solver.solve(Diagonal(diagonal), b)
        assert solution.status is Status.CONVERGED
        torch.testing.assert_close(solution.x, b / diagonal)


@pytest.mark.parametrize("solver", [hg.CG(rtol=1e-4), hg.Neumann(terms=100, step=0.3, rtol=1e-4)])
def test_the_host_reads_no_more_for_many_leaves(
    solver: hg.LinearSolver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A copy to the host per leaf per product would stall an accelerator."""
    reads = 0
    for name in ("item", "tolist", "__float__", "__bool__", "__int__"):
        original = getattr(torch.Tensor, name)

        def counting(tensor: torch.Tensor, original: Callable = original) -> object:
            nonlocal reads
            reads += 1
            return original(tensor)

        monkeypatch.setattr(torch.Tensor, name, counting)
    diagonal, b = torch.linspace(1.0, 5.0, 60), rhs_for(60).float()

    def read(leaves: int) -> tuple[int, int]:
        nonlocal reads
        reads = 0
        operator = DiagonalTree(diagonal.chunk(leaves))
        solution = solver.solve(operator, b.chunk(leaves))
        assert solution.status is Status.CONVERGED
        return reads, solution.iterations

    one, iterations = read(1)
    many, _ = read(30)
    assert many == one
    assert one <= 2 * iterations + 40


def test_a_linear_operator_needs_only_its_contract() -> None:
    D = Diagonal(torch.tensor([1.0, 2.0, 4.0]))
    assert torch.equal(D.dense(), torch.diag(torch.tensor([1.0, 2.0, 4.0])).double())
    assert torch.equal(D.diagonal(), torch.tensor([1.0, 2.0, 4.0]))
