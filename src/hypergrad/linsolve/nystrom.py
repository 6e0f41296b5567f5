"""The Nyström approximation of the inverse (Hataya & Yamada 2023)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from hypergrad import tree as tr
from hypergrad.checks import check_count, check_number
from hypergrad.linsolve.base import LinearSolver, Outcome, residual_norm
from hypergrad.linsolve.sketch import Basis, implicit_factors, stored_factors
from hypergrad.linsolve.solution import Status
from hypergrad.operators.base import LinearOperator
from hypergrad.tree import Tree

_MAX_PROJECTIONS = 8


@dataclass(frozen=True)
class Nystrom(LinearSolver):
    """``A⁻¹ b ≈ (H_k + ρI)⁻¹ b``, ``H_k = C W⁺ Cᵀ`` (Hataya & Yamada 2023).

    C holds the columns of A at ``rank`` coordinates drawn uniformly without replacement, W the
    rows of C at the same coordinates. At full rank it is the exact ``(A + ρI)⁻¹ b``, but for
    directions in which C is below about 1e-8 (1e-7 in float32) of its norm: they count as zero.

    Args:
        rank: k, from 1 to the number n of parameters. Costs k products, and memory for k vectors.
        rho: ρ > 0. What is not in the sketch is divided by it.
        chunk_size: at most this many vectors are multiplied at once and in memory at any time,
            whatever the rank. Costs 2 k products, and 3 or more for each right-hand side. ``None``:
            all k columns are kept.
        generator: for the coordinates. ``None`` draws from PyTorch's default CPU generator, as
            PyTorch's own random functions do.
        measure_residual: whether to spend one product to report the residual.

    Raises:
        TypeError, ValueError: an option is out of its range; in ``solve``, ``rank`` exceeds n or
            the operator is not symmetric.

    Example:
        >>> import torch, hypergrad as hg
        >>> A = hg.operators.Matrix(torch.diag(torch.tensor([1.0, 2.0, 4.0])))
        >>> hg.Nystrom(rank=3, rho=1e-6).solve(A, torch.ones(3)).x
        tensor([1.0000, 0.5000, 0.2500])
    """

    rank: int = 5
    rho: float = 0.1
    chunk_size: int | None = None
    generator: torch.Generator | None = None
    measure_residual: bool = False

    def __post_init__(self) -> None:
        check_count(self.rank, "rank")
        check_number(self.rho, "rho", above=0.0)
        check_count(self.chunk_size, "chunk_size", optional=True)
        if self.generator is not None and not isinstance(self.generator, torch.Generator):
            raise TypeError(
                f"generator must be a torch.Generator or None, got {type(self.generator).__name__}"
            )

    def sketch(self, operator: LinearOperator) -> NystromSketch:
        """The sketch of ``operator``, to be kept for many right-hand sides."""
        n = tr.size(operator.like)
        if self.rank > n:
            raise ValueError(
                f"rank must be at most the number of parameters, got rank={self.rank} for n={n}"
            )
        if not operator.symmetric:
            raise ValueError("operator must be symmetric for Nystrom, got one that is not")
        indices = _draw_coordinates(n, self.rank, self.generator)
        if self.chunk_size is None:
            basis, inverses = stored_factors(operator, indices)
        else:
            basis, inverses = implicit_factors(operator, indices, self.chunk_size)
        return NystromSketch(basis, inverses, self.rho, indices, self.measure_residual)

    def solve_scaled(self, operator: LinearOperator, rhs: Tree, rhs_scale: float) -> Outcome:
        return self.sketch(operator).solve_scaled(operator, rhs, rhs_scale)


def _draw_coordinates(n: int, k: int, generator: torch.Generator | None) -> Tensor:
    """A uniformly random k-subset of 0 … n−1, sorted, by Floyd's method: no array of size n."""
    last = torch.arange(n - k, n)
    device = "cpu" if generator is None else generator.device
    uniform = torch.rand(k, dtype=torch.float64, generator=generator, device=device).cpu()
    chosen: set[int] = set()
    for candidate, fallback in zip(
        (uniform * (last + 1)).long().tolist(), last.tolist(), strict=True
    ):
        chosen.add(fallback if candidate in chosen else candidate)
    return torch.tensor(sorted(chosen))


@dataclass(frozen=True)
class NystromSketch(LinearSolver):
    """A Nyström approximation ``H_k ≈ U Λ Uᵀ`` that was computed once, as a solver of its own.

    Its ``solve`` takes any right-hand side; the operator given there only measures the residual, if
    asked. :meth:`apply` is the plain map ``b ↦ (H_k + ρI)⁻¹ b``, for a preconditioner.

    Attributes:
        basis: U, in memory or by products.
        inverse_eigenvalues: the diagonal of Λ⁻¹, shape ``(r,)``, r ≤ k the numerical rank.
        rho: ρ.
        indices: the coordinates of the columns, shape ``(k,)``.
        measure_residual: whether ``solve`` spends one product to report the residual.
    """

    basis: Basis
    inverse_eigenvalues: Tensor
    rho: float
    indices: Tensor
    measure_residual: bool = False

    @property
    def eigenvalues(self) -> Tensor:
        """The eigenvalues Λ of ``H_k`` that are not zero, shape ``(r,)``."""
        return 1.0 / self.inverse_eigenvalues

    def apply(self, vector: Tree) -> Tree:
        """``(H_k + ρI)⁻¹ v``."""
        s = self.inverse_eigenvalues
        coefficients = self.basis.project(vector)
        inside = self.basis.expand(coefficients * s / (1.0 + self.rho * s))
        outside = tr.subtract(vector, self.basis.expand(coefficients))
        # What a projection leaves in the span, for lack of digits, would be divided by ρ: project
        # again while that still takes away most of it (Parlett 1998, §6.9).
        negligible = tr.epsilon(vector) * self.rho * tr.norm(inside)
        before, after = tr.norm(vector), tr.norm(outside)
        for _ in range(_MAX_PROJECTIONS):
            if not negligible < after < 0.5 * before:
                break
            outside = tr.subtract(outside, self.basis.expand(self.basis.project(outside)))
            before, after = after, tr.norm(outside)
        return tr.add(inside, outside, 1.0 / self.rho)

    def solve_scaled(self, operator: LinearOperator, rhs: Tree, rhs_scale: float) -> Outcome:
        x = self.apply(rhs)
        if not math.isfinite(tr.norm(x)):
            # Finite factors: then −ρ is an eigenvalue of H_k, and H_k + ρI singular.
            finite = bool(torch.isfinite(self.inverse_eigenvalues).all())
            status = Status.BREAKDOWN if finite else Status.NON_FINITE
            return Outcome(tr.zeros_like(rhs), status, len(self.indices), None)
        measured = residual_norm(operator, x, rhs) if self.measure_residual else None
        return Outcome(x, Status.APPROXIMATE, len(self.indices), measured)
