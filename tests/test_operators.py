"""Hessian operators in every mode against dense second derivatives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import optree
import pytest
import torch
from optree.integrations.torch import tree_ravel
from problems import SMALL, Problem, dense_parts, logistic, mlp, name_of, ridge

import hypergrad as hg
from hypergrad import block as bl
from hypergrad.operators import Damped, Hessian, Matrix, hessian

TOLERANCE = {
    "auto": 1e-12,
    "reverse": 1e-12,
    "forward": 1e-12,
    "finite-difference": 1e-7,
    "compiled": 1e-12,
}
MODES = list(TOLERANCE)


def vectors(problem: Problem, k: int) -> tuple[Any, torch.Tensor]:
    """A block of k random vectors, and the same as the rows of a matrix."""
    flat, unravel = tree_ravel(problem.params)
    rows = torch.randn(
        k, len(flat), generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )
    return optree.tree_map(lambda *r: torch.stack(r), *[unravel(row) for row in rows]), rows


def operator(problem: Problem, mode: str) -> Hessian:
    return hessian(problem.inner, problem.params, problem.hparams, mode=mode)  # type: ignore[arg-type]


def first(block: Any) -> Any:
    return optree.tree_map(lambda leaf: leaf[0], block)


def flat(tree: Any) -> torch.Tensor:
    return tree_ravel(tree)[0]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("make", SMALL, ids=name_of)
def test_products_are_those_of_the_dense_hessian(make: Callable[[], Problem], mode: str) -> None:
    problem = make()
    H, J, *_ = dense_parts(problem)
    H = H - problem.damping * torch.eye(len(H))
    A = operator(problem, mode)
    block, rows = vectors(problem, 5)
    scale = float(H.abs().max())
    tolerance = {"rtol": TOLERANCE[mode], "atol": 10 * TOLERANCE[mode] * scale}

    torch.testing.assert_close(flat(A.matvec(first(block))), H @ rows[0], **tolerance)
    torch.testing.assert_close(flat(A.vjp_outer(first(block))), J.T @ rows[0], **tolerance)
    for chunk_size in (None, 1, 2, 5, 50):
        product = bl.to_matrix(A.matmat(block, chunk_size=chunk_size))
        torch.testing.assert_close(product, rows @ H, **tolerance)
    torch.testing.assert_close(A.dense(), H, **tolerance)
    torch.testing.assert_close(A.dense(chunk_size=3), H, **tolerance)
    torch.testing.assert_close(flat(A.diagonal(chunk_size=4)), H.diagonal(), **tolerance)


@pytest.mark.parametrize("mode", MODES)
def test_value_and_gradient_come_with_it(mode: str) -> None:
    problem = mlp()
    A = operator(problem, mode)
    theta, unravel = tree_ravel(problem.params)
    gradient = torch.func.grad(lambda t: problem.inner(unravel(t), problem.hparams))(theta)
    torch.testing.assert_close(flat(A.gradient), gradient)
    assert A.value == pytest.approx(problem.inner(problem.params, problem.hparams).item())
    assert A.symmetric
    assert not any(leaf.requires_grad for leaf in optree.tree_leaves(A.gradient))


@pytest.mark.parametrize("mode", MODES)
def test_a_wider_vector_gets_a_wider_product(mode: str) -> None:
    problem = ridge().to(torch.bfloat16)
    A = operator(problem, mode)
    v = torch.ones(10)
    assert A.matvec(v).dtype == torch.float32
    assert A.matmat(torch.stack([v, v])).dtype == torch.float32
    assert A.vjp_outer(v).dtype == torch.bfloat16
    assert A.matvec(v.bfloat16()).dtype == torch.bfloat16


def test_damping_moves_every_eigenvalue() -> None:
    A = operator(mlp(), "reverse")
    block, _ = vectors(mlp(), 3)
    damped = Damped(A, 0.7)
    torch.testing.assert_close(damped.dense(), A.dense() + 0.7 * torch.eye(51))
    torch.testing.assert_close(
        bl.to_matrix(damped.matmat(block)),
        bl.to_matrix(A.matmat(block)) + 0.7 * bl.to_matrix(block),
    )
    torch.testing.assert_close(flat(damped.diagonal()), flat(A.diagonal()) + 0.7)
    assert damped.symmetric


def test_the_gradient_is_linearised_once() -> None:
    problem, calls = logistic(), 0

    def counting(params: Any, hparams: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return problem.inner(params, hparams)

    result = hg.hypergradient(
        counting, problem.outer, problem.params, problem.hparams, verify="never"
    )
    assert result.solve.iterations > 3
    assert calls == 1


def test_a_linear_objective_has_a_zero_hessian() -> None:
    for mode in MODES:
        A = hessian(lambda w, p: (w * p).sum(), torch.ones(3), torch.ones(3), mode=mode)  # type: ignore[arg-type]
        torch.testing.assert_close(A.matvec(torch.ones(3)), torch.zeros(3), atol=1e-4, rtol=0.0)
        torch.testing.assert_close(A.vjp_outer(torch.ones(3)), torch.ones(3), atol=1e-4, rtol=0.0)
        assert not A.matvec(torch.zeros(3)).any()


def test_finite_differences_scale_with_the_vector_and_the_parameters() -> None:
    """The same digits for tiny and huge vectors, and for parameters of any size."""
    for size in (1e-3, 1.0, 1e4):
        w = torch.tensor([size, 2 * size], dtype=torch.float64)
        A = hessian(lambda w, p: (w**4).sum(), w, torch.ones(1), mode="finite-difference")
        for length in (1e-12, 1.0, 1e12):
            v = torch.tensor([1.0, -1.0], dtype=torch.float64) * length
            exact = 12 * w**2 * v
            if size >= 1.0:
                torch.testing.assert_close(A.matvec(v), exact, rtol=1e-6, atol=0.0)
            else:
                assert (A.matvec(v) - exact).abs().max() < 1e-9 * length


def test_matrix_and_contract_errors() -> None:
    with pytest.raises(ValueError, match=r"matrix must have shape \(n, n\), got \(2, 3\)"):
        Matrix(torch.ones(2, 3))
    with pytest.raises(ValueError, match="like must have n = 2 elements, got 3"):
        Matrix(torch.eye(2), like=torch.ones(3))
    A = operator(mlp(), "reverse")
    block, _ = vectors(mlp(), 2)
    with pytest.raises(ValueError, match="vector must have the structure of params"):
        A.matvec(torch.ones(51))
    with pytest.raises(ValueError, match="vector must have the shapes of params"):
        A.vjp_outer(optree.tree_map(lambda leaf: leaf[..., :-1], first(block)))
    with pytest.raises(ValueError, match=r"where \(k, ...\) \+ \(6, 4\) was expected"):
        A.matmat(first(block))
    with pytest.raises(ValueError, match="chunk_size must be at least 1, got 0"):
        A.matmat(block, chunk_size=0)
    with pytest.raises(ValueError, match=r"mode must be one of 'auto', .* got 'backward'"):
        operator(mlp(), "backward")
    with pytest.raises(ValueError, match="damping must be a finite number >= 0, got -1"):
        Damped(A, -1.0)
