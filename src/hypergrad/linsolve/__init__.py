"""Linear solvers for maps on trees. Nothing here knows what a loss is."""

from hypergrad.linsolve.base import LinearSolver
from hypergrad.linsolve.cg import CG
from hypergrad.linsolve.dense import Dense
from hypergrad.linsolve.identity import Identity
from hypergrad.linsolve.neumann import Neumann
from hypergrad.linsolve.nystrom import Nystrom, NystromSketch
from hypergrad.linsolve.solution import LinearSolveError, Solution, Status

__all__ = [
    "CG",
    "Dense",
    "Identity",
    "LinearSolveError",
    "LinearSolver",
    "Neumann",
    "Nystrom",
    "NystromSketch",
    "Solution",
    "Status",
]
