"""Derivatives of the mean over all ranks that have several batches each: one message per product.

f̄ = Σ_r w_r f_r / Σ_r w_r,   f_r the mean over the batches of rank r

Each rank passes over its own batches by :class:`hypergrad.operators.averaged.AveragedHessian`, on
whole copies of θ and φ, and its result is summed over the ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from hypergrad import tree as tr
from hypergrad.autodiff.evaluation import Objective, fresh_leaves
from hypergrad.autodiff.isolation import RandomState
from hypergrad.distributed.call import Call
from hypergrad.distributed.collectives import Exchange
from hypergrad.distributed.ranks import Ranks
from hypergrad.minibatches import Averaged
from hypergrad.operators.averaged import AveragedHessian
from hypergrad.operators.gradients import value_and_gradients
from hypergrad.operators.hessians import Hessian, Side
from hypergrad.tree import Tree

Result = TypeVar("Result")


@dataclass(frozen=True)
class OwnPart:
    """What a rank adds to the mean."""

    ranks: Ranks
    objective: Averaged  # f_r
    weight: Callable[[], float]  # returns w_r
    device: torch.device  # of θ, and for exchanged numbers

    def evaluated(
        self,
        params: Tree,
        hparams: Tree,
        random_state: RandomState,
        work: Callable[[Tree, Tree], tuple[float, Result]],
    ) -> tuple[float, Result, float]:
        """Return the mean of all values, the other result of ``work``, and this rank's share.

        Args:
            params: θ.
            hparams: φ.
            random_state: of the caller, the same on all ranks.
            work: takes whole copies of both; returns the value of ``f_r`` and another result.

        Raises:
            DistributedError: on all ranks; one of them failed, or they differ.
        """
        theta, phi = self.whole(params), self.whole(hparams)
        results: list[Result] = []
        value = 0.0
        with random_state.replayed():
            call = Call(self.ranks, params, hparams)
            try:
                call.weight = self.weight()
                with call.own_part(theta, phi):
                    value, result = work(theta, phi)
                results.append(result)
            except Exception as error:
                call.failure = error
            mean = call.mean(torch.tensor(value, dtype=torch.float64, device=self.device))
        return float(mean), results[0], call.share

    def whole(self, tree: Tree) -> Tree:
        """All of each leaf, plain; plain leaves need no message."""
        leaves = tr.leaves(tree)
        whole = Exchange(leaves, self.ranks).spread([leaf.detach() for leaf in leaves])
        return tr.unflatten_like(tree, whole)

    def summed(self, tree: Tree, like: Tree) -> Tree:
        """The sum over the ranks, in the placements of ``like``; one message."""
        exchange = Exchange(tr.leaves(like), self.ranks)
        return tr.unflatten_like(like, exchange.collect(tr.leaves(tr.cast_like(tree, like))))

    def together(self, work: Callable[[], Tree]) -> Tree:
        """Return ``work()`` of this rank's batches; if it fails on one rank, all raise."""
        results: list[Tree] = []
        failure: Exception | None = None
        try:
            results.append(work())
        except Exception as error:
            failure = error
        # One number: without it a rank would wait endlessly for the product of one that failed.
        failures = torch.tensor(float(failure is not None), device=self.device)
        if self.ranks.summed(failures).item():
            self.ranks.raise_failure(failure)
        return results[0]


def shared_value_and_gradients(
    own: OwnPart, params: Tree, hparams: Tree, name: str, random_state: RandomState
) -> tuple[float, Tree, Tree]:
    """``f̄``, ``∂_θ f̄`` and ``∂_φ f̄``; see :func:`value_and_gradients`."""

    def work(theta: Tree, phi: Tree) -> tuple[float, tuple[Tree, Tree]]:
        leaves = fresh_leaves(theta), fresh_leaves(phi)
        value, *grads = value_and_gradients(own.objective, *leaves, name)
        return value, (grads[0], grads[1])

    value, grads, share = own.evaluated(params, hparams, random_state, work)
    both = own.summed(tr.scale(grads, share), (params, hparams))
    return value, *both


class SharedHessian(Hessian):
    """``H = Σ_r w_r H_r / Σ_r w_r``, each rank's ``H_r`` over its own batches.

    Args:
        inner: the mean.
        own: what this rank adds to it.
        params: θ, plain tensors that are the same on all ranks, or sharded ones.
        hparams: φ, of the same kinds.
        part: the class of the Hessian of one batch.
    """

    def __init__(
        self, inner: Objective, own: OwnPart, params: Tree, hparams: Tree, part: type[Hessian]
    ) -> None:
        self._own = own
        self._part = part
        super().__init__(inner, params, hparams)

    def linearise(self) -> tuple[float, Tree]:
        def work(theta: Tree, phi: Tree) -> tuple[float, Hessian]:
            hessian = AveragedHessian(self._own.objective, theta, phi, self._part)
            return hessian.value, hessian

        trees = self._params, self._hparams
        value, self._local, self._share = self._own.evaluated(*trees, self.random_state, work)
        return value, self._own.summed(tr.scale(self._local.gradient, self._share), self._params)

    @property
    def default_chunk_size(self) -> int:
        return self._local.default_chunk_size

    def differentiate_gradient(self, vector: list[Tensor], side: Side) -> list[Tensor]:
        whole = self._own.whole(vector)
        product = self._own.together(lambda: self._local.differentiate_gradient(whole, side))
        summed: list[Tensor] = self._own.summed(tr.scale(product, self._share), self.inputs(side))
        return summed

    def multiply_chunk(self, block: Tree) -> Tree:
        whole = self._own.whole(block)
        product = self._own.together(lambda: self._local.multiply_chunk(whole))
        return self._own.summed(tr.scale(product, self._share), block)
