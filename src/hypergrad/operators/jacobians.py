"""The Jacobian of any function of the inner parameters, over a graph that is built once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from hypergrad import tree as tr
from hypergrad._checks import check_dependence, check_structure
from hypergrad.autodiff.evaluation import evaluate_outputs, filled, fresh_leaves, leaving_no_trace
from hypergrad.autodiff.isolation import RandomState
from hypergrad.autodiff.kept_graph import check_differentiable, pull_back, pull_back_block
from hypergrad.minibatches import on_trees
from hypergrad.operators.base import LinearOperator
from hypergrad.operators.modes import default_chunk_size
from hypergrad.tree import Tree


class Jacobian:
    """``J = ∂z/∂θ`` of ``z = function(θ, φ)``, and ``∂z/∂φ``; z any tree of tensors.

    ``Jᵀu`` is a reverse pass, and so is ``Jv``: ``u ↦ Jᵀu`` is linear in u, and the derivative of
    ``⟨Jᵀu, v⟩`` with respect to u is ``Jv``.

    Attributes:
        outputs: z, detached.

    Args:
        function: ``function(params, hparams)``, returns a tree of floating-point tensors.
        params: θ, a tree or a module, as for :func:`hypergrad.hypergradient`.
        hparams: φ, of the same kinds.
        name: what to call the function in errors.

    Raises:
        TypeError, ValueError: bad trees, or values that are no finite floating-point tensors or do
            not depend on ``params``.
    """

    def __init__(
        self,
        function: Callable[[Any, Any], Tree],
        params: Tree | nn.Module,
        hparams: Tree | nn.Module,
        name: str,
    ) -> None:
        function, params, hparams = on_trees(params, hparams, **{name: function})
        self.params = fresh_leaves(params)
        self.hparams = fresh_leaves(hparams)
        state = RandomState(params, hparams)
        self._graph = evaluate_outputs(function, self.params, self.hparams, state, name)
        self.outputs = tr.detach(self._graph)
        # Only to see which of the parameters a gradient reaches.
        reached = pull_back(
            tr.leaves(self._graph), tr.leaves(self.params), tr.leaves(tr.zeros_like(self.outputs))
        )
        check_dependence(reached, name)
        self._transpose: tuple[Tree, Tree] | None = None

    def pull(self, cotangent: Tree, *, outer: bool = False) -> Tree:
        """``Jᵀu``, like ``params``; with ``outer``, ``(∂z/∂φ)ᵀ u``, like ``hparams``."""
        inputs = self.hparams if outer else self.params
        narrow = tr.cast_like(cotangent, self.outputs)
        grads = pull_back(tr.leaves(self._graph), tr.leaves(inputs), tr.leaves(narrow))
        return filled(grads, inputs)

    def push(self, tangent: Tree) -> Tree:
        """``Jv``, like ``outputs``."""
        dummy, transposed = self._linear_transpose()
        narrow = tr.cast_like(tangent, self.params)
        return filled(pull_back(transposed, tr.leaves(dummy), tr.leaves(narrow)), dummy)

    def pull_block(self, cotangents: Tree) -> Tree:
        """``JᵀU`` for a block of k cotangents."""
        narrow = tr.leaves(tr.cast_like(cotangents, self.outputs))
        inputs = tr.leaves(self.params)
        products = pull_back_block(tr.leaves(self._graph), inputs, narrow)
        return tr.unflatten_like(self.params, products)

    def push_block(self, tangents: Tree) -> Tree:
        """``JV`` for a block of k tangents."""
        dummy, transposed = self._linear_transpose()
        narrow = tr.leaves(tr.cast_like(tangents, self.params))
        return tr.unflatten_like(dummy, pull_back_block(transposed, tr.leaves(dummy), narrow))

    def _linear_transpose(self) -> tuple[Tree, list[Tensor]]:
        """A dummy cotangent u and the graph of ``Jᵀu`` in it."""
        if self._transpose is None:
            dummy = tr.map_leaves(torch.Tensor.requires_grad_, tr.zeros_like(self.outputs))
            inputs = tr.leaves(self.params)
            grads = pull_back(tr.leaves(self._graph), inputs, tr.leaves(dummy), create_graph=True)
            with leaving_no_trace(twice=True):
                transposed = tr.leaves(filled(grads, self.params))
            check_differentiable(transposed, tr.leaves(self._graph), inputs)
            self._transpose = dummy, transposed
        return self._transpose


class JacobianOperator(LinearOperator):
    """A map made of products with a :class:`Jacobian`, on vectors like its parameters."""

    def __init__(self, jacobian: Jacobian) -> None:
        self._jacobian = jacobian

    @property
    def like(self) -> Tree:
        return self._jacobian.params

    @property
    def default_chunk_size(self) -> int:
        return default_chunk_size(self._jacobian.params)


class Root(JacobianOperator):
    """``(∂_θ F)ᵀ`` of a root function ``F(θ, φ) = 0``, the map of its adjoint system.

    A product costs one reverse pass over a kept graph; one with the transpose (``rmatvec``) costs
    two at first and one afterwards.

    Args:
        function: ``F(params, hparams)``, a tree like ``params``.
        params: θ.
        hparams: φ.
        symmetric: whether ``∂_θ F`` is known to be symmetric, as that of a gradient is.

    Raises:
        TypeError, ValueError: bad trees, or an ``F`` whose value is not finite, not like ``params``
            or does not depend on them.

    Examples:
        >>> import torch, hypergrad as hg
        >>> F = lambda x, c: torch.stack([x[0] - c * x[1], 2 * x[1]])
        >>> A = hg.operators.Root(F, torch.ones(2), torch.tensor(3.0))
        >>> A.dense()
        tensor([[ 1.,  0.],
                [-3.,  2.]], dtype=torch.float64)
    """

    def __init__(
        self,
        function: Callable[[Tree, Tree], Tree],
        params: Tree,
        hparams: Tree,
        *,
        symmetric: bool = False,
    ) -> None:
        super().__init__(Jacobian(function, params, hparams, "the root function"))
        check_structure(self._jacobian.outputs, params, "the value of the root function", "params")
        self._symmetric = symmetric

    @property
    def value(self) -> Tree:
        """``F(θ, φ)``."""
        return self._jacobian.outputs

    @property
    def symmetric(self) -> bool:
        return self._symmetric

    def matvec(self, vector: Tree) -> Tree:
        check_structure(vector, self.like, "vector", "params")
        return tr.cast_like(self._jacobian.pull(vector), vector)

    def rmatvec(self, vector: Tree) -> Tree:
        check_structure(vector, self.like, "vector", "params")
        if self._symmetric:
            return self.matvec(vector)
        return tr.cast_like(self._jacobian.push(vector), vector)

    def vjp_outer(self, vector: Tree) -> Tree:
        """``(∂_φ F)ᵀ v``, in the structure and dtypes of ``hparams``."""
        check_structure(vector, self.like, "vector", "params")
        return self._jacobian.pull(vector, outer=True)

    def multiply_chunk(self, block: Tree) -> Tree:
        return tr.cast_like(self._jacobian.pull_block(block), block)
