"""The contract of every linear map on trees."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator

import torch
from torch import Tensor

from hypergrad import block as bl
from hypergrad import tree as tr
from hypergrad._checks import check_count, check_structure
from hypergrad.tree import Tree


class LinearOperator(ABC):
    """A square linear map ``v ↦ A v`` on vectors with the structure of ``like``.

    A vector may come in a wider dtype than ``like``; the product comes back in the vector's dtype.
    A *block* is k vectors at once: the same tree with a leading dimension k on every leaf.

    A new one needs :attr:`like` and :meth:`matvec`; all else has a default.
    """

    @property
    @abstractmethod
    def like(self) -> Tree:
        """A vector of the space: the structure, shapes, dtypes and devices that A works on."""

    @abstractmethod
    def matvec(self, vector: Tree) -> Tree:
        """``A v``."""

    def rmatvec(self, vector: Tree) -> Tree:
        """``Aᵀ v``; a ``TypeError`` if A is not symmetric and its class has no such product."""
        if not self.symmetric:
            raise TypeError(
                f"{type(self).__name__} must have a method rmatvec for products with its transpose"
            )
        return self.matvec(vector)

    @property
    def symmetric(self) -> bool:
        """Whether A is known to equal its transpose."""
        return False

    @property
    def lower_bound(self) -> float:
        """A lower bound of the eigenvalues of a symmetric A; ``-inf`` where none is known.

        0 marks A as positive semi-definite. A bound above 0 makes error bounds certain.
        """
        return -math.inf

    @property
    def default_chunk_size(self) -> int:
        """How many vectors of a block :meth:`matmat` multiplies at once by default."""
        return 1

    def multiply_chunk(self, block: Tree) -> Tree:
        """``A V`` for all vectors of ``block`` at once; :meth:`matmat` bounds their number."""
        return one_by_one(self, block)

    def matmat(self, block: Tree, *, chunk_size: int | None = None) -> Tree:
        """``A V`` for a block of k vectors.

        Args:
            block: a tree like ``like`` with a leading dimension k on every leaf.
            chunk_size: the most vectors per product; ``None`` is ``default_chunk_size``. More is
                faster where launching kernels costs more than running them, and takes memory for
                the intermediate results of all of them.

        Raises:
            ValueError: ``block`` has another structure or shape, or ``chunk_size`` is below 1.
        """
        check_count(chunk_size, "chunk_size", optional=True)
        check_structure(block, self.like, "block", "the operator's vectors", leading=1)
        step = chunk_size or self.default_chunk_size
        return bl.assemble(map(self.multiply_chunk, bl.chunks(block, step)), bl.width(block))

    def columns(self, indices: Tensor, *, chunk_size: int | None = None) -> Iterator[Tree]:
        """The columns ``A e_i`` at coordinates ``indices``, in blocks of ``chunk_size``."""
        for part in indices.split(chunk_size or self.default_chunk_size):
            yield self.matmat(bl.unit_vectors(self.like, part), chunk_size=chunk_size)

    def diagonal(self, *, chunk_size: int | None = None) -> Tree:
        """The exact diagonal of A, from n products; for small problems and tests."""
        every = torch.arange(tr.size(self.like))
        entries = [
            bl.gather(columns, part).diagonal()
            for part, columns in zip(
                every.split(chunk_size or self.default_chunk_size),
                self.columns(every, chunk_size=chunk_size),
                strict=True,
            )
        ]
        return bl.from_flat(torch.cat(entries), self.like)

    def dense(self, *, chunk_size: int | None = None) -> Tensor:
        """A as a float64 ``(n, n)`` matrix, from n products; for small problems and tests."""
        every = torch.arange(tr.size(self.like))
        columns = [bl.to_matrix(part) for part in self.columns(every, chunk_size=chunk_size)]
        return torch.cat(columns).T.contiguous()


class SymmetricOperator(LinearOperator):
    """A map that is its own transpose."""

    @property
    def symmetric(self) -> bool:
        return True


class WrappedOperator(LinearOperator):
    """A map made from another on the same space."""

    def __init__(self, operator: LinearOperator) -> None:
        self._operator = operator

    @property
    def like(self) -> Tree:
        return self._operator.like

    @property
    def symmetric(self) -> bool:
        return self._operator.symmetric

    @property
    def default_chunk_size(self) -> int:
        return self._operator.default_chunk_size


def one_by_one(operator: LinearOperator, block: Tree) -> Tree:
    """``A V`` vector by vector, for operators that gain nothing from a batch."""
    return bl.stack([operator.matvec(vector) for vector in bl.unstack(block)])
