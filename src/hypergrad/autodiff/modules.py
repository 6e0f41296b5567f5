"""Modules as θ or φ: an objective calls the module, which then runs with other parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, TypeAlias

from torch import nn
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


def on_modules(function: Function, params: Tree | nn.Module, hparams: Tree | nn.Module) -> Function:
    """``function`` as one of two trees, if it takes a module in the place of one of them.

    Each call starts in the modes of now (``train()`` or ``eval()``), whatever another one has set.

    Args:
        function: takes what the caller gave as ``params`` and ``hparams``.
        params: θ; where it is a module, ``function`` gets this module while the tensors of a
            tree stand in the place of its parameters.
        hparams: φ, in the same way.

    Raises:
        ValueError: two modules have a parameter in common.
    """
    modules = {
        name: given
        for name, given in (("params", params), ("hparams", hparams))
        if isinstance(given, nn.Module)
    }
    if not modules:
        return function
    if len(modules) == 2:
        inner = {id(parameter) for parameter in modules["params"].parameters()}
        if any(id(parameter) in inner for parameter in modules["hparams"].parameters()):
            raise ValueError("hparams must be apart from params, got modules that share parameters")
    return _OnModules(function, modules, modes_of(modules.values()))


Modes: TypeAlias = Sequence[tuple[nn.Module, bool]]
"""Parts of modules, and whether each is in training mode."""


def modes_of(given: Iterable[Tree | nn.Module]) -> Modes:
    """The mode of each part of the modules among ``given``."""
    modules = [each for each in given if isinstance(each, nn.Module)]
    return [(part, part.training) for module in modules for part in module.modules()]


def put_in_modes(modes: Modes) -> None:
    """Put each part into its mode."""
    for part, training in modes:
        if part.training != training:
            part.training = training


@contextmanager
def modes_put_back(*given: Tree | nn.Module) -> Iterator[Modes]:
    """Leave modules in the modes in which they were, ``train()`` or ``eval()``."""
    modes = modes_of(given)
    try:
        yield modes
    finally:
        put_in_modes(modes)


# A dataclass, so that two of the same function and modules are seen to be the same objective.
@dataclass(frozen=True)
class _OnModules:
    function: Function
    modules: dict[str, nn.Module]
    modes: Modes
    _call: ClassVar[_Call]  # of each object, but no part of what makes two of them equal

    def __post_init__(self) -> None:
        object.__setattr__(self, "_call", _Call(self.function, self.modules))

    def __call__(self, params: Tree, hparams: Tree, *batch: Any) -> Any:
        trees = {"params": params, "hparams": hparams}
        tensors = {
            f"modules_by_name.{name}.{key}": tensor
            for name in self.modules
            for key, tensor in trees[name].items()
        }
        put_in_modes(self.modes)
        given = (self.modules.get(name, tree) for name, tree in trees.items())
        return functional_call(self._call, tensors, (*given, *batch))


class _Call(nn.Module):
    """A function of some modules as one module, for ``functional_call``."""

    def __init__(self, function: Function, modules: dict[str, nn.Module]) -> None:
        super().__init__()
        self.function = function
        self.modules_by_name = nn.ModuleDict(modules)

    def __call__(self, *arguments: Any) -> Any:
        """The function's value: not by ``forward``, since this is no module that a user calls."""
        return self.function(*arguments)
