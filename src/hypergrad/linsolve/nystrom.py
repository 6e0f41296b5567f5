"""The Nyström approximation of the inverse (Hataya & Yamada 2023), and as a preconditioner."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeAlias

import torch
from torch import Tensor

from hypergrad import tree as tr
from hypergrad.checks import check_choice, check_count, check_number
from hypergrad.linsolve.base import LinearSolver, Outcome, residual_norm
from hypergrad.linsolve.preconditioner import Preconditioner, Refresh
from hypergrad.linsolve.probes import (
    Coordinates,
    Gaussian,
    Orthonormal,
    Probes,
    draw_coordinates,
    draw_gaussian,
    draw_orthonormal,
)
from hypergrad.linsolve.sketch import Sketch, StoredBasis, sketch
from hypergrad.linsolve.solution import Status
from hypergrad.operators.base import LinearOperator
from hypergrad.packing import check_generator, check_keys, from_leaves
from hypergrad.tree import Tree

Test: TypeAlias = Literal["coordinates", "gaussian", "orthonormal"]
Rank: TypeAlias = int | Literal["auto"]
_TESTS = ("coordinates", "gaussian", "orthonormal")


@dataclass(frozen=True)
class Nystrom(LinearSolver):
    """``A⁻¹ b ≈ (H_k + ρI)⁻¹ b``, ``H_k = C W⁺ Cᵀ``, ``C = A Ω`` (Hataya & Yamada 2023).

    Ω holds ``rank`` random unit vectors, so that C holds columns of A, or Gaussian vectors, which
    see all of A in every product. At full rank it is the exact ``(A + ρI)⁻¹ b``, but for directions
    in which C is below about 1e-8 (1e-7 in float32) of its norm: they count as zero.

    Args:
        rank: k, from 1 to the number n of parameters. Costs k products, and memory for k vectors.
            ``"auto"`` doubles it from 8 until the smallest eigenvalue of ``H_k`` is at most ρ in
            magnitude, or ``max_rank`` is reached.
        rho: ρ > 0. What is not in the sketch is divided by it.
        test: ``"coordinates"``, as in 0.0.1, or ``"gaussian"``, nearer to A at the same rank where
            the mass of A is not in few of its columns (Frangella, Tropp & Udell 2023). A rank near
            n is for the others: a square Gaussian matrix is ill-conditioned. ``"orthonormal"`` is
            the same but for rounding, and keeps k vectors more in memory.
        max_rank: the limit for ``rank="auto"``.
        chunk_size: at most this many vectors are multiplied at once and in memory at any time,
            whatever the rank. Costs 2 k products, and 3 or more for each right-hand side. ``None``:
            all k columns are kept.
        generator: for Ω. ``None`` draws from PyTorch's default CPU generator, as PyTorch's own
            random functions do.
        measure_residual: whether to spend one product to report the residual.

    Raises:
        TypeError, ValueError: an option is out of its range; in ``solve``, ``rank`` exceeds n; in
            ``sketch``, also if the operator is not symmetric.

    Example:
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

    def __post_init__(self) -> None:
        check_number(self.rho, "rho", above=0.0)
        _check_sketch_options(self.rank, self.test, self.max_rank, self.chunk_size, self.generator)

    def sketch(self, operator: LinearOperator) -> NystromSketch:
        """The sketch of ``operator``, to be kept for many right-hand sides."""

        def enough(eigenvalues: Tensor) -> bool:
            return bool(eigenvalues.abs().min() <= self.rho) if len(eigenvalues) else True

        made = _draw_sketch(
            operator, self.rank, self.test, self.max_rank, self.chunk_size, self.generator, enough
        )
        return NystromSketch(made, self.rho, self.measure_residual)

    def solve_scaled(self, operator: LinearOperator, rhs: Tree, rhs_scale: float) -> Outcome:
        return self.sketch(operator).solve_scaled(operator, rhs, rhs_scale)


