"""Preconditioners: maps ``M ≈ A⁻¹`` that a solver builds, applies and keeps while they help."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, Literal, TypeAlias, get_args

import optree
import torch
from torch import Tensor

from hypergrad import _saving as sv
from hypergrad import tree as tr
from hypergrad._checks import check_choice, check_count, check_number, check_tree, given
from hypergrad.operators.base import LinearOperator
from hypergrad.tree import Tree

Refresh: TypeAlias = Literal["auto", "always", "never"]

# So many iterations beyond the growth factor do not yet rebuild a map: 2 more are noise.
_FEW = 3


class Preconditioner(ABC):
    """Builds a symmetric positive definite ``M ≈ A⁻¹`` for a solver, and keeps it between solves.

    Keep the object (and the solver that holds it) across outer steps to reuse its map. A stale map
    costs iterations, never correctness.

    A new one implements :meth:`build`. It also implements :meth:`map_state` and
    :meth:`map_from_state` if :meth:`state_dict` is to save its map; if not, the first solve after
    :meth:`load_state_dict` rebuilds the map.

    Attributes:
        needs_symmetric: whether ``build`` takes symmetric operators only; solves with another end
            as ``NOT_SYMMETRIC``.

    Args:
        generator: what ``build`` draws from, saved with the map. ``None`` is PyTorch's default
            generator, which the caller saves.
        refresh: when a solve rebuilds the map: ``"always"``, ``"never"``, or ``"auto"``, which is
            after the iterations of a solve exceed ``growth`` times those of the first solve with
            the map. A solve of a system of another structure always rebuilds it.
        growth: for ``"auto"``, ≥ 1.

    Raises:
        TypeError, ValueError: an option is of the wrong type or out of its range.
    """

    needs_symmetric: ClassVar[bool] = False

    def __init__(
        self,
        *,
        generator: torch.Generator | None = None,
        refresh: Refresh = "auto",
        growth: float = 1.5,
    ) -> None:
        sv.check_generator(generator)
        check_choice(refresh, "refresh", get_args(Refresh))
        check_number(growth, "growth", at_least=1.0)
        self._generator = generator
        self._refresh = refresh
        self._growth = growth
        self._map: Callable[[Tree], Tree] | None = None
        self._space: Any = None
        self._first_iterations: int | None = None

    @abstractmethod
    def build(self, operator: LinearOperator) -> Callable[[Tree], Tree]:
        """Return the map ``r ↦ M r`` for ``operator``: linear, symmetric, positive definite."""

    def prepare(self, operator: LinearOperator) -> Callable[[Tree], Tree]:
        """Return the kept map, or a new one where it is time for it."""
        space = _space(operator.like)
        if self._map is None or self._refresh == "always" or space != self._space:
            self._map = self.build(operator)
            self._space = space
            self._first_iterations = None
        return self._map

    def observe(self, iterations: int) -> None:
        """Take note of how many iterations a solve with the map took."""
        if self._first_iterations is None:
            self._first_iterations = iterations
        elif self._refresh == "auto" and (
            iterations > self._growth * self._first_iterations + _FEW
        ):
            self._map = None

    def state_dict(self) -> dict[str, Any]:
        """The map, its record and the generator's state, for :meth:`load_state_dict`.

        It holds dicts, lists, numbers and tensors only, and no map that the next solve would
        rebuild.
        """
        kept = self._map is not None and self._refresh != "always"
        return {
            "first_iterations": self._first_iterations,
            "map": self.map_state() if kept else None,
            "generator": sv.generator_state(self._generator),
        }

    def load_state_dict(self, state: dict[str, Any], like: Tree) -> None:
        """Continue from the preconditioner whose state this is.

        Args:
            state: what :meth:`state_dict` returned.
            like: the parameters of the systems to come. Their structure, shapes, dtypes and devices
                count, not their values. The map's tensors are moved to these devices.

        Raises:
            TypeError, ValueError: ``state`` does not fit ``like`` or a preconditioner of this kind;
                then nothing is changed.
        """
        check_tree(like, "like")
        sv.check_keys(state, ("first_iterations", "map", "generator"), "state")
        sv.check_generator_state(self._generator, state["generator"], "state['generator']")
        saved = state["map"]
        restored = None if saved is None else self.map_from_state(saved, tr.detach(like))
        sv.set_generator_state(self._generator, state["generator"])
        self._map = restored
        self._space = None if restored is None else _space(like)
        self._first_iterations = state["first_iterations"]

    def map_state(self) -> dict[str, Any] | None:
        """The parts of the map that ``build`` made last; ``None`` if it cannot be saved."""
        return None

    def map_from_state(self, state: dict[str, Any], like: Tree) -> Callable[[Tree], Tree]:
        """Return the map that :meth:`map_state` described, for vectors like ``like``.

        Raises:
            ValueError: ``state`` is of another kind or for other vectors; then nothing is changed.
        """
        raise ValueError(
            f"state['map'] must be None for {type(self).__name__}, which saves no map, got "
            f"{type(state).__name__}"
        )


class JacobiPreconditioner(Preconditioner):
    """``M = diag(A)⁻¹``, the diagonal estimated by products with random signs (Hutchinson).

        diag(A) ≈ mean_s z_s ⊙ A z_s,   z_s ∈ {−1, 1}ⁿ

    The noise falls as ``1/√samples`` (Bekas, Kokiopoulou & Saad 2007). Each entry is shrunk towards
    the mean of all entries by the share of their distance that noise explains. Its magnitude is
    kept above a thousandth of the mean. M helps where parameters differ in scale and are coupled
    weakly. On the problems of ``make bench``, which are coupled strongly, even the exact diagonal
    makes CG slower: prefer :class:`NystromPreconditioner` there.

    Args:
        samples: how many products to spend.
        generator: for the signs; it, ``refresh`` and ``growth`` are those of
            :class:`Preconditioner`.
        refresh: when to rebuild the map.
        growth: for ``refresh="auto"``.
    """

    def __init__(
        self,
        samples: int = 10,
        *,
        generator: torch.Generator | None = None,
        refresh: Refresh = "auto",
        growth: float = 1.5,
    ) -> None:
        super().__init__(generator=generator, refresh=refresh, growth=growth)
        check_count(samples, "samples")
        self._samples = samples
        self._diagonal: Tree | None = None

    def build(self, operator: LinearOperator) -> Callable[[Tree], Tree]:
        total = tr.zeros_like(tr.at_least_float32(operator.like))
        squares = tr.zeros_like(total)
        for _ in range(self._samples):
            signs = tr.random_signs_like(total, self._generator)
            sample = tr.map_leaves(torch.mul, signs, operator.matvec(signs))
            tr.add_(total, sample)
            tr.add_(squares, tr.map_leaves(torch.square, sample))
        estimate = tr.divide(total, self._samples)
        mean = sum(float(leaf.sum()) for leaf in tr.leaves(estimate)) / tr.size(estimate)
        if not 0.0 < abs(mean) < torch.inf:
            return self._divide_by(None)

        def shrunk(entry: Tensor, square: Tensor) -> Tensor:
            noise = (square / self._samples - entry.square()).clamp(min=0.0)
            noise = noise / max(self._samples - 1, 1)
            signal = (entry - mean).square()
            trust = torch.where(signal > 0.0, signal / (signal + noise), signal)
            return (mean + trust * (entry - mean)).abs().clamp(min=1e-3 * abs(mean))

        return self._divide_by(tr.map_leaves(shrunk, estimate, squares))

    def map_state(self) -> dict[str, Any]:
        return {"diagonal": None if self._diagonal is None else tr.leaves(self._diagonal)}

    def map_from_state(self, state: dict[str, Any], like: Tree) -> Callable[[Tree], Tree]:
        sv.check_keys(state, ("diagonal",), "state['map']")
        if state["diagonal"] is None:
            return self._divide_by(None)
        wide = tr.at_least_float32(like)
        return self._divide_by(
            sv.from_leaves(state["diagonal"], wide, "state['map']['diagonal']", "like")
        )

    def _divide_by(self, diagonal: Tree | None) -> Callable[[Tree], Tree]:
        self._diagonal = diagonal
        if diagonal is None:
            return lambda vector: vector
        return lambda vector: tr.map_leaves(torch.div, vector, diagonal)


def _space(like: Tree) -> Any:
    leaves, structure = optree.tree_flatten(like)
    return structure, [(leaf.shape, leaf.dtype, leaf.device) for leaf in leaves]


def prepare(
    preconditioner: Preconditioner | Callable[[Tree], Tree] | None, operator: LinearOperator
) -> Callable[[Tree], Tree] | None:
    """Return the map to apply: that of a :class:`Preconditioner`, or a function as it is."""
    if isinstance(preconditioner, Preconditioner):
        return preconditioner.prepare(operator)
    return preconditioner


def observe(preconditioner: object, iterations: int) -> None:
    """Tell a :class:`Preconditioner` how many iterations the solve took."""
    if isinstance(preconditioner, Preconditioner):
        preconditioner.observe(iterations)


def check_preconditioner(preconditioner: object) -> None:
    """Raise ``TypeError`` unless it is a preconditioner, a function or ``None``."""
    if preconditioner is None or isinstance(preconditioner, Preconditioner):
        return
    if isinstance(preconditioner, type) or not callable(preconditioner):
        raise TypeError(
            "preconditioner must be a Preconditioner, a function from a tree to a tree or None, "
            f"got {given(preconditioner)}"
        )


def apply_preconditioner(
    precondition: Callable[[Tree], Tree] | None, r: Tree, norm: float, *, option: object
) -> tuple[Tree, float]:
    """Return ``z = M r`` and ``⟨r, z⟩`` for a residual of the given norm.

    ``option`` is the solver's. Where a :class:`Preconditioner` made M, only rounding, over- and
    underflow make ``⟨r, z⟩`` not positive, and the solver reports it. For a function of the
    caller's it raises ``ValueError``.
    """
    if precondition is None:
        return r, norm * norm
    z = precondition(r)
    rz = tr.dot(r, z).item()
    if rz <= 0.0 < norm and not isinstance(option, Preconditioner):
        raise ValueError(
            "preconditioner must be positive definite, got ⟨r, M r⟩ = "
            f"{rz:.3g} for a residual of norm {norm:.3g}"
        )
    return z, rz
