"""Linear solvers for maps on trees. Nothing here knows what a loss is."""

from hypergrad.linsolve.auto_damping import AutoDamping, sufficient_damping
from hypergrad.linsolve.base import LinearSolveError, LinearSolver, Outcome, Solution, Status
from hypergrad.linsolve.block_cg import BlockCG, BlockSolution
from hypergrad.linsolve.cg import CG
from hypergrad.linsolve.dense import Dense
from hypergrad.linsolve.fixed_point import FixedPoint
from hypergrad.linsolve.gmres import GMRES
from hypergrad.linsolve.identity import Identity
from hypergrad.linsolve.minres import MINRES
from hypergrad.linsolve.neumann import Neumann
from hypergrad.linsolve.normal_cg import NormalCG
from hypergrad.linsolve.nystrom.preconditioner import NystromPreconditioner
from hypergrad.linsolve.nystrom.sketch import Sketch
from hypergrad.linsolve.nystrom.solver import Nystrom, NystromSketch
from hypergrad.linsolve.preconditioner import JacobiPreconditioner, Preconditioner
from hypergrad.linsolve.spectrum import Extremes, extreme_eigenvalues
from hypergrad.linsolve.stochastic import SGDSolve, StochasticNeumann

__all__ = [
    "CG", "GMRES", "MINRES", "AutoDamping", "BlockCG", "BlockSolution", "Dense", "Extremes",
    "FixedPoint", "Identity", "JacobiPreconditioner", "LinearSolveError", "LinearSolver",
    "Neumann", "NormalCG", "Nystrom", "NystromPreconditioner", "NystromSketch", "Outcome",
    "Preconditioner", "SGDSolve", "Sketch", "Solution", "Status", "StochasticNeumann",
    "extreme_eigenvalues", "sufficient_damping",
]  # fmt: skip
