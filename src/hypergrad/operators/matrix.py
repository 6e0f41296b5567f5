"""A given dense matrix as an operator on trees."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hypergrad import block as bl
from hypergrad.checks import check_tree
from hypergrad.operators.base import LinearOperator
from hypergrad.tree import Tree


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
