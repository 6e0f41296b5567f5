"""The Hessian of an inner objective, and its mixed second derivative with the outer parameters.

Both come from one thing, the derivative of the inner gradient along v:

    d/dε ∇_(θ,φ) f(θ + ε v, φ)  =  ( H v,  (∂_φ F)ᵀ v ),     H = ∂²f/∂θ²,   F = ∇_θ f

since second derivatives commute. A *mode* is a way to compute it; each has its own file.
"""

from __future__ import annotations

from abc import abstractmethod
from contextlib import AbstractContextManager, nullcontext
from typing import Literal, TypeAlias

import optree
from torch import Tensor

from hypergrad import tree as tr
from hypergrad._checks import check_dependence, check_structure
from hypergrad.autodiff.evaluation import Objective, evaluate, filled, fresh_leaves, gradient
from hypergrad.autodiff.isolation import RandomState
from hypergrad.operators.base import SymmetricOperator
from hypergrad.tree import Tree

Side: TypeAlias = Literal["inner", "outer", "both"]
"""In what the inner gradient is differentiated: θ, φ, or both. ``"both"`` is the last product of an
operator: it frees the graph on the way."""


class Hessian(SymmetricOperator):
    """``H = ∂²f/∂θ²`` of ``inner`` at ``params``, with the outer side ``v ↦ (∂_φ F)ᵀ v``.

    The operator remembers the random state in which it is made and replays it at each evaluation of
    ``inner``. So dropout masks are the same in every product, and H is one fixed matrix.

    Attributes:
        value: the inner objective ``f(θ, φ)``.
        gradient: the inner gradient ``F = ∇_θ f(θ, φ)``, detached.
        random_state: where the evaluations of ``inner`` start.

    Args:
        inner: ``f(params, hparams)``, a scalar.
        params: θ.
        hparams: φ.
        random_state: the one to replay; the default is the current state.

    Raises:
        TypeError, ValueError: ``inner`` is not a finite scalar function of ``params``.
    """

    def __init__(
        self, inner: Objective, params: Tree, hparams: Tree, random_state: RandomState | None = None
    ) -> None:
        self._inner = inner
        self._params = fresh_leaves(params)
        self._hparams = fresh_leaves(hparams)
        self._theta, self._structure = optree.tree_flatten(self._params)
        self._shapes = [leaf.shape for leaf in self._theta]
        self.random_state = random_state or RandomState(params, hparams)
        self.value, self.gradient = self.linearise()

    @property
    def like(self) -> Tree:
        return self._params

    @abstractmethod
    def linearise(self) -> tuple[float, Tree]:
        """Evaluate ``f(θ, φ)`` and ``∇_θ f``, detached; keep what the products need."""

    @abstractmethod
    def differentiate_gradient(self, vector: list[Tensor], side: Side) -> list[Tensor]:
        """``H v``, ``(∂_φ F)ᵀ v`` or both, for the leaves of a v in the dtypes of ``params``.

        The leaves of the result may be in wider dtypes.
        """

    def matvec(self, vector: Tree) -> Tree:
        leaves = self._leaves_of(vector)
        product = self.differentiate_gradient(tr.cast_like(leaves, self._theta), "inner")
        return self._structure.unflatten(tr.cast_like(product, leaves))

    def repeated(self) -> AbstractContextManager[None]:
        """A context for many products, which does once what each would do for itself."""
        return nullcontext()

    def vjp_outer(self, vector: Tree) -> Tree:
        """The mixed product ``(∂_φ F)ᵀ v``, in the structure and dtypes of ``hparams``.

        An outer parameter that ``inner`` does not use gets zero.
        """
        narrow = tr.cast_like(self._leaves_of(vector), self._theta)
        return self._like(self._hparams, self.differentiate_gradient(narrow, "outer"))

    def vjp(self, vector: Tree) -> tuple[Tree, Tree]:
        """``(H v, (∂_φ F)ᵀ v)`` in the time of one product; afterwards the operator is unusable."""
        narrow = tr.cast_like(self._leaves_of(vector), self._theta)
        both = self.differentiate_gradient(narrow, "both")
        return self._like((self._params, self._hparams), both)

    def inputs(self, side: Side, params: Tree | None = None) -> list[Tensor]:
        """Where to differentiate the gradient: the leaves of θ (or other ``params``), φ or both."""
        theta = self._theta if params is None else tr.leaves(params)
        if side == "inner":
            return theta
        return tr.leaves(self._hparams) if side == "outer" else theta + tr.leaves(self._hparams)

    def _leaves_of(self, vector: Tree) -> list[Tensor]:
        """The leaves of a v, checked fast, since every product does it."""
        leaves, structure = optree.tree_flatten(vector)
        if structure != self._structure or [leaf.shape for leaf in leaves] != self._shapes:
            check_structure(vector, self._params, "vector", "params")
        return leaves

    def _like(self, tree: Tree, leaves: list[Tensor]) -> Tree:
        return tr.unflatten_like(tree, tr.cast_like(leaves, tr.leaves(tree)))

    def inner_value(self, params: Tree, *, twice: bool = False) -> Tensor:
        """``f`` at other ``params`` of the same structure, with its graph."""
        return evaluate(self._inner, params, self._hparams, self.random_state, "inner", twice=twice)

    def inner_gradient(self, value: Tensor, *, create_graph: bool = False) -> Tree:
        """``∇_θ f`` of a ``value`` at ``params``; zero for a parameter that ``inner`` does not use.

        It raises ``ValueError`` if ``inner`` uses none of the parameters.
        """
        grads = gradient(value, self._params, create_graph=create_graph)
        check_dependence(grads, "inner")
        return filled(grads, self._params)