@dataclass(frozen=True)
class NystromSketch(LinearSolver):
    """A Nyström approximation ``H_k = U Λ Uᵀ`` that was computed once, as a solver of its own.

    Its ``solve`` takes any right-hand side; the operator given there only measures the residual, if
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


class NystromPreconditioner(Preconditioner):
    """``M = τ U |Λ|⁻¹ Uᵀ + (I − U Uᵀ)`` from a Nyström sketch (Frangella, Tropp & Udell 2023).

    It brings the k largest eigenvalues of A down to the smallest of them, τ: the iterations of CG
    and MINRES are then those for a condition number of about ``λ_k / λ_min``. Worth its k products
    where the spectrum decays fast or the sketch is kept for many solves.

    Args:
        rank: k; at most n is used. ``"auto"`` doubles it from 8 until the smallest eigenvalue of
            the sketch is at most ``tolerance`` of the largest, or 10 times the operator's known
            lower bound (such as its damping), or ``max_rank`` is reached.
        test: ``"gaussian"``, ``"orthonormal"`` or ``"coordinates"``, see :class:`Nystrom`.
        tolerance: for ``rank="auto"``.
        max_rank: for ``rank="auto"``.
        chunk_size: how many vectors are in memory at once, see :class:`Nystrom`. ``None``: all k.
            In chunks each use costs two products with the operator that the sketch was made of, so
            that it is made anew for every solve.
        generator: for the test matrix; ``None`` is PyTorch's default one.
        refresh: see :class:`Preconditioner`.
        growth: see :class:`Preconditioner`.

    Raises:
        TypeError, ValueError: an option is out of its range.

    Example:
        >>> import torch, hypergrad as hg
        >>> A = hg.operators.Matrix(torch.diag(torch.logspace(0, 4, 50)))
        >>> b = torch.ones(50)
        >>> preconditioned = hg.CG(preconditioner=hg.NystromPreconditioner(rank=25))
        >>> preconditioned.solve(A, b).iterations < hg.CG().solve(A, b).iterations
        True
    """

    def __init__(
        self,
        rank: Rank = 25,
        *,
        test: Test = "gaussian",
        tolerance: float = 1e-2,
        max_rank: int = 128,
        chunk_size: int | None = None,
        generator: torch.Generator | None = None,
        refresh: Refresh = "auto",
        growth: float = 1.5,
    ) -> None:
        if chunk_size is not None and refresh == "never":
            raise ValueError("refresh must not be 'never' with a chunk_size: nothing is stored")
        # In chunks the map would hold on to the operator, and to the graph, of an earlier solve.
        super().__init__(
            generator=generator,
            refresh=refresh if chunk_size is None else "always",
            growth=growth,
        )
        _check_sketch_options(rank, test, max_rank, chunk_size, generator)
        check_number(tolerance, "tolerance", above=0.0)
        self._rank = rank
        self._test: Test = test
        self._tolerance = tolerance
        self._max_rank = max_rank
        self._chunk_size = chunk_size
        self._sketch: Sketch | None = None

    @property
    def sketch(self) -> Sketch | None:
        """The sketch in use; ``None`` before the first solve."""
        return self._sketch

    def build(self, operator: LinearOperator) -> Callable[[Tree], Tree]:
        def enough(eigenvalues: Tensor) -> bool:
            magnitudes = eigenvalues.abs()
            if len(magnitudes) == 0:
                return True
            small = max(self._tolerance * float(magnitudes.max()), 10 * operator.lower_bound)
            return float(magnitudes.min()) <= small

        n = tr.size(operator.like)
        rank = self._rank if self._rank == "auto" else min(self._rank, n)
        made = _draw_sketch(
            operator, rank, self._test, self._max_rank, self._chunk_size, self._generator, enough
        )
        return self._use(made)

    def map_state(self) -> dict[str, Any] | None:
        made = self._sketch
        if made is None or not isinstance(made.basis, StoredBasis):
            return None
        return {
            "basis": tr.leaves(made.basis.block),
            "inverse_eigenvalues": made.inverse_eigenvalues,
            "test": _test_state(made.test),
        }

    def map_from_state(self, state: dict[str, Any], like: Tree) -> Callable[[Tree], Tree]:
        name = "state['map']"
        check_keys(state, ("basis", "inverse_eigenvalues", "test"), name)
        s = state["inverse_eigenvalues"]
        if not isinstance(s, Tensor) or s.ndim != 1 or not s.is_floating_point():
            raise ValueError(f"{name}['inverse_eigenvalues'] must be a vector, got {s!r}")
        basis = _block_from_leaves(state["basis"], len(s), like, f"{name}['basis']")
        test = _test_from_state(state["test"], like, f"{name}['test']")
        return self._use(Sketch(StoredBasis(basis), s.to(tr.leaves(like)[0].device), test))

    def _use(self, made: Sketch) -> Callable[[Tree], Tree]:
        self._sketch = made
        if not torch.isfinite(made.inverse_eigenvalues).all():
            # The solve meets the same products, and reports them.
            return lambda vector: vector
        return made.precondition


def _test_state(test: Probes) -> dict[str, Any]:
    if isinstance(test, Coordinates):
        return {"coordinates": test.indices}
    if isinstance(test, Gaussian):
        return {"gaussian": list(test.seeds)}
    assert isinstance(test, Orthonormal)
    return {"orthonormal": tr.leaves(test.block)}


def _test_from_state(state: Any, like: Tree, name: str) -> Probes:
    kind, values = next(iter(state.items())) if isinstance(state, dict) and state else ("", state)
    if kind == "coordinates" and isinstance(values, Tensor):
        return Coordinates(like, values.cpu())
    if kind == "gaussian" and isinstance(values, list):
        return Gaussian(like, tuple(values))
    if kind == "orthonormal" and isinstance(values, list) and values:
        width = len(values[0]) if isinstance(values[0], Tensor) else 0
        return Orthonormal(_block_from_leaves(values, width, like, name))
    raise ValueError(f"{name} must hold the vectors of one of {_TESTS}, got {state!r}")


def _block_from_leaves(values: Any, width: int, like: Tree, name: str) -> Tree:
    block = tr.map_leaves(lambda leaf: leaf.expand(width, *leaf.shape), tr.at_least_float32(like))
    return from_leaves(values, block, name, f"{width} vectors of the parameters")


def _draw_sketch(
    operator: LinearOperator,
    rank: Rank,
    test: Test,
    max_rank: int,
    chunk_size: int | None,
    generator: torch.Generator | None,
    enough: Callable[[Tensor], bool],
) -> Sketch:
    n = tr.size(operator.like)
    if rank != "auto" and rank > n:
        raise ValueError(
            f"rank must be at most the number of parameters, got rank={rank} for n={n}"
        )
    if not operator.symmetric:
        raise ValueError("operator must be symmetric for a sketch, got one not known to be")
    count = min(max_rank, n) if rank == "auto" else rank
    probes: Probes
    if test == "coordinates":
        probes = draw_coordinates(operator.like, count, generator, shuffled=rank == "auto")
    elif test == "gaussian":
        probes = draw_gaussian(operator.like, count, generator)
    else:
        probes = draw_orthonormal(operator.like, count, generator)
    return sketch(
        operator, probes, chunk_size=chunk_size, enough=enough if rank == "auto" else None
    )


def _check_sketch_options(
    rank: Rank,
    test: str,
    max_rank: int,
    chunk_size: int | None,
    generator: torch.Generator | None,
) -> None:
    if rank != "auto":
        check_count(rank, "rank")
    check_choice(test, "test", _TESTS)
    check_count(max_rank, "max_rank")
    check_count(chunk_size, "chunk_size", optional=True)
    if test == "orthonormal" and chunk_size is not None:
        raise ValueError(
            "test must not be 'orthonormal' with a chunk_size: its vectors are all in memory; use "
            "'gaussian'"
        )
    check_generator(generator)
