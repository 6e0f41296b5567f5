"""Callbacks of a loop: progress, logs, checkpoints, evaluation, reasons to stop."""

from hypergrad.bilevel.callbacks.base import Callback
from hypergrad.bilevel.callbacks.best import KeepBest
from hypergrad.bilevel.callbacks.checkpoint import Checkpoint
from hypergrad.bilevel.callbacks.evaluation import Evaluation
from hypergrad.bilevel.callbacks.progress import ProgressBar
from hypergrad.bilevel.callbacks.stopping import EarlyStopping, Timer
from hypergrad.bilevel.callbacks.tables import CSV, JSONL, TableFile
from hypergrad.bilevel.callbacks.tensorboard import TensorBoard

__all__ = [
    "CSV", "JSONL", "Callback", "Checkpoint", "EarlyStopping", "Evaluation", "KeepBest",
    "ProgressBar", "TableFile", "TensorBoard", "Timer",
]  # fmt: skip
