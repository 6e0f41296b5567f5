"""Block conjugate gradient, for several right-hand sides with one operator."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.linalg import LinAlgError  # type: ignore[attr-defined]

from hypergrad import block as bl
from hypergrad import tree as tr
from hypergrad._checks import check_count, check_number, check_structure, check_tree
from hypergrad.linsolve.base import Counted, LinearSolver, Outcome, Status
from hypergrad.operators.base import LinearOperator
from hypergrad.tree import Tree


@dataclass(frozen=True)
class BlockSolution:
    """The receipt of a block of solves ``A X = B``.

    Attributes:
        x: the answers, a block like B.
        status: how the solve ended; ``CONVERGED`` if every column converged.
        iterations: how many the solve took.
        matvecs: how many products with A; a block of k vectors counts k.
        relative_residuals: ``‖b_i − A x_i‖ / ‖b_i‖``, measured, shape ``(k,)``.
    """

    x: Tree
    status: Status
    iterations: int
    matvecs: int
    relative_residuals: Tensor


@dataclass(frozen=True)
class BlockCG(LinearSolver):
    """Conjugate gradient in the space that all right-hand sides span together (O'Leary 1980).

    Each column has its least error in the sum of all Krylov spaces. So k systems take fewer
    iterations together than one does alone, and the products come in blocks. The residuals are
    kept orthonormal (Dubrulle 2001, Alg. BCGrQ). Directions that vanish, because columns depend on
    each other or have converged, are dropped.

    Args:
        rtol: relative tolerance, for the measured residual of each column.
        maxiter: the most iterations; ``None`` is 10 n. Each costs one product per column.
        chunk_size: the most vectors per product; ``None`` is the operator's choice.

    Examples:
        >>> import torch, hypergrad as hg
        >>> A = hg.operators.Matrix(torch.diag(torch.tensor([1.0, 2.0, 4.0])))
        >>> hg.BlockCG().solve_block(A, torch.eye(3)).x
        tensor([[1.0000, 0.0000, 0.0000],
                [0.0000, 0.5000, 0.0000],
                [0.0000, 0.0000, 0.2500]])
    """

    needs_symmetric: ClassVar[bool] = True

    rtol: float = 1e-5
    maxiter: int | None = None
    chunk_size: int | None = None

    def __post_init__(self) -> None:
        check_number(self.rtol, "rtol", at_least=0.0)
        check_count(self.maxiter, "maxiter", optional=True)
        check_count(self.chunk_size, "chunk_size", optional=True)

    def solve_block(self, operator: LinearOperator, rhs: Tree) -> BlockSolution:
        """Solve ``A x_i = b_i`` for all vectors of a block.

        Args:
            operator: A, symmetric positive definite.
            rhs: B, a tree like ``operator.like`` with a leading dimension k on every leaf.
        """
        check_tree(rhs, "rhs")
        check_structure(rhs, operator.like, "rhs", "the operator's vectors", leading=1)
        B = tr.at_least_float32(tr.detach(rhs))
        norms = bl.norms(B)
        zero = tr.zeros_like(B)
        if not operator.symmetric:
            return BlockSolution(zero, Status.NOT_SYMMETRIC, 0, 0, torch.ones_like(norms))
        if not torch.isfinite(norms).all():
            return BlockSolution(zero, Status.NON_FINITE, 0, 0, torch.full_like(norms, math.nan))
        scales = torch.where(norms > 0, norms, 1.0)
        counted = Counted(operator)
        try:
            X, status, iterations, residuals = self._solve(counted, bl.scale_rows(B, 1.0 / scales))
        except LinAlgError:
            # Products overflow, as in LinearSolver.solve.
            X, status, iterations, residuals = zero, Status.NON_FINITE, 0, torch.ones_like(norms)
        X = bl.scale_rows(X, scales)
        if not tr.is_finite(X):
            X, status = zero, Status.NON_FINITE
        return BlockSolution(X, status, iterations, counted.matvecs, residuals)

    @property
    def gains_from_x0(self) -> bool:
        return True

    def solve_scaled(self, operator: LinearOperator, rhs: Tree, rhs_scale: float) -> Outcome:
        X, status, iterations, residuals = self._solve(operator, bl.stack([rhs]))
        (x,) = bl.unstack(X)
        return Outcome(x, status, iterations, float(residuals[0]))

    def _solve(self, operator: LinearOperator, B: Tree) -> tuple[Tree, Status, int, Tensor]:
        """X, status, iterations and relative residuals, for columns of norm 1 or 0."""
        maxiter = self.maxiter or 10 * tr.size(operator.like)
        X, R = tr.zeros_like(B), B
        norms = previous = bl.norms(B)
        iterations = 0
        while bool((norms > self.rtol).any()):
            if iterations >= maxiter:
                return X, Status.MAX_ITERATIONS, iterations, norms
            correction, status, done = self._cycle(operator, R, maxiter - iterations)
            iterations += done
            candidate = tr.add(X, correction)
            R_new = tr.subtract(B, operator.matmat(candidate, chunk_size=self.chunk_size))
            measured = bl.norms(R_new)
            if not torch.isfinite(measured).all():
                return X, Status.NON_FINITE, iterations, norms
            if float(measured.max()) < float(norms.max()):
                X, R, norms = candidate, R_new, measured
            if bool((norms <= self.rtol).all()):
                break
            if status is not None:
                return X, status, iterations, norms
            # A cycle that did not halve the residual shows rounding, as in RefinedSolver.
            if float(measured.max()) > 0.5 * float(previous.max()) and iterations < maxiter:
                return X, Status.STAGNATED, iterations, norms
            previous = measured
        return X, Status.CONVERGED, iterations, norms

    # The letters of Dubrulle's BCGrQ. With rows for vectors, as blocks are stored, R = C Q with an
    # orthonormal block Q; S holds the directions.
    def _cycle(
        self, operator: LinearOperator, R: Tree, maxiter: int
    ) -> tuple[Tree, Status | None, int]:
        epsilon = tr.epsilon(R)
        X = tr.zeros_like(R)
        Q, C = bl.orthonormal(R, epsilon)
        S = Q
        largest = 0.0
        for iteration in range(maxiter):
            AS = operator.matmat(S, chunk_size=self.chunk_size)
            curvature = bl.gram(S, AS)
            if not torch.isfinite(curvature).all():
                return X, Status.NON_FINITE, iteration
            curvature = (curvature + curvature.T) / 2
            gram = bl.gram(S, S)
            smallest = float(torch.linalg.eigvalsh(_normalised(curvature, gram))[0])
            largest = max(largest, float((curvature.diagonal() / gram.diagonal()).max()))
            if smallest <= epsilon * largest:
                negative = smallest < -epsilon * largest and operator.lower_bound < 0.0
                status = Status.NEGATIVE_CURVATURE if negative else Status.BREAKDOWN
                return X, status, iteration
            inverse = torch.linalg.inv(curvature)
            tr.add_(X, bl.combine(S, C @ inverse))
            Q, zeta = bl.orthonormal(tr.subtract(Q, bl.combine(AS, inverse)), epsilon)
            C = C @ zeta
            residuals = torch.linalg.vector_norm(C, dim=1)
            if bool((residuals <= self.rtol).all()) or bl.width(Q) == 0:
                return X, None, iteration + 1
            S = tr.add(Q, bl.combine(S, zeta.T))
        return X, None, maxiter


def _normalised(curvature: Tensor, gram: Tensor) -> Tensor:
    """``G^{-1/2} K G^{-1/2}``: its eigenvalues are Rayleigh quotients of A."""
    values, vectors = torch.linalg.eigh((gram + gram.T) / 2)
    root = vectors / values.clamp(min=torch.finfo(values.dtype).tiny).sqrt()
    return root.T @ curvature @ root
