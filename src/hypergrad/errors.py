"""The warning and error categories of the library.

Bad input raises plain ``ValueError`` and ``TypeError``. The categories here are for faults that
only show during a computation.
"""

from __future__ import annotations

import sys
import warnings


def warn(message: str, category: type[HypergradWarning]) -> None:
    """Warn at the line outside of this package that led here."""
    level, frame = 1, sys._getframe()
    while frame.f_back and str(frame.f_globals.get("__name__")).startswith("hypergrad."):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, category, stacklevel=level)


class HypergradWarning(UserWarning):
    """Base of all warnings of hypergrad; filter on it to silence them or to raise them."""


class LinearSolveWarning(HypergradWarning):
    """A linear solve failed; its best iterate was used."""


class DampingWarning(LinearSolveWarning):
    """``damping="auto"`` took more than the largest curvature, so the answer is rough."""


class NonFiniteError(ValueError):
    """A value, a gradient or a parameter is infinite or NaN; the message says which, and when."""


class DoubleBackwardWarning(HypergradWarning):
    """An operation has no correct second derivative, and finite differences are used instead."""


class DoubleBackwardError(RuntimeError):
    """The gradient of an objective cannot be differentiated a second time.

    Attributes:
        operation: the operation without a second derivative, as PyTorch names it.
    """

    def __init__(self, operation: str) -> None:
        super().__init__(
            f"{operation} has no correct second derivative in PyTorch; use "
            "mode='finite-difference', which needs first derivatives only, or mode='auto', which "
            "changes to it by itself"
        )
        self.operation = operation


class ForwardModeError(NotImplementedError):
    """``mode="forward"`` met an operation whose derivative PyTorch lacks there, or has wrong.

    Attributes:
        operation: the operation that stands in the way, as PyTorch names it.
    """

    def __init__(self, operation: str) -> None:
        super().__init__(
            f"{operation} has no correct derivative in PyTorch's forward mode; use mode='reverse', "
            "or mode='finite-difference', which needs first derivatives only"
        )
        self.operation = operation


class VerificationWarning(HypergradWarning):
    """A derivative behind a hypergradient is wrong, by differences of a lower one."""


class VerificationError(RuntimeError):
    """The same, where ``on_failure="raise"``."""


class CompilationError(RuntimeError):
    """An objective cannot be made into a compiled program; the message gives the reason.

    All other modes work without a compiler.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(f"mode='compiled' failed for inner: {reason}")


class DistributedError(RuntimeError):
    """A rank failed, or ranks that must agree do not; raised on all ranks with the same message."""


class LoaderError(RuntimeError):
    """A loader raised an error, which is chained; the message says at which batch."""


class CheckpointError(ValueError):
    """A checkpoint is damaged, is not of this library, or is of another problem."""


class CheckpointWarning(HypergradWarning):
    """A checkpoint or a log could not be written, read or removed; the message says which."""


def missing_extra(what: str, extra: str) -> ImportError:
    """Return the error for an optional package that is not installed; it says how to install it."""
    return ImportError(
        f"{what} needs a package that is not installed: pip install 'hypergrad[{extra}]'"
    )
