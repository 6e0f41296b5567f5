"""Optimisers that clip their gradients."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hypergrad import _sharding as pl
from hypergrad import tree as tr
from hypergrad._checks import check_number
from hypergrad.optimizers import hyperparameters as hp
from hypergrad.optimizers.base import Optimizer, Settings, Slot, State, Step, check_optimizer
from hypergrad.tree import Tree


@dataclass(frozen=True, eq=False)
class Clipped(Optimizer):
    """Another optimiser's steps along ``g · min(1, max_norm / (‖g‖ + 1e-6))``.

    ‖g‖ is the norm over all leaves together, as in ``torch.nn.utils.clip_grad_norm_``. The
    derivatives of a step include those of the clipping. Pascanu, Mikolov & Bengio 2013.

    Args:
        optimizer: one of :mod:`hypergrad.optimizers`.
        max_norm: the largest norm of a gradient.

    Raises:
        ValueError: from ``update``: the gradients are sharded.

    Examples:
        >>> import torch, hypergrad as hg
        >>> optimizer = hg.optimizers.Clipped(hg.optimizers.SGD(lr=1.0), max_norm=0.5)
        >>> w = torch.zeros(2)
        >>> optimizer.update(torch.tensor([3.0, 4.0]), optimizer.init(w), w)[0]
        tensor([-0.3000, -0.4000])
    """

    optimizer: Optimizer
    max_norm: float

    def __post_init__(self) -> None:
        check_optimizer(self.optimizer)
        check_number(self.max_norm, "max_norm", above=0.0)

    def init(self, params: Tree) -> State:
        return self.optimizer.init(params)

    def leaf_settings(self, step: int, index: int, slot: Slot, params: Tree) -> Settings:
        return self.optimizer.leaf_settings(step, index, slot, params)

    def update_leaf(self, param: Tensor, grad: Tensor, slot: Slot, settings: Settings) -> Step:
        return self.optimizer.update_leaf(param, grad, slot, settings)

    def prepared(self, grads: Tree) -> Tree:
        if pl.any_distributed(tr.leaves(grads)):
            raise ValueError(
                "grads must be whole to be clipped in a differentiable step, got DTensor"
            )
        wide = [leaf.float() if leaf.dtype.itemsize < 4 else leaf for leaf in tr.leaves(grads)]
        squares = [leaf.square().sum().to(wide[0]) for leaf in wide]
        factor = self.max_norm / (hp.root(torch.stack(squares).sum()) + 1e-6)
        clipped = factor.clamp(max=1.0)
        return tr.map_leaves(lambda leaf: hp.times(leaf, clipped.to(leaf.device)), grads)
