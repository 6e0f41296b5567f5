"""The loop of bilevel training: :class:`hypergrad.BilevelSolver`, its methods and its listeners."""

from hypergrad.bilevel.callbacks import (
    CSV,
    JSONL,
    Callback,
    Checkpoint,
    EarlyStopping,
    Evaluation,
    KeepBest,
    ProgressBar,
    TableFile,
    TensorBoard,
    Timer,
)
from hypergrad.bilevel.history import History, Record
from hypergrad.bilevel.methods.choices import Method
from hypergrad.bilevel.methods.estimators import (
    DARTS,
    T1T2,
    AmIGO,
    Estimator,
    StocBiO,
)
from hypergrad.bilevel.plotting import plot
from hypergrad.bilevel.problem import InnerOptimizer, Level, Problem
from hypergrad.bilevel.solver import BilevelSolver
from hypergrad.implicit.hypergradient import Implicit

__all__ = [
    "CSV",
    "DARTS",
    "JSONL",
    "T1T2",
    "AmIGO",
    "BilevelSolver",
    "Callback",
    "Checkpoint",
    "EarlyStopping",
    "Estimator",
    "Evaluation",
    "History",
    "Implicit",
    "InnerOptimizer",
    "KeepBest",
    "Level",
    "Method",
    "Problem",
    "ProgressBar",
    "Record",
    "StocBiO",
    "TableFile",
    "TensorBoard",
    "Timer",
    "plot",
]
