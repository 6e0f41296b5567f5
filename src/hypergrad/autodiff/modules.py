"""Modules as θ or φ: an objective calls the module, which then runs with other parameters."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.func import functional_call

from hypergrad.tree import Tree

Function = Callable[..., Any]
"""``f(params, hparams)`` or ``f(params, hparams, batch)``."""


def parameters_of(given: Tree | nn.Module, name: str) -> Tree:
    """The parameters of a module that require gradients, by their names; a tree as it is.

    It raises ``ValueError`` if a module has no such parameter.
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


class Parameters(dict[str, Tensor]):
    """The parameters of a module by their names, which can be used as the module that has them.

    An objective may take it for the module, as in ``net(x)``, ``net.head.weight`` and
    ``net.parameters()``, or for a dictionary, as in ``params.items()`` and
    ``functional_call(model, params, (x,))``.

    Attributes:
        module: the module. Its parameters are these while an objective is evaluated.
    """

    def __init__(self, module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
        super().__init__(tensors)
        self.module = module

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the module returns."""
        return self.module(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name == "module":  # not there yet, as in a copy that is being made
            raise AttributeError(name)
        return getattr(self.module, name)

    def __missing__(self, key: Any) -> Any:
        """A part of a container, such as ``net[0]``."""
        if isinstance(key, str) or not hasattr(self.module, "__getitem__"):
            raise KeyError(key)
        module: Any = self.module
        return module[key]


def on_modules(function: Function, params: Tree | nn.Module, hparams: Tree | nn.Module) -> Function:
    """``function`` as one of two trees, if it takes a module in the place of one of them.

    Args:
        function: takes what the caller gave as ``params`` and ``hparams``.
        params: θ; where it is a module, ``function`` gets :class:`Parameters` of it, while the
            tensors of a tree stand in the place of the module's own.
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
        given = (
            Parameters(self.modules[name], tree) if name in self.modules else tree
            for name, tree in trees.items()
        )
        return functional_call(self._call, tensors, (*given, *batch))


class _Call(nn.Module):
    """A function of some modules as one module, for ``functional_call``."""

    def __init__(self, function: Function, modules: dict[str, nn.Module]) -> None:
        super().__init__()
        self.function = function
        self.modules_by_name = nn.ModuleDict(modules)

    def __call__(self, *arguments: Any) -> Any:
        """Return what the module returns."""
        return self.function(*arguments)
