"""The Nyström approximation ``H_k = C W⁺ Cᵀ ≈ U Λ Uᵀ`` from columns of a symmetric operator.

C holds the columns of H at k coordinates and W the rows of C there. With the thin singular value
decomposition ``C = Q Σ Yᵀ`` of the columns,

    S = Σ⁻¹ Yᵀ W Y Σ⁻¹ = V diag(s) Vᵀ,   U = Q V,   Λ = diag(1/s)

and by Woodbury ``(H_k + ρI)⁻¹ b = U diag(s / (1 + ρs)) Uᵀ b + (b − U Uᵀ b) / ρ``. In this form W is
never inverted and nothing of size 1/ρ cancels against its like, unlike in the textbook one,
``b/ρ − C (W + CᵀC/ρ)⁻¹ Cᵀ b / ρ²``, which is the same number in exact arithmetic.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from hypergrad import block as bl
from hypergrad import tree as tr
from hypergrad.operators.base import LinearOperator
from hypergrad.tree import Tree


class Basis(ABC):
    """Orthonormal vectors ``U = C T`` that span the columns of a sketch."""

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
    """U kept as coordinates and a k × r matrix: ``C c = H (Σ c_i e_i)`` and ``Cᵀv = (H v)[K]``.

    One product with H each, and memory for no vector at all.
    """

    operator: LinearOperator
    indices: Tensor
    transform: Tensor

    def project(self, vector: Tree) -> Tensor:
        product = tr.map_leaves(lambda leaf: leaf.unsqueeze(0), self.operator.matvec(vector))
        return self.transform.T @ bl.gather(product, self.indices)[0]

    def expand(self, coefficients: Tensor) -> Tree:
        like = tr.at_least_float32(tr.detach(self.operator.like))
        return self.operator.matvec(bl.scatter(like, self.indices, self.transform @ coefficients))


def stored_factors(operator: LinearOperator, indices: Tensor) -> tuple[Basis, Tensor]:
    """U in memory, and s; k products."""
    columns = bl.assemble(operator.columns(indices), len(indices))
    # A bare list of leaves, itself a tree, so that each can be let go as soon as it is replaced.
    leaves = tr.leaves(tr.at_least_float32(columns))
    del columns
    core = bl.gather(leaves, indices)
    transform, s = _factor(core, bl.gram(leaves, leaves), tr.epsilon(operator.like))
    _recombine(leaves, transform.T)
    # The Gram matrix squares the condition number; one more pass makes U orthonormal to rounding.
    again = bl.gram(leaves, leaves)
    if torch.isfinite(again).all():
        _recombine(leaves, _inverse_root(again))
    return StoredBasis(tr.unflatten_like(operator.like, leaves)), s


def implicit_factors(
    operator: LinearOperator, indices: Tensor, chunk_size: int
) -> tuple[Basis, Tensor]:
    """U by products, and s; 2 k products, with at most ``chunk_size`` vectors of a kind in memory.

    ``CᵀC = (H C)[K]`` by symmetry, so that a chunk of columns needs only one product of its own.
    """
    core, gram = [], []
    at_once = min(chunk_size, operator.default_chunk_size)
    for part in indices.split(chunk_size):
        columns = bl.assemble(operator.columns(part, chunk_size=at_once), len(part))
        core.append(bl.gather(columns, indices))
        gram.append(bl.gather(operator.matmat(columns, chunk_size=at_once), indices))
        del columns
    transform, s = _factor(torch.cat(core), torch.cat(gram), tr.epsilon(operator.like))
    return ImplicitBasis(operator, indices, transform), s


def _recombine(leaves: list[Tensor], matrix: Tensor) -> None:
    """Replace the k vectors in ``leaves`` by r combinations, ``matrix`` of shape ``(r, k)``."""
    for i, leaf in enumerate(leaves):
        leaves[i] = bl.combine(leaf, matrix)


def _factor(core: Tensor, gram: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """``T = Y Σ⁻¹ V``, shape ``(k, r)``, and s, shape ``(r,)``; null directions of C left out."""
    k = len(core)
    if not torch.isfinite(gram).all():
        # No eigenvalues of NaN: let them through to the answer, where they are reported.
        return torch.full_like(core, torch.nan), torch.full_like(core[0], torch.nan)
    squares, Y = torch.linalg.eigh((gram + gram.T) / 2)
    # Singular values of C below its own rounding (or that of its Gram matrix) mean nothing. To cut
    # there, and not at the eigenvalues of W, is what keeps half precision usable: with W whitened
    # first the error of a bfloat16 sketch was 0.5 where it is below 0.1 so.
    cutoff = k * max(epsilon**2, torch.finfo(gram.dtype).eps)
    kept = squares > cutoff * squares[-1]
    whiten = Y[:, kept] / squares[kept].sqrt()
    s, V = torch.linalg.eigh(whiten.T @ ((core + core.T) / 2) @ whiten)
    return whiten @ V, s


def _inverse_root(gram: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh((gram + gram.T) / 2)
    return (vectors / values.sqrt()) @ vectors.T
