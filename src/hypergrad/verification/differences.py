"""Derivatives of an objective compared with differences of lower ones, and verdicts.

Along ``θ ± ε u`` gradients check products with second derivatives, and values check gradients by
the trapezoidal rule; see :mod:`hypergrad.verification.verification`.
"""

from __future__ import annotations

import math
import random
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from enum import Enum
from typing import Any, Literal

import torch
from torch import Tensor

from hypergrad import tree as tr
from hypergrad.autodiff.evaluation import Objective, evaluate, fresh_leaves
from hypergrad.autodiff.isolation import RandomState
from hypergrad.autodiff.kept_graph import custom_functions, has_kinks
from hypergrad.minibatches import Averaged
from hypergrad.operators.gradients import Shared, value, value_and_gradients
from hypergrad.tree import Tree
from hypergrad.verification.moving_buffers import FirstRun

# The rounding of a value or a gradient, in units of the machine epsilon.
_ROUNDINGS = 8.0
# A difference whose rounding is a larger part than this of what it measures settles nothing.
_RESOLVED = 0.05
_CLEAR = 2e-4
# float64, whose steps cross next to no kink.
FINE = 1e-10
# The second and third step, as parts of the first; and longer ones, which values need.
_SHORTER = (0.25, 0.0625)
LONGER = (4.0, 16.0, 64.0)
# Two differences agree if they lie so much closer to each other than to the product.
_CLOSER = 0.1
# An error that is not so many tolerances is no failure.
_MATERIAL = 3.0
# Differences that do not agree with each other pass all the same at so many tolerances.
_CLOSE_ENOUGH = 20.0


class Verdict(Enum):
    """What a verification found. The value is a sentence that says it."""

    PASSED = "first, second and mixed derivatives agree with differences"
    FAILED = "a derivative is not what differences of a lower one say"
    INCONCLUSIVE = "differences do not settle whether the derivatives are right"


class Displaced:
    """An objective at other parameters, always from one random state."""

    def __init__(
        self,
        objective: Objective,
        name: str,
        theta: Tree,
        phi: Tree,
        random_state: RandomState,
        rounding: float,
        first_run: FirstRun | None = None,
    ) -> None:
        self._objective = objective
        self._first_run = first_run or FirstRun()
        self._only_kinks: bool | None = None
        self._name = name
        self._random_state = random_state
        self.theta = theta
        self.phi = phi
        self.rounding = rounding

    def gradients(self, theta: Tree) -> tuple[float, Tree, Tree]:
        """The value, and the gradients in θ and φ."""
        objective = self._objective
        if self._only_kinks is not None or isinstance(objective, Averaged | Shared):
            return self._evaluated(value_and_gradients, theta, self.phi)

        def noted(params: Tree, hparams: Tree) -> Tensor:
            value = objective(params, hparams)
            self._only_kinks = _only_kinks(value)
            return value

        return self._evaluated(value_and_gradients, theta, self.phi, noted)

    def value(self, theta: Tree, phi: Tree) -> float:
        """The value alone."""
        # Some of these take gradients all the same.
        watched = (
            nullcontext() if isinstance(self._objective, Shared) else self._first_run.watched()
        )
        with watched:
            found: float = self._evaluated(value, theta, phi)
        return found

    def only_kinks(self) -> bool:
        """Whether the functions that could be wrong have kinks."""
        if self._only_kinks is None:
            self._only_kinks = _only_kinks(self.graph())
        return self._only_kinks

    def _evaluated(
        self, how: Callable[..., Any], theta: Tree, phi: Tree, objective: Objective | None = None
    ) -> Any:
        leaves = fresh_leaves(theta), fresh_leaves(phi)
        try:
            return how(objective or self._objective, *leaves, self._name, self._random_state)
        except Exception as error:
            # The objective is the caller's: next to θ it may raise anything, such as for a value
            # that is not finite or a matrix that is not positive definite there.
            raise _OutsideDomainError from error

    def graph(self) -> Tensor:
        """The value, or that of the first batch, with its graph."""
        objective = self._objective
        if isinstance(objective, Averaged):
            _, objective = next(objective.parts())
        found: Tensor = self._evaluated(
            lambda f, theta, phi, name, state: evaluate(f, theta, phi, state, name),
            self.theta,
            self.phi,
            objective,
        )
        return found

    def coarsest(self) -> float:
        """The coarsest machine epsilon among what is computed, such as of a norm in float32."""
        found = [self.rounding]

        def note(tensor: Tensor) -> Tensor:
            if tensor.is_floating_point():
                found.append(torch.finfo(tensor.dtype).eps)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            note(self.graph())
        return max(found)


class _OutsideDomainError(Exception):
    """An objective cannot be evaluated next to where the hypergradient was taken."""


@dataclass(frozen=True)
class _Error:
    """How far a difference is from what it should be, at one of several steps.

    Attributes:
        gap: the difference less what it should be, a vector.
        scale: the size of both.
        rounding: how long the gap may be by rounding alone.
    """

    gap: Tree
    scale: float
    rounding: float


