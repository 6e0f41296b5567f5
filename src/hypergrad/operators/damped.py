"""Damping: ``A + λ I``."""

from __future__ import annotations

from hypergrad import tree as tr
from hypergrad.checks import check_number
from hypergrad.operators.base import LinearOperator, WrappedOperator
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
