"""Hessian products by forward over reverse mode, without a kept graph."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad

from hypergrad import placement as pl
from hypergrad import tree as tr
from hypergrad.evaluation import filled_leaves, gradient, leaving_no_trace
from hypergrad.operators.base import one_by_one
from hypergrad.operators.hessian import Hessian, Side
from hypergrad.tree import Tree


class ForwardHessian(Hessian):
    r"""The inner gradient is evaluated anew on dual numbers ``θ + ε v`` at each product.

    The tangent of ``∇_θ f`` is ``H v`` and that of ``∇_φ f`` is ``(∂_φ F)ᵀ v``. Time: about 3.3
    gradients a product. Memory: that of one gradient with tangents, freed after each product.

    Raises:
        NotImplementedError: at a product, an operation of ``inner`` has no forward derivative.
        ValueError: θ or φ hold ``DTensor``\ s.
    """

    def linearise(self) -> tuple[float, Tree]:
        if pl.any_distributed(tr.leaves((self._params, self._hparams))):
            raise ValueError(
                "mode must not be 'forward' for DTensors, which have no forward derivatives; use "
                "'reverse' or 'finite-difference'"
            )
        value = self.inner_value(self._params, twice=True)
        with leaving_no_trace(twice=True):
            return value.item(), self.inner_gradient(value)

    @property
    def default_chunk_size(self) -> int:
        return 1

    def differentiate_gradient(self, vector: list[Tensor], side: Side) -> list[Tensor]:
        with forward_ad.dual_level(), leaving_no_trace(twice=True):
            pairs = map(forward_ad.make_dual, self._theta, vector)
            dual = tr.unflatten_like(self._params, list(pairs))
            value = self.inner_value(dual, twice=True)
            grads = gradient(value, self.inputs(side, dual))
            tangents = [
                None if grad is None else forward_ad.unpack_dual(grad).tangent for grad in grads
            ]
            # The tangent outlives its level only as a tensor of its own.
            kept = [None if tangent is None else torch.clone(tangent) for tangent in tangents]
        return filled_leaves(kept, self.inputs(side))

    def multiply_chunk(self, block: Tree) -> Tree:
        return one_by_one(self, block)
