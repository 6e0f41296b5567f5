"""The Nyström approximation ``H_k = C W⁺ Cᵀ ≈ U Λ Uᵀ`` from products with a symmetric operator.

``C = H Ω`` for a test matrix Ω of k vectors and ``W = Ωᵀ C``. The approximation depends only on
the range of Ω, so an orthonormal Ω gives the same one. With the thin singular value decomposition
``C = Q Σ Yᵀ``,

    S = Σ⁻¹ Yᵀ W Y Σ⁻¹ = V diag(s) Vᵀ,   U = Q V,   Λ = diag(1/s)

and by Woodbury ``(H_k + ρI)⁻¹ b = U diag(s / (1 + ρs)) Uᵀ b + (b − U Uᵀ b) / ρ``. This form never
inverts W, and no terms of size 1/ρ cancel. They do in the textbook form, which is equal in exact
arithmetic: ``b/ρ − C (W + CᵀC/ρ)⁻¹ Cᵀ b / ρ²``. Frangella, Tropp & Udell 2023 (Alg. 2.1) add a
shift so that W has a Cholesky factor. Here no shift is needed: directions of C below its rounding
are left out.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from hypergrad import block as bl
from hypergrad import tree as tr
from hypergrad.linsolve.nystrom.probes import Probes
from hypergrad.operators.base import LinearOperator
from hypergrad.tree import Tree

_MAX_PROJECTIONS = 8
_FIRST_RANK = 8


class Basis(ABC):
    """Orthonormal vectors ``U = C T`` that span the range of a sketch."""

    @abstractmethod
    def project(self, vector: Tree) -> Tensor:
        """The coefficients ``Uᵀ v``, float64, shape ``(r,)``."""

    @abstractmethod
    def expand(self, coefficients: Tensor) -> Tree:
        """``U c``."""


@dataclass(frozen=True)
class StoredBasis(Basis):
    """The r vectors of U kept in memory, as one block."""

    block: Tree

    def project(self, vector: Tree) -> Tensor:
        return bl.dots(self.block, vector)

    def expand(self, coefficients: Tensor) -> Tree:
        return bl.combine(self.block, coefficients)


@dataclass(frozen=True)
class ImplicitBasis(Basis):
    """U as a test matrix and a k × r matrix: ``C c = H (Ω c)`` and ``Cᵀ v = Ωᵀ (H v)``.

    Each costs one product with H; no vector is kept.
    """

    operator: LinearOperator
    test: Probes
    transform: Tensor

    def project(self, vector: Tree) -> Tensor:
        product = bl.single(self.operator.matvec(vector))
        return self.transform.T @ self.test.dots(product)[0]

    def expand(self, coefficients: Tensor) -> Tree:
        return self.operator.matvec(self.test.combine(self.transform @ coefficients))


@dataclass(frozen=True)
class Sketch:
    """``H_k = U Λ Uᵀ``: an approximate inverse, a preconditioner, an estimate of the spectrum.

    Attributes:
        basis: U, in memory or by products.
        inverse_eigenvalues: the diagonal of Λ⁻¹, shape ``(r,)``, r ≤ k the numerical rank.
        test: the test matrix Ω.
    """

    basis: Basis
    inverse_eigenvalues: Tensor
    test: Probes

    @property
    def eigenvalues(self) -> Tensor:
        """The eigenvalues Λ of ``H_k`` that are not zero, largest first, shape ``(r,)``."""
        return (1.0 / self.inverse_eigenvalues).sort(descending=True).values

    def inverse(self, vector: Tree, rho: float) -> Tree:
        """``(H_k + ρI)⁻¹ v``."""
        s = self.inverse_eigenvalues
        coefficients = self.basis.project(vector)
        inside = self.basis.expand(coefficients * s / (1.0 + rho * s))
        outside = tr.subtract(vector, self.basis.expand(coefficients))
        # Rounding leaves a part in the span, which would be divided by ρ. So project again while
        # that removes most of it (Parlett 1998, §6.9).
        negligible = tr.epsilon(vector) * rho * tr.norm(inside)
        before, after = tr.norm(vector), tr.norm(outside)
        for _ in range(_MAX_PROJECTIONS):
            if not negligible < after < 0.5 * before:
                break
            outside = tr.subtract(outside, self.basis.expand(self.basis.project(outside)))
            before, after = after, tr.norm(outside)
        return tr.add(inside, outside, 1.0 / rho)

    def precondition(self, vector: Tree) -> Tree:
        """``τ U |Λ|⁻¹ Uᵀ v + (v − U Uᵀ v)``, τ = min|Λ|: symmetric positive definite.

        It brings the top of the spectrum down to τ and leaves the rest (Frangella, Tropp & Udell
        2023, Eq. 1.3). |Λ| keeps it definite where H is not.
        """
        s = self.inverse_eigenvalues.abs()
        if len(s) == 0:
            return vector
        return tr.add(vector, self.basis.expand((s / s.max() - 1.0) * self.basis.project(vector)))


def sketch(
    operator: LinearOperator,
    test: Probes,
    *,
    chunk_size: int | None,
    enough: Callable[[Tensor], bool] | None,
) -> Sketch:
    """Return the Nyström approximation of ``operator`` for the vectors of ``test``.

    Args:
        operator: H, symmetric.
        test: Ω.
        chunk_size: ``None`` keeps all columns, for k products. Else it bounds the vectors in
            memory, for 2 k products, and one more at each use of the basis.
        enough: takes the eigenvalues so far and returns whether the rank suffices. Until then the
            rank is doubled from 8, up to all of Ω. ``None`` takes all of Ω at once.
    """
    make = _Stored(operator) if chunk_size is None else _Implicit(operator, chunk_size)
    rank = len(test) if enough is None else min(_FIRST_RANK, len(test))
    make.extend(test.part(0, rank), test.part(0, rank))
    while True:
        transform, s = _factor(make.core, make.gram, tr.epsilon(operator.like))
        if enough is None or rank == len(test) or enough(1.0 / s):
            return Sketch(make.basis(test.part(0, rank), transform), s, test.part(0, rank))
        larger = min(2 * rank, len(test))
        make.extend(test.part(rank, larger), test.part(0, larger))
        rank = larger


class _Stored:
    """C as one block in memory."""

    def __init__(self, operator: LinearOperator) -> None:
        self._operator = operator
        self._columns: Tree = None

    def extend(self, new: Probes, whole: Probes) -> None:
        step = self._operator.default_chunk_size
        parts = (self._operator.matmat(part) for part in new.blocks(step))
        columns = tr.at_least_float32(bl.assemble(parts, len(new)))
        if self._columns is None:
            self._columns = columns
        else:
            self._columns = bl.assemble(iter([self._columns, columns]), len(whole))
        self.core = whole.dots(self._columns)
        self.gram = bl.gram(self._columns, self._columns)

    def basis(self, test: Probes, transform: Tensor) -> Basis:
        # A bare list of leaves, itself a tree: each leaf is freed as soon as it is replaced.
        leaves = [*tr.leaves(self._columns)]
        self._columns = None
        _recombine(leaves, transform.T)
        # The Gram matrix squares the condition number. A second pass makes U orthonormal.
        again = bl.gram(leaves, leaves)
        if torch.isfinite(again).all():
            _recombine(leaves, _inverse_root(again))
        return StoredBasis(tr.unflatten_like(self._operator.like, leaves))


class _Implicit:
    """C by products: ``CᵀC = Ωᵀ (H C)`` by symmetry, so a chunk needs one product more."""

    def __init__(self, operator: LinearOperator, chunk_size: int) -> None:
        self._operator = operator
        self._chunk_size = chunk_size
        self.core = self.gram = torch.zeros(0, 0)

    def extend(self, new: Probes, whole: Probes) -> None:
        core, gram = [], []
        at_once = min(self._chunk_size, self._operator.default_chunk_size)
        for part in new.blocks(self._chunk_size):
            columns = self._operator.matmat(part, chunk_size=at_once)
            core.append(whole.dots(columns))
            gram.append(whole.dots(self._operator.matmat(columns, chunk_size=at_once)))
            del columns
        self.core = _bordered(self.core, torch.cat(core))
        self.gram = _bordered(self.gram, torch.cat(gram))

    def basis(self, test: Probes, transform: Tensor) -> Basis:
        return ImplicitBasis(self._operator, test, transform)


def _bordered(corner: Tensor, rows: Tensor) -> Tensor:
    """The symmetric matrix whose last rows are ``rows`` and whose first block is ``corner``."""
    old = len(corner)
    whole = rows.new_zeros(rows.shape[1], rows.shape[1])
    whole[:old, :old] = corner
    whole[old:] = rows
    whole[:old, old:] = rows[:, :old].T
    return whole


def _recombine(leaves: list[Tensor], matrix: Tensor) -> None:
    """Replace the k vectors in ``leaves`` by r combinations, ``matrix`` of shape ``(r, k)``."""
    for i, leaf in enumerate(leaves):
        leaves[i] = bl.combine(leaf, matrix)


def _factor(core: Tensor, gram: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """``T = Y Σ⁻¹ V``, shape ``(k, r)``, and s, shape ``(r,)``; null directions of C left out."""
    k = len(core)
    if not torch.isfinite(gram).all():
        # LAPACK has no eigenvalues of NaN. The answer is NaN then, and the solve reports it.
        return torch.full_like(core, torch.nan), torch.full_like(core[0], torch.nan)
    squares, Y = torch.linalg.eigh((gram + gram.T) / 2)
    # Singular values of C below its rounding, or that of its Gram matrix, mean nothing. The cut is
    # there and not at the eigenvalues of W because of half precision: with W whitened first, the
    # error of a bfloat16 sketch was 0.5 where it is now below 0.1.
    cutoff = k * max(epsilon**2, torch.finfo(gram.dtype).eps)
    kept = squares > cutoff * squares[-1]
    whiten = Y[:, kept] / squares[kept].sqrt()
    s, V = torch.linalg.eigh(whiten.T @ ((core + core.T) / 2) @ whiten)
    return whiten @ V, s


def _inverse_root(gram: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh((gram + gram.T) / 2)
    return (vectors / values.sqrt()) @ vectors.T
