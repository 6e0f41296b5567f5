"""No status lies and no solver raises, whatever the system."""

from __future__ import annotations

import pytest
import torch
from random_systems import SOLVERS, objections, system

import hypergrad as hg
from hypergrad import Status
from hypergrad.operators import Matrix

NAMES = list(SOLVERS)
FEW = 4  # solvers for each system of the short run, others for the next one


@pytest.mark.parametrize("block", range(4))
def test_two_hundred_systems(block: int) -> None:
    found = [
        f"{name} on {one}: {words}"
        for seed in range(50 * block, 50 * (block + 1))
        for one in [system(seed)]
        for name in [NAMES[(FEW * seed + i) % len(NAMES)] for i in range(FEW)]
        for words in objections(one, name)
    ]
    assert not found, "\n".join(found)


@pytest.mark.long
@pytest.mark.parametrize("block", range(40))
def test_four_thousand_systems_by_every_solver(block: int) -> None:
    found = [
        f"{name} on {one}: {words}"
        for seed in range(100 * block, 100 * (block + 1))
        for one in [system(seed)]
        for name in NAMES
        for words in objections(one, name)
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize("kind", ["skew", "singular"])
def test_fixed_points_of_singular_systems_end_with_a_status(kind: str) -> None:
    for seed in range(40):
        generator = torch.Generator().manual_seed(seed)
        A = torch.randn(3, 3, generator=generator)
        A = A - A.T if kind == "skew" else A * torch.tensor([1.0, 0.0, 1.0])
        b = torch.randn(3, generator=generator)
        solution = hg.FixedPoint(maxiter=200).solve(Matrix(A), b)
        assert solution.status.failed
        assert torch.isfinite(solution.x).all()


def nearly_singular(seed: int, values: list[float]) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    n = len(values)
    Q = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))[0]
    A = ((Q * torch.tensor(values)) @ Q.T).float()
    return A, torch.randn(n, generator=generator)


@pytest.mark.parametrize("values", [[1e-14, 1e-7, 1.0], [-1e-8, 1e-3, 1.0, 5.0]])
@pytest.mark.parametrize("symmetric", [True, False])
def test_dense_is_converged_only_within_its_tolerance(values: list[float], symmetric: bool) -> None:
    statuses = set()
    for seed in range(100):
        A, b = nearly_singular(seed, values)
        A = (A + A.T) / 2 if symmetric else A.roll(1, 0)
        solution = hg.Dense().solve(Matrix(A), b)
        left = float((b.double() - A.double() @ solution.x.double()).norm() / b.double().norm())
        # The float32 norm of b rounds twice.
        assert solution.relative_residual == pytest.approx(left, rel=1e-2, abs=1e-9)
        assert solution.converged == (left <= torch.finfo(A.dtype).eps ** 0.5)
        statuses.add(solution.status)
    assert Status.BREAKDOWN in statuses


def test_dense_measures_the_matrix_that_it_was_given() -> None:
    # Symmetric up to rounding, but b asks for what rounding took away.
    A = torch.tensor([[1.0, 1e-7], [0.0, 1e-7]])
    assert Matrix(A).symmetric
    b = torch.tensor([0.0, 1.0])
    solution = hg.Dense().solve(Matrix(A), b)
    left = float((b - A @ solution.x).norm())
    assert solution.relative_residual == pytest.approx(left, abs=1e-3)
    assert solution.converged == (left < 1e-3)


def test_an_answer_below_the_range_of_its_dtype_is_not_converged() -> None:
    A, b = Matrix(1e30 * torch.eye(3)), torch.full((3,), 1e-15)
    for solver in (hg.CG(), hg.MINRES(), hg.GMRES(), hg.Dense()):
        solution = solver.solve(A, b)
        assert solution.status.failed
        assert solution.relative_residual == pytest.approx(0.4, abs=0.01)  # of one bit
        assert solver.solve(A, 1e10 * b).converged


def test_a_sketch_of_an_operator_that_is_not_symmetric_ends_with_a_status() -> None:
    A = Matrix(torch.tensor([[1.0, 2.0], [-1.0, 0.0]]))
    solution = hg.GMRES(preconditioner=hg.NystromPreconditioner(1)).solve(A, torch.ones(2))
    assert solution.status is Status.NOT_SYMMETRIC


def test_vectors_take_factors_beyond_their_dtype() -> None:
    from hypergrad import tree as tr

    x = (torch.ones(2), torch.ones(1, dtype=torch.float64))
    assert tr.scale(x, 1e39)[0].isinf().all()
    assert tr.add(x, x, -1e200)[0].isinf().all()
    torch.testing.assert_close(tr.divide((x[0] * 3e38, x[1]), 3e45)[0], torch.full((2,), 1e-7))
    assert tr.scale((torch.ones(2, dtype=torch.float64),), 1e300)[0][0] == 1e300
    half = torch.ones(2, dtype=torch.float16)
    assert tr.add(half, half, 1e5).isinf().all()
