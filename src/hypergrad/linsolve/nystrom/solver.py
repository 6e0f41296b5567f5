"""The Nyström approximation of the inverse (Hataya & Yamada 2023)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal, TypeAlias

import torch
from torch import Tensor

from hypergrad import tree as tr
from hypergrad._checks import check_choice, check_count, check_number
from hypergrad._saving import check_generator
from hypergrad.linsolve.base import LinearSolver, Outcome, Status, residual_norm
from hypergrad.linsolve.nystrom.probes import (
    Coordinates,
    Probes,
    draw_coordinates,
    draw_gaussian,
    draw_orthonormal,
)
from hypergrad.linsolve.nystrom.sketch import Sketch, sketch
from hypergrad.operators.base import LinearOperator
from hypergrad.tree import Tree

Test: TypeAlias = Literal["coordinates", "gaussian", "orthonormal"]
Rank: TypeAlias = int | Literal["auto"]
TESTS = ("coordinates", "gaussian", "orthonormal")


@dataclass(frozen=True)
class Nystrom(LinearSolver):
    """``A⁻¹ b ≈ (H_k + ρI)⁻¹ b``, ``H_k = C W⁺ Cᵀ``, ``C = A Ω`` (Hataya & Yamada 2023).

    Ω holds ``rank`` random unit vectors, so that C holds columns of A, or Gaussian vectors, whose
    products each depend on all of A. At full rank it is the exact ``(A + ρI)⁻¹ b``, except for
    directions in which C is below about 1e-8 (1e-7 in float32) of its norm: they count as zero.

    Args:
        rank: k, from 1 to the number n of parameters. It costs k products, and memory for k
            vectors. ``"auto"`` doubles it from 8 until the smallest eigenvalue of ``H_k`` is at
            most ρ in magnitude, or until ``max_rank``.
        rho: ρ > 0. Directions outside the sketch are divided by it.
        test: ``"coordinates"``, as in 0.0.1; or ``"gaussian"``, which is nearer to A at the same
            rank unless few columns hold most of A (Frangella, Tropp & Udell 2023), but not for a
            rank near n: a square Gaussian matrix is ill-conditioned. ``"orthonormal"`` equals
            ``"gaussian"`` up to rounding, and keeps k more vectors in memory.
        max_rank: the limit for ``rank="auto"``.
        chunk_size: the most vectors per product and in memory, whatever the rank. Chunks cost 2 k
            products, and 3 or more per right-hand side. ``None`` keeps all k columns.
        generator: for Ω. ``None`` draws from PyTorch's default CPU generator.
        measure_residual: whether to spend one product to report the residual.
        columns: the coordinates for Ω, ``rank`` different ones; ``None`` draws them.

    Raises:
        ValueError: in ``solve``, ``rank`` exceeds n; in ``sketch``, also if the operator is not
            symmetric.

    Examples:
        >>> import torch, hypergrad as hg
        >>> A = hg.operators.Matrix(torch.diag(torch.tensor([1.0, 2.0, 4.0])))
        >>> hg.Nystrom(rank=3, rho=1e-6).solve(A, torch.ones(3)).x
        tensor([1.0000, 0.5000, 0.2500])
    """

    needs_symmetric: ClassVar[bool] = True

    rank: Rank = 5
    rho: float = 0.1
    test: Test = "coordinates"
    max_rank: int = 128
    chunk_size: int | None = None
    generator: torch.Generator | None = None
    measure_residual: bool = False
    columns: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        check_number(self.rho, "rho", above=0.0)
        check_sketch_options(self.rank, self.test, self.max_rank, self.chunk_size, self.generator)
        if self.columns is not None and self.test != "coordinates":
            raise ValueError(f"columns must come with test='coordinates', got test={self.test!r}")

    def sketch(self, operator: LinearOperator) -> NystromSketch:
        """Return the sketch of ``operator``, to be kept for many right-hand sides."""

        def enough(eigenvalues: Tensor) -> bool:
            return bool(eigenvalues.abs().min() <= self.rho) if len(eigenvalues) else True

        made = draw_sketch(
            operator,
            self.rank,
            self.test,
            self.max_rank,
            self.chunk_size,
            self.generator,
            enough,
            self.columns,
        )
        return NystromSketch(made, self.rho, self.measure_residual)

    def solve_scaled(self, operator: LinearOperator, rhs: Tree, rhs_scale: float) -> Outcome:
        return self.sketch(operator).solve_scaled(operator, rhs, rhs_scale)


@dataclass(frozen=True)
class NystromSketch(LinearSolver):
    """A Nyström approximation ``H_k = U Λ Uᵀ`` that was computed once, as a solver of its own.

    ``solve`` takes any right-hand side and uses its operator only to measure the residual, if
    asked. :meth:`apply` is the plain map ``b ↦ (H_k + ρI)⁻¹ b``.

    Attributes:
        sketch: ``H_k``.
        rho: ρ.
        measure_residual: whether ``solve`` spends one product to report the residual.
    """

    needs_symmetric: ClassVar[bool] = True

    sketch: Sketch
    rho: float
    measure_residual: bool = False

    @property
    def eigenvalues(self) -> Tensor:
        """The eigenvalues of ``H_k`` that are not zero, largest first, shape ``(r,)``."""
        return self.sketch.eigenvalues

    def apply(self, vector: Tree) -> Tree:
        """``(H_k + ρI)⁻¹ v``."""
        return self.sketch.inverse(vector, self.rho)

    def solve_scaled(self, operator: LinearOperator, rhs: Tree, rhs_scale: float) -> Outcome:
        rank = len(self.sketch.test)
        x = self.apply(rhs)
        if not math.isfinite(tr.norm(x)):
            # Finite factors: then −ρ is an eigenvalue of H_k, and H_k + ρI singular.
            finite = bool(torch.isfinite(self.sketch.inverse_eigenvalues).all())
            status = Status.BREAKDOWN if finite else Status.NON_FINITE
            return Outcome(tr.zeros_like(rhs), status, rank, None)
        measured = residual_norm(operator, x, rhs) if self.measure_residual else None
        return Outcome(x, Status.APPROXIMATE, rank, measured)


def draw_sketch(
    operator: LinearOperator,
    rank: Rank,
    test: Test,
    max_rank: int,
    chunk_size: int | None,
    generator: torch.Generator | None,
    enough: Callable[[Tensor], bool],
    columns: tuple[int, ...] | None = None,
) -> Sketch:
    """Return a sketch of ``operator`` with the test vectors that the options describe.

    It raises ``ValueError`` if ``rank`` exceeds the number of parameters, the operator is not
    symmetric, or ``columns`` are not ``rank`` different coordinates.
    """
    n = tr.size(operator.like)
    if rank != "auto" and rank > n:
        raise ValueError(
            f"rank must be at most the number of parameters, got rank={rank} for n={n}"
        )
    if not operator.symmetric:
        raise ValueError("operator must be symmetric for a sketch, got one not known to be")
    count = min(max_rank, n) if rank == "auto" else rank
    probes: Probes
    if columns is not None:
        if len({c for c in columns if 0 <= c < n}) != count or len(columns) != count:
            raise ValueError(
                f"columns must be rank={rank} different integers from 0 to {n - 1}, got {columns}"
            )
        probes = Coordinates(tr.detach(operator.like), torch.tensor(columns))
    elif test == "coordinates":
        probes = draw_coordinates(operator.like, count, generator, shuffled=rank == "auto")
    elif test == "gaussian":
        probes = draw_gaussian(operator.like, count, generator)
    else:
        probes = draw_orthonormal(operator.like, count, generator)
    return sketch(
        operator, probes, chunk_size=chunk_size, enough=enough if rank == "auto" else None
    )


def check_sketch_options(
    rank: Rank, test: str, max_rank: int, chunk_size: int | None, generator: torch.Generator | None
) -> None:
    """Raise ``TypeError`` or ``ValueError`` unless the options of a sketch make sense."""
    if rank != "auto":
        check_count(rank, "rank")
    check_choice(test, "test", TESTS)
    check_count(max_rank, "max_rank")
    check_count(chunk_size, "chunk_size", optional=True)
    if test == "orthonormal" and chunk_size is not None:
        raise ValueError(
            "test must not be 'orthonormal' with a chunk_size: its vectors are all in memory; use "
            "'gaussian'"
        )
    check_generator(generator)
