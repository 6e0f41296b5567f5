"""The Nyström approximation as a preconditioner (Frangella, Tropp & Udell 2023)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from hypergrad import tree as tr
from hypergrad._checks import check_number
from hypergrad._saving import check_keys, from_leaves
from hypergrad.linsolve.nystrom.probes import Coordinates, Gaussian, Orthonormal, Probes
from hypergrad.linsolve.nystrom.sketch import Sketch, StoredBasis
from hypergrad.linsolve.nystrom.solver import TESTS, Rank, Test, check_sketch_options, draw_sketch
from hypergrad.linsolve.preconditioner import Preconditioner, Refresh
from hypergrad.operators.base import LinearOperator
from hypergrad.tree import Tree


class NystromPreconditioner(Preconditioner):
    """``M = τ U |Λ|⁻¹ Uᵀ + (I − U Uᵀ)`` from a Nyström sketch (Frangella, Tropp & Udell 2023).

    It brings the k largest eigenvalues of A down to the smallest of them, τ. The iterations of CG
    and MINRES are then those for a condition number of about ``λ_k / λ_min``. It is worth its k
    products where the spectrum decays fast or many solves use the sketch.

    Args:
        rank: k; at most n is used. ``"auto"`` doubles it from 8 until ``max_rank`` or until the
            smallest eigenvalue of the sketch is small enough: at most ``tolerance`` of the largest,
            or 10 times the operator's known lower bound (such as its damping).
        test: ``"gaussian"``, ``"orthonormal"`` or ``"coordinates"``, see :class:`Nystrom`.
        tolerance: for ``rank="auto"``.
        max_rank: for ``rank="auto"``.
        chunk_size: how many vectors are in memory at once, see :class:`Nystrom`; ``None`` keeps all
            k. In chunks each use costs two products with the operator of the sketch, so every solve
            rebuilds the sketch.
        generator: for the test matrix; it, ``refresh`` and ``growth`` are those of
            :class:`Preconditioner`.
        refresh: when to rebuild the sketch.
        growth: for ``refresh="auto"``.

    Examples:
        >>> import torch, hypergrad as hg
        >>> A = hg.operators.Matrix(torch.diag(torch.logspace(0, 4, 50)))
        >>> b = torch.ones(50)
        >>> preconditioned = hg.CG(preconditioner=hg.NystromPreconditioner(rank=25))
        >>> preconditioned.solve(A, b).iterations < hg.CG().solve(A, b).iterations
        True
    """

    needs_symmetric: ClassVar[bool] = True

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
        # In chunks the map would keep the operator, and so the graph, of an earlier solve.
        super().__init__(
            generator=generator, refresh=refresh if chunk_size is None else "always", growth=growth
        )
        check_sketch_options(rank, test, max_rank, chunk_size, generator)
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
        made = draw_sketch(
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
            # The solve multiplies by the same operator, and reports what is not finite.
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
    raise ValueError(f"{name} must hold the vectors of one of {TESTS}, got {state!r}")


def _block_from_leaves(values: Any, width: int, like: Tree, name: str) -> Tree:
    block = tr.map_leaves(lambda leaf: leaf.expand(width, *leaf.shape), tr.at_least_float32(like))
    return from_leaves(values, block, name, f"{width} vectors of the parameters")
