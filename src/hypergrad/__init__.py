"""hypergrad: gradients through the solution of another optimisation problem, for PyTorch."""

from importlib.metadata import version

from hypergrad import linsolve, operators
from hypergrad.errors import (
    DoubleBackwardError,
    DoubleBackwardWarning,
    HypergradWarning,
    LinearSolveWarning,
)
from hypergrad.implicit import Hypergradient, accumulate_grad, hypergradient
from hypergrad.linsolve import (
    CG,
    Dense,
    Identity,
    LinearSolveError,
    LinearSolver,
    Neumann,
    Nystrom,
    NystromSketch,
    Solution,
    Status,
)

__version__ = version("hypergrad")

__all__ = [
    "CG",
    "Dense",
    "DoubleBackwardError",
    "DoubleBackwardWarning",
    "HypergradWarning",
    "Hypergradient",
    "Identity",
    "LinearSolveError",
    "LinearSolveWarning",
    "LinearSolver",
    "Neumann",
    "Nystrom",
    "NystromSketch",
    "Solution",
    "Status",
    "accumulate_grad",
    "hypergradient",
    "linsolve",
    "operators",
]
