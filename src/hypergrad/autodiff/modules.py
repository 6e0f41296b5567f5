"""Modules in the place of trees: an objective gets the module, with other parameters in it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torch.func import functional_call

from hypergrad.tree import Tree

Function = Callable[..., Any]
"""``f(params, hparams)`` or ``f(params, hparams, batch)``."""


def parameters_of(given: Tree | nn.Module, name: str) -> Tree:
    """The parameters of a module that require gradients, by their names; a tree as it is.

    Raises:
        ValueError: a module has no such parameter.
    """
    if not isinstance(given, nn.Module):
        return given
    tree = {key: value for key, value in given.named_parameters() if value.requires_grad}
    if not tree:
        raise ValueError(
            f"{name} must have parameters that require gradients, got a {type(given).__name__} "
            "with none"
        )
    return tree


def on_modules(function: Function, params: Tree | nn.Module, hparams: Tree | nn.Module) -> Function:
    """``function`` as one of two trees, if it takes a module in the place of one of them.

    Args:
        function: takes what the caller gave as ``params`` and ``hparams``.
        params: θ; where it is a module, ``function`` gets this module while the tensors of a
            tree stand in the place of its parameters.
        hparams: φ, in the same way.
    """
    modules = {
        name: given
        for name, given in (("params", params), ("hparams", hparams))
        if isinstance(given, nn.Module)
    }
    if not modules:
        return function
    return _OnModules(function, modules)


# A dataclass, so that two of the same function and modules are seen to be the same objective.
@dataclass(frozen=True)
class _OnModules:
    function: Function
    modules: dict[str, nn.Module]
    _call: _Call = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        # Not a cached property, whose lock the compiler cannot follow.
        object.__setattr__(self, "_call", _Call(self.function, self.modules))

    def __call__(self, params: Tree, hparams: Tree, *batch: Any) -> Any:
        trees = {"params": params, "hparams": hparams}
        tensors = {
            f"modules_by_name.{name}.{key}": tensor
            for name in self.modules
            for key, tensor in trees[name].items()
        }
        given = (self.modules.get(name, tree) for name, tree in trees.items())
        return functional_call(self._call, tensors, (*given, *batch))


class _Call(nn.Module):
    """A function of some modules as one module, for ``functional_call``."""

    def __init__(self, function: Function, modules: dict[str, nn.Module]) -> None:
        super().__init__()
        self.function = function
        self.modules_by_name = nn.ModuleDict(modules)

    def forward(self, *arguments: Any) -> Any:
        return self.function(*arguments)
