"""Block CG against dense solves, alone and beside single CG."""

from __future__ import annotations

import pytest
import torch
from problems import spd_matrix
from systems import CountingMatrix, rhs_for

import hypergrad as hg
from hypergrad import Status
from hypergrad import block as bl
from hypergrad.operators import Matrix


def columns(n: int, k: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(n + k)
    return torch.randn(k, n, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize(("n", "condition"), [(5, 10.0), (60, 100.0), (200, 1e4)])
@pytest.mark.parametrize("k", [1, 4, 5])
def test_every_column_meets_the_tolerance(n: int, condition: float, k: int) -> None:
    A, B = spd_matrix(n, condition, n), columns(n, k)
    counter = CountingMatrix(A)
    solution = hg.BlockCG(rtol=1e-9).solve_block(counter, B)
    assert solution.status is Status.CONVERGED
    measured = (B - solution.x @ A).norm(dim=1) / B.norm(dim=1)
    assert measured.max() <= 1.01e-9
    torch.testing.assert_close(solution.relative_residuals, measured, rtol=1e-2, atol=1e-14)
    assert solution.matvecs == counter.products


def test_a_block_takes_fewer_iterations_than_its_columns_alone() -> None:
    A, B = spd_matrix(200, 1e4, 0), columns(200, 8)
    block = hg.BlockCG(rtol=1e-8).solve_block(Matrix(A), B)
    alone = [hg.CG(rtol=1e-8).solve(Matrix(A), b).iterations for b in B]
    assert block.iterations < min(alone) / 2


def test_dependent_zero_and_badly_scaled_columns() -> None:
    A, b = spd_matrix(40, 100.0, 0), rhs_for(40)
    B = torch.stack([b, 2.0 * b, torch.zeros_like(b), 1e-12 * rhs_for(40).flip(0), b + 1e-9])
    solution = hg.BlockCG(rtol=1e-9).solve_block(Matrix(A), B)
    assert solution.status is Status.CONVERGED
    exact = torch.linalg.solve(A, B.T).T
    error = (solution.x - exact).norm(dim=1)
    assert (error <= 1e-6 * exact.norm(dim=1)).all()
    assert torch.equal(solution.x[2], torch.zeros(40, dtype=torch.float64))


def test_trees_float32_and_failures() -> None:
    A, B = spd_matrix(12, 20.0, 0), columns(12, 3)
    like = {"w": torch.zeros(2, 4), "b": [torch.zeros(3), torch.zeros(())]}
    tree = {"w": B[:, 4:].reshape(3, 2, 4).float(), "b": [B[:, :3].float(), B[:, 3].float()]}
    solution = hg.BlockCG(rtol=1e-5).solve_block(Matrix(A.float(), like=like), tree)
    assert solution.status is Status.CONVERGED
    exact = torch.linalg.solve(A, B.T).T
    torch.testing.assert_close(bl.to_matrix(solution.x), exact, rtol=1e-3, atol=1e-5)

    def status(matrix: torch.Tensor, **options: object) -> Status:
        solver = hg.BlockCG(**options)  # type: ignore[arg-type]
        found = solver.solve_block(Matrix(matrix), B)
        assert torch.isfinite(found.x).all()
        return found.status

    negative = A - 10 * torch.eye(12)
    assert status(negative) is Status.NEGATIVE_CURVATURE
    assert status(torch.zeros(12, 12, dtype=torch.float64)) is Status.BREAKDOWN
    assert status(A + torch.triu(A)) is Status.NOT_SYMMETRIC
    assert status(A * torch.nan) in (Status.NON_FINITE, Status.NOT_SYMMETRIC)
    assert status(A, rtol=1e-10, maxiter=1) is Status.MAX_ITERATIONS
    stiff = spd_matrix(12, 1e6, 0).float()
    stagnated = hg.BlockCG(rtol=1e-12).solve_block(Matrix(stiff), B.float())
    assert stagnated.status in (Status.STAGNATED, Status.MAX_ITERATIONS)
    with pytest.raises(ValueError, match="rhs must have the shapes of the operator's vectors"):
        hg.BlockCG().solve_block(Matrix(A), B[0])
