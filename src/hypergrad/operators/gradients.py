"""Values and first gradients of an objective, batch by batch where it is a mean over batches."""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import closing

from hypergrad import tree as tr
from hypergrad._checks import check_dependence
from hypergrad.autodiff.evaluation import Objective, evaluate, filled, gradient, leaving_no_trace
from hypergrad.autodiff.isolation import RandomState
from hypergrad.minibatches import Averaged
from hypergrad.operators.hessians import Hessian
from hypergrad.tree import Tree


class Shared(ABC):
    """An objective that is the mean of those of several processes.

    If a process has several batches, the objective combines the derivatives that each process
    computes batch by batch.
    """

    @property
    @abstractmethod
    def batch_by_batch(self) -> bool:
        """Whether this process's part is an :class:`Averaged`; else it is differentiated as one."""

    @abstractmethod
    def hessian(self, params: Tree, hparams: Tree, part: type[Hessian]) -> Hessian:
        """Return the Hessian of the mean; ``part`` is the class of the Hessian of one batch."""

    @abstractmethod
    def value_and_gradients(
        self, params: Tree, hparams: Tree, name: str, random_state: RandomState
    ) -> tuple[float, Tree, Tree]:
        """Return ``g``, ``∂_θ g`` and ``∂_φ g``, batch by batch if averaged.

        Args:
            objective: g.
            params: θ, leaves that require gradients.
            hparams: φ; a leaf that requires no gradient gets zeros.
            name: what to call the objective in errors.
            random_state: where to start; the default is the current state.

        Raises:
            TypeError, ValueError: ``g`` is not a finite scalar that depends on ``params``.
        """


def value_and_gradients(
    objective: Objective,
    params: Tree,
    hparams: Tree,
    name: str,
    random_state: RandomState | None = None,
) -> tuple[float, Tree, Tree]:
    """``g``, ``∂_θ g`` and ``∂_φ g``, batch by batch if averaged.

    Args:
        objective: g.
        params: θ, leaves that require gradients.
        hparams: φ; zeros for a leaf that requires none.
        name: what to call the objective in errors.
        random_state: what to start from; the default is the current state.

    Raises:
        TypeError, ValueError: ``g`` is not a finite scalar that depends on ``params``.
    """
    state = random_state or RandomState(params, hparams)
    if isinstance(objective, Shared) and objective.batch_by_batch:
        return objective.value_and_gradients(params, hparams, name, state)
    if not isinstance(objective, Averaged):
        return _one_batch(objective, params, hparams, state, name)
    total = 0.0
    value = 0.0
    sums: Tree = None
    with closing(objective.replayed_parts(state, params, hparams)) as parts:
        for weight, part, here in parts:
            part_value, *grads = _one_batch(part, params, hparams, here, name)
            total += weight
            value += weight * part_value
            scaled = tr.scale(tr.at_least_float32(tuple(grads)), weight)
            sums = scaled if sums is None else tr.add(sums, scaled)
    theta, phi = tr.cast_like(tr.divide(sums, total), (params, hparams))
    return value / total, theta, phi


def value(
    objective: Objective, params: Tree, hparams: Tree, name: str, random_state: RandomState
) -> float:
    """Return ``g`` alone, batch by batch if averaged; see :func:`value_and_gradients`."""
    if isinstance(objective, Shared) and objective.batch_by_batch:
        return objective.value_and_gradients(params, hparams, name, random_state)[0]
    if not isinstance(objective, Averaged):
        return evaluate(objective, params, hparams, random_state, name).item()
    total = found = 0.0
    with closing(objective.replayed_parts(random_state, params, hparams)) as parts:
        for weight, part, here in parts:
            total += weight
            found += weight * evaluate(part, params, hparams, here, name).item()
    return found / total


def _one_batch(
    objective: Objective, params: Tree, hparams: Tree, state: RandomState, name: str
) -> tuple[float, Tree, Tree]:
    value = evaluate(objective, params, hparams, state, name)
    with leaving_no_trace(twice=False):
        grads = gradient(value, (params, hparams))
    count = len(tr.leaves(params))
    check_dependence(grads[:count], name)
    return value.item(), filled(grads[:count], params), filled(grads[count:], hparams)
