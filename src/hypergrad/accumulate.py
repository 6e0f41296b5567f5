"""Hypergradients where optimisers look for gradients."""

from __future__ import annotations

from torch import Tensor

from hypergrad import tree as tr
from hypergrad._checks import check_like, check_tree
from hypergrad.tree import Tree


def accumulate_grad(hparams: Tree, grads: Tree) -> None:
    """Add ``grads`` to the ``.grad`` of the leaf tensors ``hparams``, as ``backward()`` would.

    Any ``torch.optim`` optimiser, gradient clipping and gradient accumulation then work unchanged.

    Args:
        hparams: φ, leaf tensors that require gradients.
        grads: such as :attr:`Hypergradient.grads`; the structure and shapes of ``hparams``.

    Raises:
        TypeError: a leaf is no floating-point tensor.
        ValueError: the trees do not match, or a tensor of ``hparams`` is no leaf or does not
            require gradients. No ``.grad`` is changed then.

    Examples:
        >>> import torch, hypergrad as hg
        >>> decay = torch.zeros(2, requires_grad=True)
        >>> hg.accumulate_grad(decay, torch.ones(2))
        >>> decay.grad
        tensor([1., 1.])
    """
    check_tree(hparams, "hparams")
    check_like(grads, hparams, "grads", "hparams")
    for leaf in tr.leaves(hparams):
        if not (leaf.is_leaf and leaf.requires_grad):
            raise ValueError(
                "hparams must be leaf tensors that require gradients, got one with "
                f"is_leaf={leaf.is_leaf}, requires_grad={leaf.requires_grad}"
            )
    for leaf, grad in zip(tr.leaves(hparams), tr.leaves(grads), strict=True):
        add_to_grad(leaf, grad)


def add_to_grad(leaf: Tensor, grad: Tensor) -> None:
    """``leaf.grad ← leaf.grad + grad``."""
    addend = grad.detach().to(leaf.dtype)
    # Out of place: others may hold the present .grad, or share memory with `grad`.
    leaf.grad = addend.clone() if leaf.grad is None else leaf.grad + addend
