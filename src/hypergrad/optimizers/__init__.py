"""Optimisers as pure functions, differentiable in gradients, parameters and hyperparameters.

Each is a frozen dataclass with ``init(params) -> state`` and
``update(grads, state, params) -> (params, state)``.
"""

from hypergrad.optimizers.adagrad import Adagrad
from hypergrad.optimizers.adam import Adam, AdamW
from hypergrad.optimizers.base import Optimizer, Settings, Slot, State, check_optimizer
from hypergrad.optimizers.clipped import Clipped
from hypergrad.optimizers.hyperparameters import Hyperparameter
from hypergrad.optimizers.legacy import diff_sgd
from hypergrad.optimizers.rmsprop import RMSprop
from hypergrad.optimizers.sgd import SGD
from hypergrad.optimizers.translation import from_torch

__all__ = [
    "SGD", "Adagrad", "Adam", "AdamW", "Clipped", "Hyperparameter", "Optimizer", "RMSprop",
    "Settings", "Slot", "State", "check_optimizer", "diff_sgd", "from_torch",
]  # fmt: skip
