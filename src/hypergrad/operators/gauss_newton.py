"""Curvature of first derivatives: Gauss–Newton and the empirical Fisher matrix.

Both are ``Jᵀ S J`` with the Jacobian J of some outputs and a positive semi-definite S.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from hypergrad import tree as tr
from hypergrad._checks import check_structure
from hypergrad.autodiff.evaluation import Objective
from hypergrad.autodiff.modules import on_modules
from hypergrad.operators.base import SymmetricOperator
from hypergrad.operators.jacobians import Jacobian, JacobianOperator
from hypergrad.operators.modes import ReverseHessian
from hypergrad.tree import Tree


class GaussNewton(JacobianOperator, SymmetricOperator):
    """``G = Jᵀ H_ℓ J + H_r`` of ``f(θ, φ) = ℓ(z(θ, φ), φ) + r(θ, φ)`` (Schraudolph 2002).

    J = ∂z/∂θ is the Jacobian of the model's outputs, H_ℓ the Hessian of the loss in the outputs,
    H_r the exact Hessian of the regulariser. G is the Hessian of f without the second derivatives
    of the model. For a convex ℓ and r it is positive semi-definite at every θ, and it equals H
    where the model is linear in θ or fits perfectly. A product costs two reverse passes and the two
    small Hessians.

    Args:
        model: ``model(params, hparams)``, returns a tree of outputs z, such as logits.
        loss: ``loss(outputs, hparams)``, a scalar.
        params: θ, a tree or a module, as for :func:`hypergrad.hypergradient`.
        hparams: φ, of the same kinds.
        regulariser: ``regulariser(params, hparams)``, a scalar, such as a weight decay.
        convex: whether loss and regulariser are convex in their first argument; then G is marked
            positive semi-definite.

    Raises:
        TypeError, ValueError: bad trees or values.

    Examples:
        For a least-squares loss of a linear model, G is the Hessian:

        >>> import torch, hypergrad as hg
        >>> X = torch.tensor([[1.0, 2.0], [0.0, 1.0]])
        >>> model = lambda w, c: X @ w
        >>> loss = lambda z, c: 0.5 * z.square().sum()
        >>> decay = lambda w, c: 0.5 * (c * w.square()).sum()
        >>> w, c = torch.ones(2), torch.ones(1)
        >>> hg.operators.GaussNewton(model, loss, w, c, regulariser=decay).dense()
        tensor([[2., 2.],
                [2., 6.]], dtype=torch.float64)
    """

    def __init__(
        self,
        model: Callable[[Any, Any], Tree],
        loss: Objective,
        params: Tree | nn.Module,
        hparams: Tree | nn.Module,
        *,
        regulariser: Objective | None = None,
        convex: bool = True,
    ) -> None:
        super().__init__(Jacobian(model, params, hparams, "model"))
        outputs, theta, phi = self._jacobian.outputs, self._jacobian.params, self._jacobian.hparams
        self._loss = ReverseHessian(on_modules(loss, outputs, hparams), outputs, phi)
        self._regulariser = None
        if regulariser is not None:
            regulariser = on_modules(regulariser, params, hparams)
            self._regulariser = ReverseHessian(regulariser, theta, phi)
        self._convex = convex

    @property
    def lower_bound(self) -> float:
        return 0.0 if self._convex else -math.inf

    def matvec(self, vector: Tree) -> Tree:
        check_structure(vector, self.like, "vector", "params")
        bent = self._loss.matvec(self._jacobian.push(vector))
        product = tr.cast_like(self._jacobian.pull(bent), vector)
        if self._regulariser is not None:
            product = tr.add(product, self._regulariser.matvec(vector))
        return product

    def multiply_chunk(self, block: Tree) -> Tree:
        bent = self._loss.multiply_chunk(self._jacobian.push_block(block))
        products = tr.cast_like(self._jacobian.pull_block(bent), block)
        if self._regulariser is not None:
            products = tr.add(products, self._regulariser.multiply_chunk(block))
        return products


class EmpiricalFisher(JacobianOperator, SymmetricOperator):
    """``E = (1/N) Σ_i ∇ℓ_i ∇ℓ_iᵀ``, the second moment of the gradients of N samples.

    Positive semi-definite and made of first derivatives alone. Near the Hessian only for a
    well-specified likelihood near its optimum (Kunstner, Balles & Hennig 2019): prefer
    :class:`GaussNewton` where the loss can be split.

    Args:
        losses: ``losses(params, hparams)``, the N losses of the samples, shape ``(N,)``.
        params: θ, a tree or a module, as for :func:`hypergrad.hypergradient`.
        hparams: φ, of the same kinds.

    Raises:
        TypeError, ValueError: bad trees or values; ``losses`` returns anything but one vector.

    Examples:
        >>> import torch, hypergrad as hg
        >>> X = torch.tensor([[2.0, 0.0], [0.0, 4.0]])
        >>> hg.operators.EmpiricalFisher(lambda w, c: X @ w, torch.ones(2), torch.ones(1)).dense()
        tensor([[2., 0.],
                [0., 8.]], dtype=torch.float64)
    """

    def __init__(
        self,
        losses: Callable[[Any, Any], Tensor],
        params: Tree | nn.Module,
        hparams: Tree | nn.Module,
    ) -> None:
        super().__init__(Jacobian(losses, params, hparams, "losses"))
        outputs = self._jacobian.outputs
        if not isinstance(outputs, Tensor) or outputs.ndim != 1:
            shape = tuple(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__
            raise ValueError(f"losses must return one loss per sample, shape (N,), got {shape}")
        self._samples = len(outputs)

    @property
    def lower_bound(self) -> float:
        return 0.0

    def matvec(self, vector: Tree) -> Tree:
        check_structure(vector, self.like, "vector", "params")
        slopes = tr.divide(self._jacobian.push(vector), self._samples)
        return tr.cast_like(self._jacobian.pull(slopes), vector)

    def multiply_chunk(self, block: Tree) -> Tree:
        slopes = tr.divide(self._jacobian.push_block(block), self._samples)
        return tr.cast_like(self._jacobian.pull_block(slopes), block)
