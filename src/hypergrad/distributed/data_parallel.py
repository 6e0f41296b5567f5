"""An objective that is the mean of those of all ranks.

f̄(θ, φ) = Σ_r w_r f_r(θ, φ) / Σ_r w_r

θ and φ pass through a node that copies them to the ranks, and whose derivative sums over the ranks
(:mod:`hypergrad.distributed.collectives`); the value is averaged. So all derivatives of f̄, such as
Hessian products, mixed products and unrolled steps, are those of the mean. They are the same on
every rank, and each product is communicated once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hypergrad import tree as tr
from hypergrad._checks import check_number, check_objective
from hypergrad.autodiff.isolation import RandomState
from hypergrad.distributed.call import Call
from hypergrad.distributed.collectives import Exchange, spread
from hypergrad.distributed.ranks import ranks_of
from hypergrad.distributed.streamed import OwnPart, SharedHessian, shared_value_and_gradients
from hypergrad.minibatches import Averaged
from hypergrad.operators import Hessian
from hypergrad.operators.gradients import Shared
from hypergrad.tree import Tree


class DataParallel(Shared):
    """``f̄ = Σ_r w_r f_r / Σ_r w_r`` over the ranks of a group; an objective like any other.

    Each rank gives the objective on its own batches, and all ranks make the same calls of this
    library. Values, gradients and products are those of the mean, the same on all ranks. Any number
    of ranks gives the answer of one process that has all their batches. θ and φ may be

    - plain tensors, the same on all ranks: a product costs one all-reduce of their size;
    - ``DTensor`` objects, sharded over the ranks: f sees them whole, as plain tensors. A product
      costs one all-gather and one reduce-scatter, and the vectors of solvers and optimisers stay
      sharded.

    Ranks must draw the same random numbers outside f (seed them alike); inside, each rank draws its
    own. Each evaluation compares θ, φ and the random states of the ranks by checksums, and reports
    the failure of a rank to all others. Buffers of modules, such as the statistics of batch norm,
    are each rank's own, as in ``torch.nn.parallel.DistributedDataParallel``.

    If a rank has several batches, write ``DataParallel(hg.Averaged(f, batches),
    weight=len(batches))``. Each rank then passes over its own batches, one in memory at a time, and
    a product is communicated once, with one more number that says whether a rank failed. In
    ``hg.Averaged(DataParallel(f), batches)`` each batch is communicated.

    Args:
        objective: ``f_r(params, hparams, ...)``, a scalar, on this rank's data.
        group: the process group; ``None`` is the default group.
        weight: ``w_r`` > 0, such as the number of rows behind f_r, or a function of the arguments
            that follow ``hparams``, such as ``len`` of a batch.

    Attributes:
        ranks: those of the group.

    Raises:
        TypeError, ValueError: ``objective`` cannot be called, ``weight`` is out of its range, or
            there is no process group.
        DistributedError: during an evaluation, on all ranks: one of them failed, or they differ in
            θ, φ or their random states.
    """

    def __init__(
        self,
        objective: Callable[..., Any],
        *,
        group: Any = None,
        weight: float | Callable[..., float] = 1.0,
    ) -> None:
        check_objective(objective, "objective", "(params, hparams, ...)")
        if not callable(weight):
            check_number(weight, "weight", above=0.0)
        self.ranks = ranks_of(group)
        self._objective = objective
        self._weight = weight

    def __call__(self, params: Tree, hparams: Tree, *arguments: Any) -> Tensor:
        """The mean; its graph leads to this rank's ``params`` and ``hparams``."""
        theta, phi = self._copies(params), self._copies(hparams)
        call = Call(self.ranks, params, hparams)
        try:
            call.weight = self._own_weight(*arguments)
            with call.own_part(theta, phi):
                value = self._objective(theta, phi, *arguments)
            if not isinstance(value, Tensor) or value.numel() != 1:
                raise TypeError(f"objective must return a scalar tensor, got {_words(value)}")
        except Exception as error:
            call.failure = error
            value = torch.zeros(())
        tie = _tie(theta, phi)
        return _Mean.apply(call, value.reshape(()).to(tie.device) + tie.to(value.dtype))

    @property
    def batch_by_batch(self) -> bool:
        """Whether the objective is an :class:`hypergrad.Averaged`."""
        return isinstance(self._objective, Averaged)

    def hessian(self, params: Tree, hparams: Tree, part: type[Hessian]) -> Hessian:
        """The Hessian of the mean, from each rank's own batches one at a time."""
        return SharedHessian(self, self._own_part(params), params, hparams, part)

    def value_and_gradients(
        self, params: Tree, hparams: Tree, name: str, random_state: RandomState
    ) -> tuple[float, Tree, Tree]:
        """``f̄``, ``∂_θ f̄`` and ``∂_φ f̄``, each rank's own batches one at a time."""
        own = self._own_part(params)
        return shared_value_and_gradients(own, params, hparams, name, random_state)

    def _own_part(self, params: Tree) -> OwnPart:
        assert isinstance(self._objective, Averaged)
        device = tr.leaves(params)[0].device
        return OwnPart(self.ranks, self._objective, self._own_weight, device)

    def _own_weight(self, *arguments: Any) -> float:
        weight = self._weight(*arguments) if callable(self._weight) else self._weight
        check_number(weight, "weight", above=0.0)
        return weight

    def _copies(self, tree: Tree) -> Tree:
        leaves = tr.leaves(tree)
        return tr.unflatten_like(tree, spread(Exchange(leaves, self.ranks), leaves))


def _tie(*trees: Tree) -> Tensor:
    """Zero, with zero derivatives, but a function of all trees to any order.

    It makes the graph of every rank, and of its derivatives, lead to θ and φ. Without it, a rank
    whose objective does not depend on them would leave the others waiting for its part of a
    product.
    """
    firsts = [next(leaf for leaf in tr.leaves(tree) if leaf.numel()) for tree in trees]
    where = firsts[0]
    return 0.0 * torch.cos(torch.stack([leaf.reshape(-1)[0].to(where) for leaf in firsts]).sum())


def _words(value: Any) -> str:
    return str(tuple(value.shape)) if isinstance(value, Tensor) else type(value).__name__


class _Mean(torch.autograd.Function):
    """``Σ_r w_r f_r / Σ_r w_r``."""

    @staticmethod
    def forward(call: Call, value: Tensor) -> Tensor:
        return call.mean(value)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.call = inputs[0]

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Any, ...]:
        return None, cotangent * ctx.call.share

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Tensor:
        tangent = tangents[1]
        return ctx.call.mean(tangent)

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[Any, ...], call: Call, value: Tensor
    ) -> tuple[Tensor, int | None]:
        dim = in_dims[1]
        whole = value if dim is None else value.movedim(dim, 0)
        return _Mean.apply(call, whole), None if dim is None else 0