class Line:
    """f along ``θ + ε u`` for a unit vector u."""

    def __init__(self, f: Displaced, unit: Tree, value: float) -> None:
        self._f = f
        self._unit = unit
        self._value = value
        self._ends: dict[float, tuple[tuple[float, Tree, Tree], tuple[float, Tree, Tree]]] = {}
        self.step = f.rounding ** (1 / 3) * (1.0 + tr.largest(f.theta))

    def product_errors(self, product: Tree, which: Literal["second", "mixed"]) -> Iterator[_Error]:
        """Of ``H u`` or ``(∂_φ F)ᵀ u``, by gradients."""
        index = 1 if which == "second" else 2
        for step in self._steps():
            ahead, behind = (end[index] for end in self._at(step))
            difference = tr.divide(tr.subtract(tr.at_least_float32(ahead), behind), 2.0 * step)
            sizes = tr.norm(ahead) + tr.norm(behind)
            yield _Error(
                tr.subtract(difference, product),
                max(tr.norm(difference), tr.norm(product)),
                _ROUNDINGS * self._f.rounding * sizes / (2.0 * step),
            )

    def slope_errors(self) -> Iterator[_Error]:
        """Of ``⟨∇_θ f, u⟩``, by values."""
        for step in self._steps():
            (high, *_), (low, *_) = self._at(step)
            before, after = self._slopes(step)
            norms = [tr.norm(grad) for _, grad, _ in self._at(step)]
            yield _Error(
                _scalar((high - low) / (2.0 * step) - (before + after) / 2.0),
                sum(norms) / 2.0,
                self._value_rounding(high, low) / (2.0 * step),
            )

    def curvature_errors(self, parts: tuple[float, ...] = (1.0, *_SHORTER)) -> Iterator[_Error]:
        """Of the change of ``⟨∇_θ f, u⟩``, by values: all that is left of it at a minimum."""
        for step in self._steps(parts):
            (high, *_), (low, *_) = self._at(step)
            before, after = self._slopes(step)
            bend = (after - before) / (2.0 * step)
            yield _Error(
                _scalar((high - 2.0 * self._value + low) / step**2 - bend),
                abs(bend),
                2.0 * self._value_rounding(high, low) / step**2,
            )

    def outer_slope_errors(self, mixed: Tree) -> Iterator[_Error]:
        """Of ``∂_φ f`` along the mixed product, by values."""
        length = tr.norm(mixed)
        if length == 0.0:
            return
        f, along = self._f, tr.cast_like(tr.divide(mixed, length), self._f.phi)
        # Their mean is the gradient at θ but for the square of the step: good enough at first.
        grads = tr.scale(tr.add(*(tr.at_least_float32(end[2]) for end in self._at(self.step))), 0.5)
        noise = self._value_rounding(self._value)
        for turn, (step, central) in enumerate(_value_steps(f, noise, tr.norm(grads))):
            if turn == 1:
                grads = tr.at_least_float32(f.gradients(f.theta)[2])
            high = f.value(f.theta, tr.add(f.phi, along, step))
            low = f.value(f.theta, tr.add(f.phi, along, -step)) if central else self._value
            width = 2.0 * step if central else step
            yield _Error(
                _scalar((high - low) / width - float(tr.dot(grads, along))),
                tr.norm(grads),
                self._value_rounding(high, low) / width,
            )

    def _steps(self, parts: tuple[float, ...] = (1.0, *_SHORTER)) -> Iterator[float]:
        return (part * self.step for part in parts)

    def _at(self, step: float) -> tuple[tuple[float, Tree, Tree], tuple[float, Tree, Tree]]:
        if step not in self._ends:
            places = (self._moved(step), self._moved(-step))
            ahead, behind = map(self._f.gradients, places)
            self._ends[step] = ahead, behind
        return self._ends[step]

    def _moved(self, step: float) -> Tree:
        theta = self._f.theta
        return tr.add(theta, tr.cast_like(self._unit, theta), step)

    def _slopes(self, step: float) -> tuple[float, float]:
        ahead, behind = self._at(step)
        return float(tr.dot(behind[1], self._unit)), float(tr.dot(ahead[1], self._unit))

    def _value_rounding(self, *values: float) -> float:
        largest = max(abs(self._value), *map(abs, values))
        return _ROUNDINGS * self._f.rounding * largest


def gradient_errors(
    g: Displaced, start: float, grads: tuple[Tree, Tree], unit: Tree
) -> Iterator[_Error]:
    """Of the gradient of g along itself, or along ``unit`` in θ where it is zero."""
    length = tr.norm(grads)
    along = (unit, tr.zeros_like(g.phi)) if length == 0.0 else tr.divide(grads, length)
    theta, phi = tr.cast_like(along, (g.theta, g.phi))
    noise = _ROUNDINGS * g.rounding * abs(start)
    for step, central in _value_steps(g, noise, length):
        high = g.value(tr.add(g.theta, theta, step), tr.add(g.phi, phi, step))
        low = start
        if central:
            low = g.value(tr.add(g.theta, theta, -step), tr.add(g.phi, phi, -step))
        width = 2.0 * step if central else step
        noise = _ROUNDINGS * g.rounding * max(abs(high), abs(low))
        gap = (high - low) / width - length
        yield _Error(_scalar(gap), length or abs(gap), noise / width)


