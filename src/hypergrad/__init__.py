"""hypergrad: gradients through the solution of another optimisation problem, for PyTorch."""

from hypergrad import bilevel, distributed, linsolve, operators, optimizers, single_loop
from hypergrad.__about__ import __version__ as __version__
from hypergrad.accumulate import accumulate_grad
from hypergrad.bilevel import BilevelSolver, Level, plot
from hypergrad.diagnosis.check import check
from hypergrad.diagnosis.report import Report
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
from hypergrad.hypergradients import hypergradient
from hypergrad.implicit.hypergradient import Implicit
from hypergrad.linsolve import (
    CG,
    GMRES,
    MINRES,
    BlockCG,
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
    Preconditioner,
    SGDSolve,
    Solution,
    Status,
    StochasticNeumann,
)
from hypergrad.minibatches import Averaged, Sampled
from hypergrad.results import Hypergradient
from hypergrad.solutions.conditions import WarmStart
from hypergrad.solutions.decorators import argmin, fixed_point, root
from hypergrad.unrolling.hypergradient import Unrolled
from hypergrad.unrolling.unroll import unroll
from hypergrad.verification.differences import Verdict
from hypergrad.verification.error_bound import ErrorBound
from hypergrad.verification.verification import Verification

__all__ = [
    "CG",
    "GMRES",
    "MINRES",
    "Averaged",
    "BilevelSolver",
    "BlockCG",
    "CheckpointError",
    "CheckpointWarning",
    "CompilationError",
    "DampingWarning",
    "Dense",
    "DoubleBackwardError",
    "DoubleBackwardWarning",
    "ErrorBound",
    "FixedPoint",
    "ForwardModeError",
    "HypergradWarning",
    "Hypergradient",
    "Identity",
    "Implicit",
    "JacobiPreconditioner",
    "Level",
    "LinearSolveError",
    "LinearSolveWarning",
    "LinearSolver",
    "LoaderError",
    "Neumann",
    "NonFiniteError",
    "NormalCG",
    "Nystrom",
    "NystromPreconditioner",
    "Preconditioner",
    "Report",
    "SGDSolve",
    "Sampled",
    "Solution",
    "Status",
    "StochasticNeumann",
    "Unrolled",
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
