"""The Nyström sketch against the textbook formula, evaluated densely in float64."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import spd_matrix

import hypergrad as hg
from hypergrad import Status
from hypergrad import tree as tr
from hypergrad.operators import Matrix


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def textbook(A: torch.Tensor, indices: torch.Tensor, rho: float, b: torch.Tensor) -> torch.Tensor:
    """`(C W⁻¹ Cᵀ + ρI)⁻¹ b`, with the n × n matrix formed and factored."""
    A, b = A.double(), b.double()
    C, W = A[:, indices], A[indices][:, indices]
    H_k = C @ torch.linalg.pinv(W, hermitian=True) @ C.T
    return torch.linalg.solve(H_k + rho * torch.eye(len(A), dtype=A.dtype), b)


@pytest.mark.parametrize("rank", [1, 3, 10, 29, 30])
@pytest.mark.parametrize("rho", [1e2, 1.0, 1e-2, 1e-4, 1e-8])
@pytest.mark.parametrize("chunk_size", [None, 1, 4, 64])
def test_agrees_with_the_textbook_formula(rank: int, rho: float, chunk_size: int | None) -> None:
    A = spd_matrix(30, 100.0, 1)
    b = torch.randn(30, generator=seeded(), dtype=torch.float64)
    solver = hg.Nystrom(rank=rank, rho=rho, chunk_size=chunk_size, generator=seeded(rank))
    sketch = solver.sketch(Matrix(A))
    expected = textbook(A, sketch.sketch.test.indices, rho, b)
    error = (sketch.apply(b) - expected).norm() / expected.norm()
    # Forming (H_k + ρI) loses its condition number; so does the reference.
    assert error < 1e-13 * max(1e3, A.norm() / rho)
    eigenvalues = torch.linalg.eigvalsh(
        A[:, sketch.sketch.test.indices]
        @ torch.linalg.pinv(
            A[sketch.sketch.test.indices][:, sketch.sketch.test.indices], hermitian=True
        )
        @ A[sketch.sketch.test.indices]
    )
    torch.testing.assert_close(sketch.eigenvalues.sort().values, eigenvalues[-rank:])


@pytest.mark.parametrize("rank", [1, 10, 30])
@pytest.mark.parametrize("rho", [1.0, 1e-2, 1e-4, 1e-8])
@pytest.mark.parametrize("chunk_size", [None, 4])
def test_float32_is_accurate_down_to_a_tiny_rho(
    rank: int, rho: float, chunk_size: int | None
) -> None:
    A = spd_matrix(30, 100.0, 1).float()
    A = (A + A.T) / 2
    b = torch.randn(30, generator=seeded())
    solver = hg.Nystrom(rank=rank, rho=rho, chunk_size=chunk_size, generator=seeded(rank))
    sketch = solver.sketch(Matrix(A))
    expected = textbook(A, sketch.sketch.test.indices, rho, b)
    actual = sketch.apply(b)
    assert actual.dtype == torch.float32
    assert torch.isfinite(actual).all()
    # The columns are rounded to float32; a whole decade is left for what the chunks recompute.
    assert (actual - expected).norm() / expected.norm() < (1e-3 if chunk_size is None else 1e-2)


def test_full_rank_inverts_whatever_the_structure() -> None:
    A = spd_matrix(12, 50.0, 0)
    b = torch.randn(12, generator=seeded(), dtype=torch.float64)
    like = {"w": b[:8].reshape(2, 4), "b": [b[8:11], b[11]]}
    solution = hg.Nystrom(rank=12, rho=1e-10).solve(Matrix(A, like=like), like)
    flat = torch.cat([leaf.reshape(-1) for leaf in tr.leaves(solution.x)])
    order = torch.cat([torch.arange(8, 12), torch.arange(8)])  # dict keys are sorted
    permuted = torch.linalg.solve(A, b[order])
    torch.testing.assert_close(flat, permuted, rtol=1e-8, atol=0.0)


def test_rank_deficient_and_zero_operators() -> None:
    B = torch.randn(20, 3, generator=seeded(), dtype=torch.float64)
    A, b = B @ B.T, torch.ones(20, dtype=torch.float64)
    for chunk_size, test in itertools.product((None, 2), ("coordinates", "gaussian")):
        options = {"chunk_size": chunk_size, "test": test}
        sketch = hg.Nystrom(rank=10, rho=0.1, **options).sketch(Matrix(A))
        exact = torch.linalg.solve(A + 0.1 * torch.eye(20), b)
        assert len(sketch.eigenvalues) == 3
        torch.testing.assert_close(sketch.apply(b), exact, rtol=1e-7, atol=1e-9)
        zero = hg.Nystrom(rank=5, rho=0.5, **options).solve(Matrix(0 * A), b)
        torch.testing.assert_close(zero.x, 2 * b)


def test_indefinite_operators_follow_the_textbook_and_its_singularities() -> None:
    A = torch.diag(torch.tensor([3.0, 1.0, -2.0, -0.5], dtype=torch.float64))
    b = torch.ones(4, dtype=torch.float64)
    sketch = hg.Nystrom(rank=4, rho=0.1).sketch(Matrix(A))
    torch.testing.assert_close(sketch.apply(b), b / (A.diagonal() + 0.1))
    singular = hg.Nystrom(rank=4, rho=0.5).solve(Matrix(A), b)
    assert torch.isfinite(singular.x).all()
    assert singular.status is Status.BREAKDOWN or singular.x.abs().max() > 1e12


@settings(deadline=None, max_examples=50, derandomize=True)
@given(st.integers(2, 12), st.floats(1.0, 1e4), st.floats(1e-6, 1e3), st.data())
def test_any_rank_any_rho(n: int, condition: float, rho: float, data: st.DataObject) -> None:
    rank = data.draw(st.integers(1, n))
    A = spd_matrix(n, condition, n)
    b = torch.randn(n, generator=seeded(n), dtype=torch.float64)
    sketch = hg.Nystrom(rank=rank, rho=rho, generator=seeded(rank)).sketch(Matrix(A))
    expected = textbook(A, sketch.sketch.test.indices, rho, b)
    assert (sketch.apply(b) - expected).norm() <= 1e-12 * (condition / rho + 1e3) * expected.norm()


def test_a_kept_sketch_costs_no_product_for_another_right_hand_side() -> None:
    A = Matrix(spd_matrix(30, 100.0, 0))
    sketch = hg.Nystrom(rank=30, rho=1e-6).sketch(A)
    for seed in range(3):
        b = torch.randn(30, generator=seeded(seed), dtype=torch.float64)
        solution = sketch.solve(A, b)
        assert solution.matvecs == 0
        exact = torch.linalg.solve(spd_matrix(30, 100.0, 0), b)
        assert (solution.x - exact).norm() < 1e-5 * exact.norm()


def test_the_generator_decides_the_columns() -> None:
    A = Matrix(spd_matrix(30, 100.0, 0))
    first, again, other = (
        hg.Nystrom(rank=5, generator=seeded(s)).sketch(A).sketch.test.indices for s in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert len(first.unique()) == 5
    torch.manual_seed(3)
    default = hg.Nystrom(rank=5).sketch(A).sketch.test.indices
    torch.manual_seed(3)
    assert torch.equal(default, hg.Nystrom(rank=5).sketch(A).sketch.test.indices)


def test_every_column_is_as_likely_as_the_next() -> None:
    A = Matrix(torch.eye(6))
    counts = torch.zeros(6)
    generator = seeded()
    for _ in range(2000):
        indices = hg.Nystrom(rank=2, generator=generator).sketch(A).sketch.test.indices
        assert indices[0] < indices[1]
        counts[indices] += 1
    # 2000 draws at probability 1/3: standard deviation 21, and four of them.
    assert (counts - 2000 / 3).abs().max() < 84


def test_the_chunk_bounds_the_width_of_every_product() -> None:
    widest = 0

    class Watched(Matrix):
        def multiply_chunk(self, block: torch.Tensor) -> torch.Tensor:
            nonlocal widest
            widest = max(widest, len(block))
            return super().multiply_chunk(block)

    b = torch.ones(40, dtype=torch.float64)
    hg.Nystrom(rank=20, chunk_size=3).solve(Watched(spd_matrix(40, 10.0, 0)), b)
    assert widest == 3


def test_bad_sketches_are_refused() -> None:
    with pytest.raises(
        ValueError, match="rank must be at most the number of parameters, got rank=4"
    ):
        hg.Nystrom(rank=4).sketch(Matrix(torch.eye(3)))
    with pytest.raises(ValueError, match="operator must be symmetric"):
        hg.Nystrom(rank=1).sketch(Matrix(torch.tensor([[1.0, 2.0], [0.0, 1.0]])))


def test_columns_may_be_given() -> None:
    A, b = torch.diag(torch.tensor([1.0, 2.0, 4.0])), torch.ones(3)
    x = hg.Nystrom(rank=2, rho=1.0, columns=(2, 0)).solve(Matrix(A), b).x
    torch.testing.assert_close(x, torch.tensor([0.5, 1.0, 0.2]))  # the second is taken for zero
    for columns in ((0,), (0, 3), (-1, 0), (1, 1)):
        with pytest.raises(ValueError, match="columns must be rank=2 different integers from 0 to"):
            hg.Nystrom(rank=2, columns=columns).solve(Matrix(A), b)
    with pytest.raises(ValueError, match="columns must come with test='coordinates', got test="):
        hg.Nystrom(rank=1, test="gaussian", columns=(0,))
