"""Damped and transposed operators, and given matrices."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hypergrad import block as bl
from hypergrad import tree as tr
from hypergrad._checks import check_number, check_tree
from hypergrad.operators.base import LinearOperator, WrappedOperator, one_by_one
from hypergrad.tree import Tree


def damped(operator: LinearOperator, damping: float) -> LinearOperator:
    """``A + λ I``; A itself where λ is 0."""
    return Damped(operator, damping) if damping > 0.0 else operator


class Damped(WrappedOperator):
    """The map ``v ↦ A v + λ v``, which moves every eigenvalue of A up by λ.

    Args:
        operator: A.
        damping: λ ≥ 0.

    Raises:
        TypeError, ValueError: ``damping`` is not a finite number ≥ 0.

    Examples:
        >>> import torch
        >>> from hypergrad.operators import Damped, Matrix
        >>> Damped(Matrix(torch.zeros(2, 2)), 0.5).dense()
        tensor([[0.5000, 0.0000],
                [0.0000, 0.5000]], dtype=torch.float64)
    """

    def __init__(self, operator: LinearOperator, damping: float) -> None:
        check_number(damping, "damping", at_least=0.0)
        super().__init__(operator)
        self._damping = damping

    @property
    def lower_bound(self) -> float:
        return self._operator.lower_bound + self._damping

    def matvec(self, vector: Tree) -> Tree:
        return tr.add(self._operator.matvec(vector), vector, self._damping)

    def rmatvec(self, vector: Tree) -> Tree:
        return tr.add(self._operator.rmatvec(vector), vector, self._damping)

    def multiply_chunk(self, block: Tree) -> Tree:
        return tr.add(self._operator.multiply_chunk(block), block, self._damping)


class Transposed(WrappedOperator):
    """The map ``v ↦ Aᵀ v`` of an operator A."""

    @property
    def lower_bound(self) -> float:
        return self._operator.lower_bound

    def matvec(self, vector: Tree) -> Tree:
        return self._operator.rmatvec(vector)

    def rmatvec(self, vector: Tree) -> Tree:
        return self._operator.matvec(vector)

    def multiply_chunk(self, block: Tree) -> Tree:
        if self.symmetric:
            return self._operator.multiply_chunk(block)
        return one_by_one(self, block)


class Matrix(LinearOperator):
    """The map ``v ↦ M v`` of a dense matrix, for tests and for small systems at hand.

    Args:
        matrix: shape ``(n, n)``.
        like: a vector of n elements in any structure; the default is one flat tensor.
        lower_bound: of the eigenvalues, if known.

    Raises:
        TypeError: a leaf of ``like`` is no floating-point tensor.
        ValueError: ``matrix`` is not ``(n, n)``.

    Examples:
        >>> import torch
        >>> from hypergrad.operators import Matrix
        >>> Matrix(torch.tensor([[2.0, 1.0], [1.0, 3.0]])).matvec(torch.tensor([1.0, 0.0]))
        tensor([2., 1.])
    """

    def __init__(
        self, matrix: Tensor, like: Tree | None = None, *, lower_bound: float = -math.inf
    ) -> None:
        check_tree(matrix, "matrix")
        if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
            raise ValueError(f"matrix must have shape (n, n), got {tuple(matrix.shape)}")
        self._like = matrix.new_zeros(len(matrix)) if like is None else like
        check_tree(self._like, "like")
        if bl.to_flat(self._like).numel() != len(matrix):
            raise ValueError(
                f"like must have n = {len(matrix)} elements, got {bl.to_flat(self._like).numel()}"
            )
        self._matrix = matrix
        self._lower_bound = lower_bound
        rounding = 10 * torch.finfo(matrix.dtype).eps
        self._symmetric = bool((matrix - matrix.T).abs().max() <= rounding * matrix.abs().max())

    @property
    def like(self) -> Tree:
        return self._like

    @property
    def symmetric(self) -> bool:
        return self._symmetric

    @property
    def lower_bound(self) -> float:
        return self._lower_bound

    @property
    def default_chunk_size(self) -> int:
        return len(self._matrix)

    def matvec(self, vector: Tree) -> Tree:
        product = self._matrix @ bl.to_flat(vector).to(self._matrix)
        return bl.from_flat(product, vector)

    def rmatvec(self, vector: Tree) -> Tree:
        product = self._matrix.T @ bl.to_flat(vector).to(self._matrix)
        return bl.from_flat(product, vector)

    def multiply_chunk(self, block: Tree) -> Tree:
        products = bl.to_matrix(block).to(self._matrix) @ self._matrix.T
        like = bl.pick(block, 0)
        return bl.stack([bl.from_flat(row, like) for row in products])
