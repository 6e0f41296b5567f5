"""Extreme eigenvalues of a symmetric operator by the Lanczos process (Saad 2011, §6.6)."""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from hypergrad import tree as tr
from hypergrad._checks import check_count, check_number
from hypergrad.operators.base import LinearOperator

# Of an interval as wide as the spectrum.
_BISECTIONS = 40


@dataclass(frozen=True)
class Extremes:
    """Estimates of the two ends of a spectrum.

    Attributes:
        smallest: a Ritz value; except for rounding it is never below the smallest eigenvalue.
        largest: a Ritz value; except for rounding it is never above the largest eigenvalue.
        smallest_error: an eigenvalue lies within this distance of ``smallest``.
        largest_error: an eigenvalue lies within this distance of ``largest``.
        matvecs: how many products the estimate took.
    """

    smallest: float
    largest: float
    smallest_error: float
    largest_error: float
    matvecs: int

    @property
    def magnitude(self) -> float:
        """``max |λ|`` of the two ends."""
        return max(abs(self.smallest), abs(self.largest))


def extreme_eigenvalues(
    operator: LinearOperator,
    *,
    maxiter: int = 30,
    rtol: float = 1e-2,
    generator: torch.Generator | None = None,
) -> Extremes:
    """Estimate the smallest and the largest eigenvalue of a symmetric operator.

    The three-term recurrence keeps two vectors. Without reorthogonalisation, eigenvalues that have
    converged may show up again, which does not move the ends.

    Args:
        operator: A, symmetric.
        maxiter: the most products.
        rtol: stop once both error bounds are below ``rtol max|λ|``.
        generator: for the random start; ``None`` is a fixed one.

    Returns:
        The estimates; NaN where a product was not finite.

    Raises:
        TypeError, ValueError: an option is out of its range, or the operator is not symmetric.

    Examples:
        >>> import torch
        >>> from hypergrad.linsolve import extreme_eigenvalues
        >>> from hypergrad.operators import Matrix
        >>> ends = extreme_eigenvalues(Matrix(torch.diag(torch.tensor([-1.0, 2.0, 5.0]))))
        >>> round(ends.smallest, 3), round(ends.largest, 3)
        (-1.0, 5.0)
    """
    check_count(maxiter, "maxiter")
    check_number(rtol, "rtol", at_least=0.0)
    if not operator.symmetric:
        raise ValueError("operator must be symmetric, got one that is not known to be")
    generator = generator or torch.Generator().manual_seed(0)
    q = tr.at_least_float32(tr.random_normal_like(operator.like, generator))
    q = tr.divide(q, tr.norm(q))
    q_old, beta = tr.zeros_like(q), 0.0
    alphas: list[float] = []
    betas: list[float] = []
    ends = (math.nan, math.nan, math.nan, math.nan)
    for _ in range(min(maxiter, tr.size(q))):
        w = operator.matvec(q)
        alpha = tr.dot(q, w).item()
        tr.add_(w, q, -alpha)
        tr.add_(w, q_old, -beta)
        q_old, beta = q, tr.norm(w)
        if not math.isfinite(beta):
            return Extremes(math.nan, math.nan, math.nan, math.nan, len(alphas) + 1)
        alphas.append(alpha)
        ends = _ritz_ends(alphas, betas, beta)
        magnitude = max(abs(ends[0]), abs(ends[1]))
        if max(ends[2], ends[3]) <= rtol * magnitude or beta <= tr.epsilon(q) * magnitude:
            break
        betas.append(beta)
        q = tr.divide(w, beta)
    return Extremes(ends[0], ends[1], ends[2], ends[3], len(alphas))


def _ritz_ends(
    alphas: list[float], betas: list[float], beta: float
) -> tuple[float, float, float, float]:
    """Both ends of the tridiagonal matrix, and the residual norms of their Ritz pairs."""
    T = torch.diag(torch.tensor(alphas, dtype=torch.float64))
    if betas:
        off = torch.diag(torch.tensor(betas, dtype=torch.float64), 1)
        T = T + off + off.T
    values, vectors = torch.linalg.eigh(T)
    last = (beta * vectors[-1].abs()).tolist()
    return float(values[0]), float(values[-1]), last[0], last[-1]


@dataclass(frozen=True)
class Tridiagonal:
    """``T = Vᵀ A V`` in the orthonormal basis V of a Krylov space, symmetric and tridiagonal."""

    diagonal: Sequence[float]  # k entries
    off: Sequence[float]  # the k − 1 entries next to it

    def ends(self) -> tuple[float, float]:
        """The smallest and the largest Ritz value; both lie within the spectrum of A.

        Found by bisection on the number of negative pivots of ``T − μI`` (Sturm; Golub & Van Loan,
        §8.4).
        """
        padded = (0.0, *self.off, 0.0)
        radii = [abs(a) + abs(b) for a, b in itertools.pairwise(padded)]
        low = min(a - r for a, r in zip(self.diagonal, radii, strict=True))
        high = max(a + r for a, r in zip(self.diagonal, radii, strict=True))
        return self._bisect(low, high, 1), self._bisect(low, high, len(self.diagonal))

    def _bisect(self, low: float, high: float, rank: int) -> float:
        """The eigenvalue that has ``rank − 1`` others below it."""
        for _ in range(_BISECTIONS):
            middle = 0.5 * (low + high)
            if self._below(middle) >= rank:
                high = middle
            else:
                low = middle
        return 0.5 * (low + high)

    def _below(self, mu: float) -> int:
        """The number of eigenvalues below μ."""
        count, pivot = 0, 1.0
        for a, b in zip(self.diagonal, (0.0, *self.off), strict=True):
            pivot = a - mu - b * b / pivot
            count += pivot < 0.0
            pivot = pivot or sys.float_info.min
        return count
