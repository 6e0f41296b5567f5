"""The warning and error categories of the library.

Bad input raises plain ``ValueError`` and ``TypeError``; the categories here are for what only shows
while computing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hypergrad.linsolve.solution import Solution


class HypergradWarning(UserWarning):
    """Base of every warning that hypergrad emits; filter on it to silence or to raise them all."""


class LinearSolveWarning(HypergradWarning):
    """A linear solve failed, and its best iterate was used all the same."""


class DoubleBackwardWarning(HypergradWarning):
    """An operation has no second derivative, and finite differences are used instead."""


class LinearSolveError(RuntimeError):
    """A linear solve failed and ``on_failure="raise"`` was asked for.

    Attributes:
        solution: the receipt of the failed solve, with its best iterate.
    """

    def __init__(self, message: str, solution: Solution) -> None:
        super().__init__(message)
        self.solution = solution


class DoubleBackwardError(RuntimeError):
    """The gradient of an objective cannot be differentiated a second time.

    Attributes:
        operation: the operation that stands in the way, as PyTorch names it.
    """

    def __init__(self, operation: str) -> None:
        super().__init__(
            f"{operation} has no second derivative in PyTorch; use mode='finite-difference', which "
            "needs first derivatives only, or mode='auto', which changes to it by itself"
        )
        self.operation = operation
