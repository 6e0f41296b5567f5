"""The transpose of a map."""

from __future__ import annotations

from hypergrad.operators.base import WrappedOperator, one_by_one
from hypergrad.tree import Tree


class Transposed(WrappedOperator):
    """The map ``v ↦ Aᵀ v``.

    Args:
        operator: A.
    """

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
