"""hypergrad: gradients through the solution of another optimisation problem, for PyTorch."""

from hypergrad import bilevel, distributed, linsolve, operators, optimizers, single_loop
from hypergrad.__about__ import __version__ as __version__
from hypergrad.bilevel import BilevelSolver, plot
from hypergrad.diagnosis.check import check
from hypergrad.diagnosis.report import Finding, Report, UnrolledReport
from hypergrad.errors import (
    CheckpointError,
    CheckpointWarning,
    CompilationError,
    DampingWarning,
    DoubleBackwardError,
    DoubleBackwardWarning,
    ForwardModeError,
    HypergradWarning,
    LinearSolveWarning,
    LoaderError,
    NonFiniteError,
    VerificationError,
    VerificationWarning,
)
from hypergrad.implicit.accumulate import accumulate_grad
from hypergrad.implicit.error_bound import ErrorBound
from hypergrad.implicit.hypergradient import Hypergradient, hypergradient
from hypergrad.linsolve import (
    CG,
    GMRES,
    MINRES,
    BlockCG,
    BlockSolution,
    Dense,
    FixedPoint,
    Identity,
    JacobiPreconditioner,
    LinearSolveError,
    LinearSolver,
    Neumann,
    NormalCG,
    Nystrom,
    NystromPreconditioner,
    NystromSketch,
    Preconditioner,
    SGDSolve,
    Sketch,
    Solution,
    Status,
    StochasticNeumann,
)
from hypergrad.minibatches import Averaged, Sampled
from hypergrad.solutions.conditions import WarmStart
from hypergrad.solutions.decorators import argmin, fixed_point, root
from hypergrad.unrolling.hypergradient import Unrolled, UnrolledHypergradient
from hypergrad.unrolling.unroll import unroll
from hypergrad.verification.differences import Verdict
from hypergrad.verification.verification import Verification

__all__ = [
    "CG",
    "GMRES",
    "MINRES",
    "Averaged",
    "BilevelSolver",
    "BlockCG",
    "BlockSolution",
    "CheckpointError",
    "CheckpointWarning",
    "CompilationError",
    "DampingWarning",
    "Dense",
    "DoubleBackwardError",
    "DoubleBackwardWarning",
    "ErrorBound",
    "Finding",
    "FixedPoint",
    "ForwardModeError",
    "HypergradWarning",
    "Hypergradient",
    "Identity",
    "JacobiPreconditioner",
    "LinearSolveError",
    "LinearSolveWarning",
    "LinearSolver",
    "LoaderError",
    "Neumann",
    "NonFiniteError",
    "NormalCG",
    "Nystrom",
    "NystromPreconditioner",
    "NystromSketch",
    "Preconditioner",
    "Report",
    "SGDSolve",
    "Sampled",
    "Sketch",
    "Solution",
    "Status",
    "StochasticNeumann",
    "Unrolled",
    "UnrolledHypergradient",
    "UnrolledReport",
    "Verdict",
    "Verification",
    "VerificationError",
    "VerificationWarning",
    "WarmStart",
    "accumulate_grad",
    "argmin",
    "bilevel",
    "check",
    "distributed",
    "fixed_point",
    "hypergradient",
    "linsolve",
    "operators",
    "optimizers",
    "plot",
    "root",
    "single_loop",
    "unroll",
]