def _value_steps(f: Displaced, noise: float, slope: float) -> Iterator[tuple[float, bool]]:
    """Steps for differences of values, and whether they are central.

    They begin where the rounding of the values is about a tolerance of what they measure.
    """
    size = 1.0 + tr.largest((f.theta, f.phi))
    if f.rounding < FINE:
        yield math.sqrt(f.rounding) * size, False
    usual = f.rounding ** (1 / 3) * size
    clear = noise / (2.0 * _CLEAR * slope) if slope else usual
    first = min(max(min(_SHORTER) * usual, clear), max(LONGER) * usual)
    for part in (1.0, 4.0, *_SHORTER):
        yield part * first, True


def judged(
    errors: Iterator[_Error],
    tolerance: float,
    *,
    resolve: bool = True,
    hopeless: Callable[[], bool] = lambda: False,
) -> tuple[Verdict, float | None]:
    """The verdict on one derivative, and its relative error.

    The first error within the tolerance passes. Two in a row that agree outside of it fail.

    Args:
        errors: at several steps; no more of them are computed than the verdict takes.
        tolerance: of the relative error.
        resolve: whether to go on where rounding hides the derivative; else it passes unmeasured.
        hopeless: whether other steps would settle nothing; asked once the first has not.
    """
    last: Tree = None
    smallest: float | None = None
    first = True
    try:
        for error in errors:
            gap = tr.norm(error.gap)
            relative = gap / error.scale if error.scale else math.inf
            resolved = error.rounding <= _RESOLVED * error.scale
            if gap <= tolerance * error.scale + error.rounding:
                if resolved or gap == 0.0:
                    return Verdict.PASSED, relative if gap else 0.0
                if not resolve:
                    return Verdict.PASSED, None
            material = gap > 2.0 * error.rounding and relative > _MATERIAL * tolerance
            agree = last is not None and tr.norm(tr.subtract(last, error.gap)) <= _CLOSER * gap
            if agree and material:
                return Verdict.FAILED, relative
            last = error.gap
            if resolved:
                smallest = relative if smallest is None else min(smallest, relative)
            if first and hopeless():
                break
            first = False
    except _OutsideDomainError:
        return Verdict.INCONCLUSIVE, None
    if last is None:
        return Verdict.PASSED, None
    close = smallest is not None and smallest <= _CLOSE_ENOUGH * tolerance
    return (Verdict.PASSED if close else Verdict.INCONCLUSIVE), smallest


class Kinks:
    """Whether kinks explain what differences of float32 gradients see.

    Their steps cross many kinks, so that they see the curvature of the mean over the data, which
    second derivatives leave out; with enough data they even agree with each other.
    """

    def __init__(self, f: Displaced) -> None:
        self._f = f

    def __call__(self) -> bool:
        """Whether the only functions that could be wrong have kinks."""
        return self._f.rounding >= FINE and self._f.only_kinks()


def not_failed(verdict: Verdict) -> Verdict:
    """``INCONCLUSIVE`` in place of ``FAILED``."""
    return Verdict.INCONCLUSIVE if verdict is Verdict.FAILED else verdict


ORDER = [Verdict.PASSED, Verdict.INCONCLUSIVE, Verdict.FAILED]


def worst(*judged: tuple[Verdict, float | None]) -> tuple[Verdict, float | None]:
    """The worst verdict, and its largest error."""
    worst = max((verdict for verdict, _ in judged), key=ORDER.index)
    return worst, max(
        (e for verdict, e in judged if verdict is worst and e is not None), default=None
    )


def _only_kinks(value: Tensor) -> bool:
    return has_kinks(value) and not custom_functions(value)


def _scalar(number: float) -> Tensor:
    return torch.tensor(number, dtype=torch.float64)


def is_verifying() -> bool:
    """Whether an objective is evaluated for a verification, where its metrics mean nothing."""
    return _this_thread.verifying


@contextmanager
def verifying() -> Iterator[None]:
    """Mark evaluations, and put the random states of the process back after them."""
    outside, python, numpy = _this_thread.verifying, random.getstate(), sys.modules.get("numpy")
    torch_state = torch.get_rng_state()
    drawn = None if numpy is None else numpy.random.get_state()
    _this_thread.verifying = True
    try:
        yield
    finally:
        _this_thread.verifying = outside
        random.setstate(python)
        torch.set_rng_state(torch_state)
        if numpy is not None:
            numpy.random.set_state(drawn)


class _ThreadState(threading.local):
    verifying = False


_this_thread = _ThreadState()
