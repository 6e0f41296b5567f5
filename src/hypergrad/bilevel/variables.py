"""The inner or the outer parameters of a loop: one tree of leaf tensors that optimisers change."""

from __future__ import annotations

from typing import Any

import optree
import torch
from torch import Tensor, nn

from hypergrad import tree as tr
from hypergrad._checks import check_structure, check_tree, given
from hypergrad._saving import check_form
from hypergrad.autodiff.modules import parameters_of
from hypergrad.tree import Tree


class Variables:
    """θ or φ, changed in place by optimisers.

    Args:
        given: a tree of leaf tensors; or a module, whose parameters that require gradients are
            meant, by their names, and whose buffers belong to the state.
        name: what to call it in errors.
        device: where to move tensors and module; ``None`` leaves them.

    Attributes:
        tree: the tensors.
        module: the module, if one was given.

    Raises:
        TypeError, ValueError: no tree of floating-point leaf tensors, or a module without
            parameters that require gradients.
    """

    def __init__(self, given: Tree | nn.Module, name: str, device: torch.device | None) -> None:
        self.name = name
        self.module = given if isinstance(given, nn.Module) else None
        if self.module is not None and device is not None:
            self.module.to(device)
        self.tree = parameters_of(given, name)
        check_tree(self.tree, name)
        self._leaves = [*tr.leaves(self.tree)]
        for where, leaf in self.named():
            if not leaf.is_leaf:
                raise ValueError(
                    f"{where} must be a leaf tensor, which an optimiser can change, got the result "
                    "of a computation; detach() it"
                )
            if leaf.is_inference():
                raise ValueError(
                    f"{where} must be a tensor that can be changed, got one of inference mode; "
                    "pass clone() of it, made outside"
                )
            dimensions = zip(leaf.stride(), leaf.shape, strict=True)
            if any(step == 0 and size > 1 for step, size in dimensions):
                raise ValueError(
                    f"{where} must have a place for each element, got an expanded tensor; pass "
                    "contiguous() of it"
                )
            if device is not None and leaf.device != device:
                leaf.data = leaf.data.to(device)

    @property
    def leaves(self) -> list[Tensor]:
        """The tensors, in the order of their structure."""
        return self._leaves

    def named(self) -> list[tuple[str, Tensor]]:
        """Each tensor with the expression that reaches it, such as ``hparams['decay']``."""
        paths, found, _ = optree.tree_flatten_with_path(self.tree)
        return [
            (self.name + "".join(f"[{key!r}]" for key in path), leaf)
            for path, leaf in zip(paths, found, strict=True)
        ]

    def check_optimizer(self, optimizer: Any, name: str) -> None:
        """Raise unless ``optimizer`` is one of ``torch.optim`` over just these tensors.

        Raises:
            TypeError: it is none.
            ValueError: it holds other tensors, or leaves some of these out.
        """
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError(
                f"{name} must be a torch.optim.Optimizer, got {given(optimizer, 'torch.optim')}"
            )
        if isinstance(optimizer, torch.optim.SparseAdam):
            raise TypeError(
                f"{name} must take dense gradients, which hypergrad makes of all, got SparseAdam; "
                "use torch.optim.Adam"
            )
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        own = {id(leaf): where for where, leaf in self.named()}
        foreign = len(held - own.keys())
        if foreign:
            raise ValueError(
                f"{name} must optimise {self.name}, got an optimiser of which {foreign} of "
                f"{len(held)} tensors are not among them (are they copies?)"
            )
        missing = [where for key, where in own.items() if key not in held]
        if missing:
            raise ValueError(
                f"{name} must optimise all of {self.name}, got one without {', '.join(missing)}; "
                "freeze what is not to be trained with requires_grad_(False), or leave it out of "
                f"{self.name}"
            )

    def assign(self, values: Tree, name: str) -> None:
        """Copy ``values`` into the tensors.

        Raises:
            TypeError, ValueError: they do not match; nothing is changed then.
        """
        check_structure(values, self.tree, name, self.name)
        with torch.no_grad():
            for own, value in zip(self.leaves, tr.leaves(values), strict=True):
                own.copy_(value)

    def set_grads(self, grads: Tree) -> None:
        """Put ``grads`` where optimisers look for them."""
        for own, grad in zip(self.leaves, tr.leaves(grads), strict=True):
            own.grad = grad.to(own.dtype)

    def clear_grads(self) -> None:
        """Leave no gradient behind."""
        for own in self.leaves:
            own.grad = None

    def check_state(self, state: Any) -> None:
        """Raise ``ValueError`` unless :meth:`load_state_dict` could copy ``state`` back."""
        own = {"leaves": self.leaves, "rest": self._rest()}
        check_form(state, own, f"the state of {self.name}")

    def state_dict(self) -> dict[str, Any]:
        """Copies of the tensors, and of the buffers and frozen parameters of the module."""
        return {
            "leaves": [leaf.detach().clone() for leaf in self.leaves],
            "rest": {key: value.detach().clone() for key, value in self._rest().items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Copy a state back, in place."""
        rest = self._rest()
        with torch.no_grad():
            for own, value in zip(self.leaves, state["leaves"], strict=True):
                own.copy_(value)
            for key, value in state["rest"].items():
                rest[key].copy_(value)

    def _rest(self) -> dict[str, Tensor]:
        if self.module is None:
            return {}
        every = [*self.module.named_parameters(), *self.module.named_buffers()]
        return {key: value for key, value in every if not value.requires_grad}

    def shapes(self) -> list[tuple[str, list[int], str]]:
        """What tells one problem from another: names, shapes and dtypes."""
        every = [*self.named(), *self._rest().items()]
        return [(where, list(leaf.shape), str(leaf.dtype)) for where, leaf in every]
