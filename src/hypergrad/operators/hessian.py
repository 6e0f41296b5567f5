"""The Hessian of an inner objective, and its mixed second derivative with the outer parameters.

Both are one thing, the derivative of the inner gradient along v:

    d/dε ∇_(θ,φ) f(θ + ε v, φ)  =  ( H v,  (∂_φ F)ᵀ v ),     H = ∂²f/∂θ²,   F = ∇_θ f

since second derivatives commute. A *mode* is a way to compute it; each has a file of its own.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from contextlib import AbstractContextManager, nullcontext
from typing import Literal, TypeAlias

from torch import Tensor

from hypergrad import tree as tr
from hypergrad.checks import check_dependence, check_objective, check_structure, check_tree
from hypergrad.evaluation import (
    Objective,
    evaluate,
    filled,
    fresh_leaves,
    gradient,
)
from hypergrad.isolation import RandomState
from hypergrad.operators.base import SymmetricOperator
from hypergrad.tree import Tree

Side: TypeAlias = Literal["inner", "outer", "both"]
"""In what the inner gradient is differentiated: θ, φ or both, which is an operator's last product:
what it keeps is freed on the way, so that the memory can be used again at once."""


class Hessian(SymmetricOperator):
    """``H = ∂²f/∂θ²`` of ``inner`` at ``params``, with the outer side ``v ↦ (∂_φ F)ᵀ v``.

    The random state is remembered when the operator is made and replayed at each evaluation of
    ``inner``, so dropout masks are the same in every product and H is one fixed matrix.

    Attributes:
        value: the inner objective ``f(θ, φ)``.
        gradient: the inner gradient ``F = ∇_θ f(θ, φ)``, detached.
        random_state: where the evaluations of ``inner`` start.

    Args:
        inner: ``f(params, hparams)``, a scalar.
        params: θ.
        hparams: φ.
        random_state: what to replay; the default is the current state.

    Raises:
        TypeError, ValueError: bad trees, or an ``inner`` that is not a finite scalar function of
            ``params``.
    """

    def __init__(
        self,
        inner: Objective,
        params: Tree,
        hparams: Tree,
        random_state: RandomState | None = None,
    ) -> None:
        check_objective(inner, "inner")
        check_tree(params, "params")
        check_tree(hparams, "hparams")
        self._inner = inner
        self._params = fresh_leaves(params)
        self._hparams = fresh_leaves(hparams)
        self.random_state = random_state or RandomState(params, hparams)
        self.value, self.gradient = self.linearise()

    @property
    def like(self) -> Tree:
        return self._params

    @property
    def lower_bound(self) -> float:
        return -math.inf

    @abstractmethod
    def linearise(self) -> tuple[float, Tree]:
        """Evaluate ``f(θ, φ)`` and ``∇_θ f``, detached; keep what the products need."""

    @abstractmethod
    def differentiate_gradient(self, vector: Tree, side: Side) -> Tree:
        """``H v``, ``(∂_φ F)ᵀ v`` or the pair of them, for ``vector`` in the dtypes of ``params``.

        The result may be in wider dtypes.
        """

    def matvec(self, vector: Tree) -> Tree:
        check_structure(vector, self._params, "vector", "params")
        narrow = tr.cast_like(vector, self._params)
        product = self.differentiate_gradient(narrow, "inner")
        return tr.cast_like(product, vector)

    def repeated(self) -> AbstractContextManager[None]:
        """To be entered around many products: what each would set up for itself, set up once."""
        return nullcontext()

    def vjp_outer(self, vector: Tree) -> Tree:
        """The mixed product ``(∂_φ F)ᵀ v``, in the structure and dtypes of ``hparams``.

        An outer parameter that ``inner`` does not use gets zero.
        """
        check_structure(vector, self._params, "vector", "params")
        narrow = tr.cast_like(vector, self._params)
        return tr.cast_like(self.differentiate_gradient(narrow, "outer"), self._hparams)

    def vjp(self, vector: Tree) -> tuple[Tree, Tree]:
        """``(H v, (∂_φ F)ᵀ v)`` for one product's time; the operator cannot be used afterwards."""
        check_structure(vector, self._params, "vector", "params")
        narrow = tr.cast_like(vector, self._params)
        both = self.differentiate_gradient(narrow, "both")
        return tr.cast_like(both, (self._params, self._hparams))

    def inputs(self, side: Side, params: Tree | None = None) -> Tree:
        """What to differentiate the gradient in: ``params`` (θ unless given), φ or the pair."""
        theta = self._params if params is None else params
        return {"inner": theta, "outer": self._hparams, "both": (theta, self._hparams)}[side]

    def inner_value(self, params: Tree, *, twice: bool = False) -> Tensor:
        """``f`` at other ``params`` of the same structure, with its graph."""
        return evaluate(self._inner, params, self._hparams, self.random_state, "inner", twice=twice)

    def inner_gradient(self, value: Tensor, *, create_graph: bool = False) -> Tree:
        """``∇_θ f`` of a ``value`` at ``params``; zero for a parameter that ``inner`` leaves out.

        Raises:
            ValueError: ``inner`` uses none of the parameters.
        """
        grads = gradient(value, self._params, create_graph=create_graph)
        check_dependence(grads, "inner")
        return filled(grads, self._params)
